"""`Settings`: what runs are asked for, however they run; recorded alike, compared by merges, given by the command."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plop_ext
from plop_ext import InputError, Scores
from plop_ext.cli import options
from plop_ext.cli.main import build_parser
from plop_ext.score_data.settings import MUST_AGREE, NAMES, Settings
from tests.support.checkpoint import saved
from tests.support.gain_tables import scores, table
from tests.support.quiet import quietly, stream_quietly
from tests.support.tiny_models import llama, token_batch

DEFAULTS = {name: item.default for name, item in inspect.signature(plop_ext.score).parameters.items()}
# Other than the default, and as a user may write it.
OTHERS: dict[str, Any] = {
    "mask": "all",
    "baseline": "probe",
    "probes": 8,
    "include": "q_proj",
    "exclude": "up_proj",
    "scope": "all",
    "max_samples": 2,
    "token_step": 2,
    "seed": 5,
}


def settings(**changes: Any) -> Settings:
    return Settings(**{**{name: DEFAULTS[name] for name in NAMES}, "max_samples": 128, **changes})


def test_both_ways_to_score_have_all_settings_with_the_same_defaults() -> None:
    streamed = inspect.signature(plop_ext.score_streaming).parameters
    assert set(NAMES) <= set(DEFAULTS) and set(NAMES) - set(streamed) == {"compat"}
    different = {name for name in NAMES if name in streamed and streamed[name].default != DEFAULTS[name]}
    assert different == {"max_samples"}  # streaming has no stop rule


@pytest.mark.parametrize("name", [name for name in NAMES if name != "compat"])
def test_equal_arguments_are_recorded_alike_in_memory_and_streamed(name: str, tmp_path: Path) -> None:
    model, batch = llama(), token_batch([20, 31])
    given = {"max_samples": None, name: OTHERS[name]}
    if name == "probes":
        given["baseline"] = "probe"
    streamed = stream_quietly(saved(model, tmp_path), [batch], **given)
    whole = quietly(model, [batch], **given)
    assert streamed.provenance["settings"] == whole.provenance["settings"]
    assert streamed.module_names == whole.module_names


def test_runs_in_memory_and_streamed_are_merged_where_a_pattern_is_a_string(tmp_path: Path) -> None:
    model = llama()
    streamed = stream_quietly(saved(model, tmp_path), [token_batch([20, 31])], include="q_proj", data_name="a")
    whole = quietly(model, [token_batch([25], seed=1)], include="q_proj", data_name="b")
    assert streamed.provenance["settings"]["include"] == ("q_proj",)
    assert len(Scores.merge([whole, streamed]).sample_ids) == 3


def test_the_published_script_decides_what_it_decides() -> None:
    asked = settings(compat="paper-script", mask="completion", token_step=8, probes=16).to_dict()
    assert (asked["mask"], asked["baseline"], asked["token_step"], asked["probes"]) == ("all", "probe", 1, 16)
    assert settings().to_dict()["probes"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "some"}, "`mask` must be one of attention, completion, all, got 'some'"),
        ({"baseline": None}, "`baseline` must be one of frobenius, probe, got None"),
        ({"compat": "paper"}, "`compat` must be one of None, paper-script, got 'paper'"),
        ({"max_samples": 0}, "`max_samples` must be at least 1, got 0"),
        ({"token_step": 0}, "`token_step` must be at least 1, got 0"),
        ({"max_samples": 10**20}, "`max_samples` must be at most 1000000, got 100000000000000000000"),
        ({"probes": 10**12}, "`probes` must be at most 16384, got 1000000000000"),
        ({"probes": 1.5}, "`probes` must be a whole number, got 1.5"),
        ({"include": [3]}, "`include` must hold names, got 3"),
        ({"exclude": [None]}, "`exclude` must hold names, got None"),
    ],
)
def test_a_setting_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        settings(**change)


def test_integers_of_numpy_can_be_written_as_json() -> None:
    given = {"max_samples": np.int64(5), "token_step": np.int32(2), "probes": np.int64(7), "seed": np.uint8(3)}
    found = json.loads(json.dumps(settings(baseline="probe", **given).to_dict()))
    assert {name: found[name] for name in given} == {"max_samples": 5, "token_step": 2, "probes": 7, "seed": 3}


def test_patterns_are_recorded_as_tuples_and_no_limit_as_none() -> None:
    assert settings(include="a", exclude="b").to_dict().items() >= {"include": ("a",), "exclude": ("b",)}.items()
    found = settings(include=None, exclude=["a", "b"], max_samples=None, token_step=1, probes=1).to_dict()
    assert (found["include"], found["exclude"], found["max_samples"]) == (None, ("a", "b"), None)
    assert tuple(found) == NAMES and found["compat"] is None


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_refuses_other_settings_of_what_is_measured(name: str) -> None:
    expected = name in ("mask", "baseline", "probes", "include", "exclude", "compat")
    assert (name in MUST_AGREE) == expected
    first, second = scores(table([0.5, 1.0])), scores(table([0.5, 1.0]), first_id=50)
    changed = {**second.provenance["settings"], name: "something else"}
    other = replace(second, provenance={**second.provenance, "settings": changed})
    if expected:
        with pytest.raises(InputError, match=f"scores 2 have {name}=something else, .*; use the same settings"):
            Scores.merge([first, other])
    else:
        Scores.merge([first, other])


def test_the_command_passes_every_setting_on() -> None:
    parser, _ = build_parser()
    given = (
        "--mask completion --baseline probe --probes 8 --include q_proj --exclude up_proj --scope all --token-step 2"
    )
    args = parser.parse_args(["score", "model", "data", *given.split(), "--seed", "5"])
    passed = options.scoring(args)
    assert set(NAMES) - set(passed) == {"max_samples", "compat"}
    assert {name: passed[name] for name in NAMES if name in passed} == {
        "mask": "completion",
        "baseline": "probe",
        "probes": 8,
        "include": ["q_proj"],
        "exclude": ["up_proj"],
        "scope": "all",
        "token_step": 2,
        "seed": 5,
    }
