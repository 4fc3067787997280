"""The command line: no abbreviations, one line for a mistake, choices that are the API's, examples that parse."""

from __future__ import annotations

import argparse
import shlex

import pytest

from plop_ext.cli.main import build_parser, main
from plop_ext.layers import SCOPES
from plop_ext.placement.selection import RANKS, STRATEGIES

PARSER, COMMANDS = build_parser()
ALL = pytest.mark.parametrize("command", COMMANDS)


def options(command: str) -> dict[str, argparse.Action]:
    return {option: action for action in COMMANDS[command]._actions for option in action.option_strings}


def mistake(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    [said] = captured.err.splitlines()
    assert captured.out == "" and said.startswith("plop: ")
    return said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "required: COMMAND; see plop --help"),
        ("scor", "invalid choice: 'scor'"),
        ("place s.json --ran 4", "there is no option --ran; did you mean --rank?; see plop place --help"),
        ("place s.json --xyzzy", "there is no option --xyzzy; see plop place --help"),
        ("place s.json --rank x", "--rank: must be a whole number, got 'x'; see plop place --help"),
        ("place s.json --rank 1.5", "must be a whole number, got '1.5'"),
        ("place s.json --max-nfn x", "--max-nfn: must be a number, got 'x'"),
        ("place s.json --strategy best", "invalid choice: 'best'"),
        ("score m d --stop never", "invalid choice: 'never'"),
        ("place", "required: SCORES; see plop place --help"),
    ],
)
def test_a_mistake_is_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in mistake(line, capsys)


@ALL
def test_every_command_has_json_quiet_verbose_and_config(command: str) -> None:
    assert {"--json", "--quiet", "-q", "--verbose", "-v", "--config"} <= set(options(command))


@ALL
def test_examples_parse_and_show_the_command(command: str) -> None:
    epilog = COMMANDS[command].epilog
    assert epilog is not None and epilog.startswith("examples:\n")
    for line in epilog.splitlines()[1:]:
        program, name, *rest = shlex.split(line.partition(">")[0])
        assert (program, name) == ("plop", command)
        COMMANDS[command].parse_args(rest)


@ALL
def test_options_are_in_groups_that_can_be_read(command: str) -> None:
    for group in COMMANDS[command]._action_groups:
        assert len(group._group_actions) <= 10, group.title


def test_choices_are_those_of_the_api() -> None:
    place, score = options("place"), options("score")
    assert tuple(place["--strategy"].choices or ()) == STRATEGIES
    assert (None, *(place["--ranks"].choices or ())) == RANKS
    assert tuple(score["--scope"].choices or ()) == SCOPES


def test_help_is_on_stdout_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["place", "--help"])
    assert ended.value.code == 0 and "examples:" in capsys.readouterr().out
