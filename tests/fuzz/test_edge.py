"""Whatever a user types, passes or has in a file: one line and exit code 2, or success, and no file is harmed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plop_ext.cli.main import build_parser, main
from plop_ext.data import encode, load_rows
from plop_ext.doctor import Finding
from plop_ext.errors import InputError, SetupError
from plop_ext.models import load_model
from plop_ext.scores import Scores
from tests.support.command_lines import COMMANDS, ROWS, command_lines, damaged, make_pool
from tests.support.saved_scores import ranked

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LIMIT = 10.0


def cases(count: int) -> Callable[[Any], Any]:
    """The same `count` cases in every run; Hypothesis shrinks one that fails."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=LIMIT * 1000,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("pool")
    before = Path.cwd()
    os.chdir(folder)
    yield make_pool(folder)
    os.chdir(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("plop-tiny", device="cpu")[1]


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path) -> None:
    """Scoring returns at once; training, streaming and any other use of a model ends there."""
    scores = ranked()

    def load(*_: Any, for_training: bool = False, **__: Any) -> Any:
        if for_training:
            raise SetupError("no model is trained here")
        return None, tokenizer

    def stream(*_: Any, **__: Any) -> Any:
        raise SetupError("no model is streamed here")

    monkeypatch.setattr("plop_ext.models.load_model", load)
    monkeypatch.setattr("plop_ext.scoring.score.score", lambda *_, **__: scores)
    monkeypatch.setattr("plop_ext.streaming.score.score_streaming", stream)
    monkeypatch.setattr("plop_ext.doctor.examine", lambda: [Finding("kernels", "native")])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def contents(pool: dict[str, Path]) -> dict[Path, str]:
    """Hash of every file of the pool, and the kind of everything else."""
    found = {}
    for path in filter(os.path.lexists, [*pool.values(), *pool["folder"].rglob("*")]):
        regular = path.is_file() and not path.is_symlink()
        found[path] = hashlib.sha256(path.read_bytes()).hexdigest() if regular else oct(path.lstat().st_mode)
    return found


def check(arguments: list[str], code: int, errors: str, before: dict[Path, str], pool: dict[str, Path]) -> None:
    """Check how a command ended, and that it changed nothing that it may not."""
    said = errors.strip().splitlines()
    assert code in (0, 2, 3), (code, said[-1:])
    assert "Traceback" not in errors and "defect" not in errors
    if code:
        assert said and (said[-1].startswith("plop: ") or ": error: " in said[-1]), said[-3:]
    after = contents(pool)
    changed = {path for path in before if before[path] != after.get(path)}
    if changed:
        read = {Path(argument).resolve() for argument in arguments[1 : 1 + len(COMMANDS[arguments[0]])]}
        assert "--force" in arguments and not {path.resolve() for path in changed} & read, changed
        for path in changed:
            assert not path.is_symlink() and path.is_file()


@pytest.fixture
def mended(pool: dict[str, Path]) -> Iterator[Callable[[], None]]:
    """A function that makes the pool as it was, and removes what was added."""
    texts = {path: path.read_bytes() for path in contents(pool) if path.is_file() and not path.is_symlink()}
    known = set(contents(pool))

    def mend() -> None:
        for path, text in texts.items():
            if path.read_bytes() != text:
                path.write_bytes(text)
        for path in pool["data"].parent.iterdir():
            if path not in known:
                subprocess.run(["rm", "-rf", "--", path], check=True) if path.is_dir() else path.unlink()

    yield mend
    mend()


