"""Command lines, rows and files as no one would write them, for Hypothesis."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from plop_ext.cli.main import build_parser
from tests.support.saved_scores import save_others, save_placement, save_scores

# Each command with its inputs; its options are those of its parser.
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("plop-tiny", "{data}"),
    "score": ("plop-tiny", "{data}"),
    "report": ("{scores}",),
    "place": ("{scores}",),
    "export": ("{placement}", "--to", "axolotl"),
    "finetune": ("plop-tiny", "{data}", "--placement", "{placement}"),
    "compare": ("plop-tiny", "{data}", "--scores", "{scores}"),
    "merge": ("{scores}", "{others}"),
    "demo": (),
    "doctor": (),
}
# Options that name what a command writes.
OUTPUTS = {"--output", "--heatmap", "--figures", "--plot"}
# Files and other things that a path may name; the rest of the pool is made in `make_pool`.
NAMES = (
    *(
        "data",
        "scores",
        "others",
        "placement",
        "old",
        "link",
        "hard",
        "folder",
        "pipe",
        "loop",
        "dangling",
        "null",
        "full",
    ),
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
    pool["others"] = save_others(folder)
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


def options(command: str) -> tuple[list[str], list[str], list[str]]:
    """The options of a command: those for outputs, others with a value, and flags."""
    actions = [action for action in build_parser()[1][command]._actions if action.option_strings]
    long = {action.option_strings[-1]: action.nargs == 0 for action in actions}
    flags = [name for name, flag in long.items() if flag and name != "--help"]
    values = [name for name, flag in long.items() if not flag]
    return [name for name in values if name in OUTPUTS], [name for name in values if name not in OUTPUTS], flags


def command_lines(pool: dict[str, Path]) -> st.SearchStrategy[list[str]]:
    """Command lines with right and wrong inputs, outputs, options and values."""
    path = paths(pool)
    value = st.one_of(st.sampled_from(_NUMBERS), st.sampled_from(_WORDS), st.text(max_size=5), path).map(
        lambda text: text.replace("\0", "")
    )
    known = {name: options(name) for name in COMMANDS}

    @st.composite
    def line(draw: Callable[..., Any]) -> list[str]:
        name = draw(st.sampled_from(tuple(COMMANDS)))
        outputs, values, flags = known[name]
        arguments = [name]
        for item in COMMANDS[name]:
            right = item.format(**pool)
            arguments.append(right if draw(st.integers(0, 9)) else draw(value))
        for option in outputs:
            if draw(st.booleans()):
                arguments += [option, draw(path)]
        for option in draw(st.lists(st.sampled_from(values), max_size=2, unique=True)):
            arguments += [option, draw(value)]
        return arguments + draw(st.lists(st.sampled_from(flags), max_size=2, unique=True))

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
