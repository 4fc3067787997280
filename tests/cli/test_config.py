"""Options from plop.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from plop_ext.cli.config import with_config
from plop_ext.cli.main import build_parser, main
from plop_ext.errors import InputError

PARSER, COMMANDS = build_parser()
SCORE = ["score", "model", "data"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(text: str, *arguments: str) -> dict[str, object]:
    Path("plop.toml").write_text(text)
    return vars(PARSER.parse_args(with_config(arguments or SCORE, COMMANDS)))


def test_without_a_file_nothing_changes() -> None:
    assert with_config(SCORE, COMMANDS) == SCORE


def test_options_of_the_command_and_of_all_commands() -> None:
    found = parsed(
        '[plop]\nseed = 3\nrank = 4\n[score]\nbatch-size = 2\nfast = true\ngraph = false\nmask = "completion"\n'
    )
    assert (found["seed"], found["batch_size"], found["mask"]) == (3, 2, "completion")
    assert found["fast"] is True and found["graph"] is False


def test_what_a_file_sets_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parsed("[score]\nbatch-size = 2\nfast = true\n")
    assert capsys.readouterr().err == "plop: from plop.toml: --batch-size=2 --fast\n"
    parsed("[place]\nrank = 2\n")
    assert capsys.readouterr().err == ""


def test_lists_and_tables_are_what_the_option_takes() -> None:
    found = parsed('[score]\ninclude = ["q_proj", "k_proj"]\ncolumns = {prompt = "question", completion = "answer"}\n')
    assert found["include"] == ["q_proj", "k_proj"]
    assert found["columns"] == {"prompt": "question", "completion": "answer"}
    assert parsed('[place]\ntypes = ["a", "b"]\n', "place", "s.json")["types"] == "a,b"


def test_the_command_line_wins_and_the_command_over_all() -> None:
    text = '[plop]\nseed = 3\ninclude = ["a"]\n[score]\nseed = 4\n'
    assert parsed(text)["seed"] == 4
    found = parsed(text, *SCORE, "--seed", "5", "--include=b")
    assert found["seed"] == 5 and found["include"] == ["b"]


def test_another_file_can_be_named() -> None:
    Path("plop.toml").write_text("[score]\nseed = 1\n")
    Path("other.toml").write_text("[score]\nseed = 2\n")
    assert vars(PARSER.parse_args(with_config([*SCORE, "--config", "other.toml"], COMMANDS)))["seed"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[score", "is no TOML"),
        ("seed = 1\n", "`seed` is no table of options; there are [plop], ["),
        ("[scor]\nseed = 1\n", "`scor` is no table of options"),
        ("[score]\nsede = 1\n", "plop score has no option `sede`"),
        ("[plop]\nsede = 1\n", "plop score has no option `sede`"),
        ("[score]\nfast = 1\n", "`fast` must be true or false, got 1"),
        ("[score]\nseed = true\n", "`seed` needs a value, got True"),
        ("[score]\ntrust-remote-code = true\n", "can only be given on the command line"),
        ("[plop]\nforce = true\n", "can only be given on the command line"),
    ],
)
def test_mistakes_name_the_file(text: str, said: str) -> None:
    with pytest.raises(InputError, match=r"plop\.toml") as error:
        parsed(text)
    assert said in str(error.value)


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SCORE, "--config", "none.toml"]) == 2
    assert "cannot read `none.toml`" in capsys.readouterr().err