def test_command_lines(
    pool: dict[str, Path],
    without_models: None,
    mended: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(pool)

    @cases(5000)
    @given(arguments=command_lines(pool))
    def run(arguments: list[str]) -> None:
        try:
            try:
                code = main(arguments)
            except SystemExit as ended:
                code = int(ended.code or 0)
            check(arguments, code, capsys.readouterr().err, before, pool)
        finally:
            mended()

    run()


@pytest.mark.parametrize(
    ("kind", "command", "count"),
    [
        ("scores", "place", 2000),
        ("scores", "report", 200),
        ("scores", "merge", 200),
        ("placement", "finetune", 600),
        ("placement", "export", 600),
    ],
)
def test_damaged_files(
    kind: str,
    command: str,
    count: int,
    pool: dict[str, Path],
    without_models: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    content, file = json.loads(pool[kind].read_text()), pool["data"].parent / "damaged.json"
    inputs = {**pool, kind: file}

    written = ["-o", str(tmp_path / "merged.json"), "--force"] if command == "merge" else []

    @cases(count)
    @given(changed=damaged(content))
    def run(changed: Any) -> None:
        file.write_text(json.dumps(changed))
        arguments = [command, *(argument.format(**inputs) for argument in COMMANDS[command]), *written]
        code = main(arguments)
        check(arguments, code, capsys.readouterr().err, {}, pool)

    try:
        run()
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_rows(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"

    @cases(500)
    @given(rows=ROWS, noise=st.binary(max_size=6), cut=st.integers(0, 200))
    def run(rows: list[dict[str, Any]], noise: bytes, cut: int) -> None:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        whole = text.encode() if cut > 100 else text.encode()[:cut] + noise + text.encode()[cut:]
        file.write_bytes(whole)
        with suppress(InputError):
            encode(load_rows(str(file)), tokenizer, max_length=32)
        with suppress(InputError):
            encode(rows, tokenizer, max_length=32, mask="completion")

    run()


def test_places() -> None:
    scores = ranked()
    number = st.one_of(st.none(), st.integers(-2, 2**65), st.floats(), st.text(max_size=4), st.booleans())
    choice = st.one_of(
        st.none(), st.sampled_from(["auto", "lowest", "inverse", "inverse-nfn", "all"]), st.text(max_size=3)
    )
    arguments = st.fixed_dictionaries(
        {},
        optional={
            **{
                name: number
                for name in ("modules", "max_nfn", "r", "max_params", "max_memory", "batch", "seq", "seed")
            },
            **{name: choice for name in ("strategy", "ranks")},
            "types": st.one_of(number, choice, st.lists(st.sampled_from(["q_proj", "x", ""]), max_size=3)),
        },
    )

    @cases(1000)
    @given(arguments=arguments)
    def run(arguments: dict[str, Any]) -> None:
        with suppress(InputError):
            placement = scores.place(**arguments)
            assert placement.num_parameters() > 0

    run()


def test_processes(pool: dict[str, Path], mended: Callable[[], None]) -> None:
    """300 of the command lines as a shell would run them, two at a time."""
    lines: list[list[str]] = []

    @cases(300)
    @given(arguments=command_lines(pool).filter(lambda line: line[0] in ("place", "report", "merge", "export")))
    def collect(arguments: list[str]) -> None:
        lines.append(arguments)

    collect()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(pool["folder"].parent)}

    def run(arguments: list[str]) -> tuple[int, str]:
        command = [os.fsencode(part) for part in (sys.executable, "-m", "plop_ext", *arguments)]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=LIMIT, check=False)
        return done.returncode, done.stderr.decode(errors="replace")

    before = contents(pool)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(run, lines[:300]))
    assert len(results) == 300
    for arguments, (code, errors) in zip(lines, results, strict=False):
        assert code in (0, 2), (arguments, errors[-300:])
        assert "Traceback" not in errors and "defect" not in errors, (arguments, errors[-300:])
    after = contents(pool)
    changed = {path for path, text in before.items() if after.get(path) != text}
    assert not changed - {pool["old"], pool["data"], pool["placement"], pool["hard"]}


def test_every_command_is_drawn() -> None:
    assert set(COMMANDS) == set(build_parser()[1])


def test_scores_stay_readable(tmp_path: Path) -> None:
    """Names of any text survive a file, and are drawn."""

    @cases(100)
    @given(name=st.text(min_size=1, max_size=8))
    def run(name: str) -> None:
        scores = ranked(types=(name, "k_proj", "v_proj"))
        scores.save(tmp_path / "s.json", overwrite=True)
        with suppress(InputError):
            assert Scores.load(tmp_path / "s.json").types == scores.types

    run()
