"""`Scores`: figures derived from the totals, and the file they are kept in."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plop_ext
from plop_ext import InputError, Scores
from plop_ext.unscored import UnscoredModule
from tests.support import tiny_models
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

TOTALS = make_totals(
    3,
    2,
    sum_gain=[[6.0, 2.0], [8.0, 4.0], [3.0, 0.0]],
    sum_gain_sq=[[20.0, 4.0], [40.0, 16.0], [9.0, 0.0]],
    tokens=[[2.0, 2.0], [4.0, 2.0], [1.0, 0.0]],
    skipped_zero=[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
    skipped_nonfinite=[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
)


def made(compat: str | None = None, **changes: Any) -> Scores:
    """Three modules of two types on two samples, with totals that are easily added up."""
    fields: dict[str, Any] = {
        "modules": (
            scored_module("layers.0.q_proj", "q_proj", 0, 4, 8, 0.5, 2.0),
            scored_module("layers.1.q_proj", "q_proj", 1, 4, 8, 2.0, 4.0),
            scored_module("layers.0.up_proj", "up_proj", 0, 4, 16, 1.5, None),
        ),
        "totals": TOTALS,
        "sample_ids": np.array([7, 3]),
        "sample_batches": np.array([0, 1]),
        "unscored": (UnscoredModule("lm_head", "Linear", "outside the repeated blocks"),),
        "provenance": {
            "settings": {"compat": compat},
            "model": {"class": "Made"},
            "data": {"name": None, "samples": 2},
        },
    }
    return Scores(**{**fields, **changes})


@pytest.fixture(scope="module")
def real() -> Scores:
    batch = tiny_models.token_batch([20, 31, 17])
    return plop_ext.score(tiny_models.llama(), [batch], progress=False)


def test_gain_and_nfn_are_means_over_tokens() -> None:
    scores = made()
    assert scores.gain.tolist() == [8 / 4, 12 / 6, 3 / 1]
    assert scores.baseline.tolist() == [0.5, 2.0, 1.5]
    assert scores.nfn.tolist() == [4.0, 1.0, 2.0]
    assert scores.tokens == 6
    assert scores.module_names == ("layers.0.q_proj", "layers.1.q_proj", "layers.0.up_proj")


def test_a_types_nfn_is_the_mean_of_its_modules_lowest_first() -> None:
    up, q = made().by_type()
    assert (up.type, up.nfn, up.modules, up.lowest, up.highest, up.family) == ("up_proj", 2.0, 1, 2.0, 2.0, "mlp")
    assert (q.type, q.nfn, q.modules, q.lowest, q.highest, q.family) == ("q_proj", 2.5, 2, 1.0, 4.0, "attention")
    assert made().types == ("up_proj", "q_proj")


def test_equal_types_are_ordered_by_name() -> None:
    totals = make_totals(3, 2, sum_gain=1, tokens=1)
    modules = tuple(replace(module, baseline=1.0) for module in made().modules)
    assert made(totals=totals, modules=modules).types == ("q_proj", "up_proj")


def test_scores_are_read_only() -> None:
    scores = made()
    for array in (scores.totals.values, scores.totals.tokens, scores.sample_ids, scores.sample_batches):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        scores.totals = TOTALS  # type: ignore[misc]


def test_the_provenance_is_read_only_and_a_copy() -> None:
    given = {"settings": {"compat": None, "include": ["up"]}, "model": {"class": "Made"}, "data": {"name": None}}
    scores = made(provenance=given)
    given["settings"]["compat"] = "paper-script"
    for change in (
        lambda: scores.provenance["settings"].update(compat="paper-script"),
        lambda: scores.provenance["settings"].__setitem__("compat", "paper-script"),
        lambda: scores.provenance.pop("settings"),  # type: ignore[attr-defined]
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    assert scores.gain.tolist() == [8 / 4, 12 / 6, 3 / 1]
    for twin in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert twin.provenance == scores.provenance and json.loads(json.dumps(twin.provenance))


def test_the_scripts_scale_needs_the_weight_norms() -> None:
    with pytest.raises(InputError, match=r"the weight norm of `layers\.0\.up_proj` is unknown"):
        made("paper-script").paper_metrics()
    known = made(modules=tuple(replace(module, weight_norm=2.0) for module in made().modules))
    rms = 2.0 / (4 * 8) ** 0.5
    assert known.paper_metrics()["layers.0.q_proj"] == pytest.approx({"actual": 2 / rms / 4, "random": 0.5 / rms / 4})


@pytest.mark.filterwarnings("ignore:no signal")
def test_round_trip_is_bitwise(real: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    real.save(path)
    loaded = Scores.load(path)
    assert loaded.modules == real.modules and loaded.unscored == real.unscored
    assert loaded.provenance == real.provenance and loaded.by_type() == real.by_type()
    for name in ("totals.values", "sample_ids", "sample_batches", "nfn"):
        ours, theirs = attrgetter(name)(loaded), attrgetter(name)(real)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    everything = len(real.types)
    assert loaded.place(types=everything).types == real.place(types=everything).types
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["again.json", "scores.json"]


def test_samples_without_a_token_and_unknown_norms_survive_the_file(tmp_path: Path) -> None:
    made().save(tmp_path / "scores.json")
    loaded = Scores.load(tmp_path / "scores.json")
    assert loaded.totals.values.tobytes() == TOTALS.values.tobytes() and loaded.modules == made().modules


def test_the_file_says_where_the_scores_come_from(real: Scores) -> None:
    kept = real.provenance
    assert kept["model"]["class"] == "LlamaForCausalLM" and kept["model"]["type"] == "llama"
    assert kept["model"]["dtype"] == "float32" and kept["model"]["parameters"] > 0
    assert kept["data"]["name"] is None and kept["data"]["samples"] == 3 and len(kept["data"]["hash"]) == 32
    assert kept["settings"]["mask"] == "attention" and kept["settings"]["seed"] == 0
    assert kept["settings"]["baseline"] == "frobenius" and kept["settings"]["probes"] is None
    assert kept["backend"] in ("native-cpu", "pytorch")
    assert kept["versions"]["torch"] == torch.__version__ and kept["versions"]["plop_ext"] == plop_ext.__version__


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    made().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        made(provenance={"settings": {"compat": None}, "model": torch}).save(path)
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["scores.json"]
    with pytest.raises(InputError, match=r"cannot write .*; name a writable folder that exists"):
        made().save(tmp_path / "missing" / "scores.json")
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        made().save(tmp_path)


def without(*keys: Any) -> Callable[[Any], None]:
    """An edit that deletes the item at the path `keys`."""

    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


def setting(value: Any, *keys: Any) -> Callable[[Any], None]:
    """An edit that sets the item at the path `keys`."""

    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        without("modules"),
        without("modules", 0, "totals"),
        without("modules", 0, "totals", "tokens"),
        without("modules", 0, "baseline"),
        without("samples", "batches"),
        without("provenance", "settings"),
        setting([], "modules"),
        setting(["a"], "modules"),
        setting(3, "modules"),
        setting([0.0], "modules", 0, "totals", "tokens"),
        setting("x", "modules", 0, "totals", "tokens"),
        setting(1, "modules", 0, "surplus"),
        setting([7], "samples", "ids"),
        setting([0], "samples", "batches"),
        setting([[0], [1]], "samples", "batches"),
        setting("low", "modules", 0, "baseline"),
        setting(math.nan, "modules", 0, "baseline"),
        setting(0, "modules", 0, "baseline"),
        setting(-1.0, "modules", 0, "baseline"),
        setting([None, 1.0], "modules", 0, "totals", "sum_gain"),
        setting([math.inf, 1.0], "modules", 0, "totals", "sum_gain"),
        setting(["6.0", "2.0"], "modules", 0, "totals", "sum_gain"),
        setting([-1.0, 2.0], "modules", 0, "totals", "sum_gain"),
        setting([0.0, 0.0], "modules", 0, "totals", "tokens"),
        setting("4", "modules", 0, "in_features"),
        setting(4.5, "modules", 0, "in_features"),
        setting(0, "modules", 0, "out_features"),
        setting(["4", "8"], "modules", 0, "target", "shape"),
        setting([4], "modules", 0, "target", "shape"),
        setting(0, "modules", 0, "target", "size"),
        setting(None, "modules", 0, "target"),
        setting("q_proj", "modules", 0, "target"),
        setting(3, "modules", 0, "target", "name"),
        setting(0, "modules", 0, "target", "parameter"),
        setting(None, "modules", 0, "target", "refused"),
        setting(1, "modules", 0, "target", "surplus"),
        setting(math.nan, "modules", 0, "weight_norm"),
        setting("x", "modules", 0, "layer"),
        setting(10**30, "modules", 0, "layer"),
        setting(["0", "1"], "samples", "ids"),
        setting([10**30, 0], "samples", "ids"),
        setting([3], "unscored"),
        setting([{"name": 3, "layer_class": "Linear", "reason": "excluded"}], "unscored"),
        without("provenance", "model"),
        without("provenance", "model", "class"),
        without("provenance", "data"),
        without("provenance", "data", "name"),
        without("provenance", "settings", "compat"),
        setting("12", "provenance", "model", "parameters"),
        setting({"settled": True}, "provenance", "stop"),
        setting("3 s", "provenance", "seconds"),
        setting(None, "provenance"),
    ],
)
def test_a_damaged_file(edit: Callable[[Any], None], tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    made().save(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"`.*scores.json` is a damaged scores file; write it again with `plop score`"
    ):
        Scores.load(path)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read `.*`: No such file or directory; name a file written by `plop score`"),
        ("", "is not JSON; name a file written by `plop score`"),
        ('{"format": "plop_ext.sc', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5_000, "is not JSON"),
        ("[1]", "is not a plop_ext.scores file but another JSON file"),
        ('{"a": 1}', "is not a plop_ext.scores file but another JSON file"),
        ('{"format": "plop_ext.placement", "version": 1}', "is not a plop_ext.scores file but plop_ext.placement"),
        (
            '{"format": "plop_ext.scores", "version": 99}',
            "has version 99 of plop_ext.scores, this plop_ext reads version 3; write it again with `plop score`",
        ),
        ('{"format": "plop_ext.scores"}', "has version None of plop_ext.scores"),
    ],
)
def test_another_file(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Scores.load(path)
