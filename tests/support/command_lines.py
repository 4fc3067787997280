"""Command lines, rows and files as no one would write them, for Hypothesis."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.saved_scores import save_placement, save_scores

# Each command with its inputs, and the options that name outputs.
COMMANDS = {
    "score": (("plop-tiny", "{data}"), ("-o", "--heatmap")),
    "place": (("{scores}",), ("-o",)),
    "export": (("{placement}", "--to", "trl"), ("-o",)),
    "report": (("{scores}",), ("-o", "--figures")),
    "finetune": (("plop-tiny", "{data}", "--placement", "{placement}"), ("-o",)),
    "compare": (("plop-tiny", "{data}", "--scores", "{scores}"), ("-o", "--plot")),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "score": (
        *("--samples", "--stop", "--settle-types", "--settle-modules", "--batch-size", "--mask", "--baseline"),
        *("--probes", "--include", "--exclude", "--scope", "--token-step", "--pad-to-multiple-of", "--compat"),
        *("--columns", "--split", "--max-length", "--seed", "--dtype", "--device", "--memory-budget"),
    ),
    "place": (
        *("--types", "--modules", "--max-nfn", "--strategy", "--rank", "--ranks", "--max-params", "--max-memory"),
        *("--batch-size", "--seq", "--seed"),
    ),
    "export": ("--to", "--rank", "--alpha"),
    "report": ("--against", "--types", "--rank", "--batch-size", "--seq"),
    "finetune": (
        *("--eval", "--eval-samples", "--rank", "--steps", "--batch-size", "--alpha", "--lr", "--columns", "--split"),
        *("--max-length", "--seed", "--dtype"),
    ),
    "compare": ("--strategies", "--types", "--max-params", "--rates", "--seeds", "--rank", "--steps", "--eval"),
}
FLAGS = {"score": ("--resume", "--fast"), "place": ("--ignore-nonfinite",), "export": ("--lossy",)}
# Files and other things that a path may name; the rest of the pool is made in `make_pool`.
NAMES = (
    *("data", "scores", "placement", "old", "link", "hard", "folder", "pipe", "loop", "dangling", "null", "full"),
    *("new", "new.png", "new[/b].json", "sub/new.json", "no/such/new.json", "new \u00e9\u4e2d.json", "..", "."),
    *("x" * 300, "~no-such-user/x", "new\udc80.json", "new\n.json", "--force", ":smile:.html", "$HOME.svg"),
)
_NUMBERS = ("0", "-1", "1", "3", "1.5", "nan", "inf", "1e400", "10M", "5%", "6GiB", "GiB", "1e9", "9" * 400, "0x10")
_WORDS = ("", "auto", "lowest", "inverse", "random", "q_proj", "q_proj,v_proj", "inverse-nfn", "[/b]", "\udc80", "a=b")
_WORDS += ("settled", "completion", "probe", "all", "cpu", "cuda:99", "float32", "paper-script", "text=text", "=", ",")


def make_pool(folder: Path) -> dict[str, Path]:
    """Make the files of a user in `folder`, by name."""
    pool = {name: folder / name for name in NAMES if name.isascii() and name.isalpha() and len(name) < 20}
    pool["data"] = folder / "data.jsonl"
    pool["data"].write_text('{"text": "some words that are long enough to be scored"}\n' * 2)
    pool["scores"], pool["placement"] = save_scores(folder), save_placement(folder)
    pool["old"].write_text("a file of the user")
    pool["link"].symlink_to(pool["scores"])
    os.link(pool["data"], pool["hard"])
    (pool["folder"] / "inner").mkdir(parents=True)
    (pool["folder"] / "a.jsonl").write_text('{"text": "b"}\n')
    os.mkfifo(pool["pipe"])
    pool["loop"].symlink_to("loop")
    pool["dangling"].symlink_to("absent")
    pool["null"].symlink_to(os.devnull)
    pool["full"].symlink_to("/dev/full")
    return pool


def paths(pool: dict[str, Path]) -> st.SearchStrategy[str]:
    """Paths: of the pool, or of nothing."""
    return st.sampled_from(NAMES).map(lambda name: str(pool.get(name, name)))


def command_lines(pool: dict[str, Path]) -> st.SearchStrategy[list[str]]:
    """Command lines with right and wrong inputs, outputs, options and values."""
    path = paths(pool)
    value = st.one_of(st.sampled_from(_NUMBERS), st.sampled_from(_WORDS), st.text(max_size=5), path).map(
        lambda text: text.replace("\0", "")
    )

    @st.composite
    def line(draw: Callable[..., Any]) -> list[str]:
        name = draw(st.sampled_from(tuple(COMMANDS)))
        inputs, outputs = COMMANDS[name]
        arguments = [name]
        for item in inputs:
            right = item.format(**pool)
            arguments.append(right if draw(st.integers(0, 9)) else draw(value))
        for option in outputs:
            if draw(st.booleans()):
                arguments += [option, draw(path)]
        for option in draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=2, unique=True)):
            arguments += [option, draw(value)]
        arguments += draw(st.lists(st.sampled_from(FLAGS.get(name, ("--force",))), max_size=1))
        return arguments + ["--force"] * draw(st.integers(0, 1))

    return line()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def damaged(content: Any) -> st.SearchStrategy[Any]:
    """The content of a JSON file with one value replaced, removed or repeated."""

    @st.composite
    def change(draw: Callable[..., Any]) -> Any:
        changed = json.loads(json.dumps(content))
        node = changed
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            deeper = isinstance(node[key], (dict, list)) and node[key]
            if not deeper or not draw(st.integers(0, 3)):
                break
            node = node[key]
        if draw(st.integers(0, 3)):
            node[key] = draw(JSON)
        else:
            del node[key]
        return changed

    return change()


COLUMNS = ("text", "prompt", "completion", "messages", "conversations", "input_ids", "labels", "chosen", "rejected")
COLUMNS += ("instruction", "output", "input", "tools", "system", "x")
_MESSAGE = st.fixed_dictionaries({}, optional={name: JSON for name in ("role", "content", "from", "value")})
VALUES = st.one_of(
    st.text(max_size=12), JSON, st.lists(_MESSAGE, max_size=3), st.lists(st.integers(-1, 300), max_size=4)
)
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=4), max_size=3)
