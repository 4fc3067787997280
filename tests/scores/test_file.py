"""The file that scores are kept in: what `save` writes, and what `load` reads and refuses."""

from __future__ import annotations

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plop_ext
from plop_ext.errors import InputError
from plop_ext.scores import Scores
from plop_ext.totals import TOTALS_FIELDS
from plop_ext.unscored import UnscoredModule
from tests.support import tiny_models
from tests.support.made_scores import TOTALS, few_tokens, made

GONE = object()
STOP = {
    "available": 2,
    "stability": None,
    "settled": False,
    "settled_at": None,
    "samples": 2,
    "types": None,
    "modules": None,
}


@pytest.fixture(scope="module")
def real() -> Scores:
    batch = tiny_models.token_batch([20, 31, 17])
    return plop_ext.score(tiny_models.llama(), [batch], progress=False)


def saved(scores: Scores, path: Path) -> Any:
    scores.save(path)
    return json.loads(path.read_text())


def edited(folder: Path, *edits: tuple[str, Any]) -> Path:
    """A file of `made` with few tokens in which the items at these paths, with dots, are set or `GONE`."""
    path = folder / "scores.json"
    content = saved(made(few_tokens=few_tokens()), path)
    for place, value in edits:
        *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        item = content
        for key in parents:
            item = item[key]
        if value is GONE:
            del item[last]
        else:
            item[last] = value
    path.write_text(json.dumps(content))
    return path


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


def test_unscored_modules_few_tokens_and_unknown_norms_survive_the_file(tmp_path: Path) -> None:
    unscored = (UnscoredModule("a", "Linear", "excluded", "by name", wanted=False), *made().unscored)
    known = made(few_tokens=few_tokens(), unscored=unscored)
    known.save(tmp_path / "scores.json")
    loaded = Scores.load(tmp_path / "scores.json")
    assert loaded.totals.values.tobytes() == TOTALS.values.tobytes() and loaded.modules == known.modules
    assert loaded.unscored == unscored
    assert loaded.few_tokens is not None and known.few_tokens is not None
    assert loaded.few_tokens.modules == known.few_tokens.modules and loaded.few_tokens.positions == (0, 2)
    assert loaded.few_tokens.totals.values.tobytes() == known.few_tokens.totals.values.tobytes()


def test_the_file_says_where_the_scores_come_from(real: Scores) -> None:
    kept = real.provenance
    assert kept["model"]["class"] == "LlamaForCausalLM" and kept["model"]["type"] == "llama"
    assert kept["model"]["dtype"] == "float32" and kept["model"]["parameters"] > 0
    assert kept["data"]["name"] is None and kept["data"]["samples"] == 3 and len(kept["data"]["hash"]) == 32
    assert kept["settings"]["mask"] == "attention" and kept["settings"]["seed"] == 0
    assert kept["settings"]["baseline"] == "frobenius" and kept["settings"]["probes"] is None
    assert kept["backend"] in ("native-cpu", "pytorch")
    assert kept["versions"]["torch"] == torch.__version__ and kept["versions"]["plop_ext"] == plop_ext.__version__


def test_the_file_holds_the_totals_and_what_follows_from_them(tmp_path: Path) -> None:
    scores = made(few_tokens=few_tokens())
    content = saved(scores, tmp_path / "scores.json")
    assert list(content) == [
        *("format", "version", "provenance", "types", "statistics"),
        *("samples", "modules", "unscored", "few_tokens"),
    ]
    assert content["format"] == "plop_ext.scores" and content["version"] == 4
    assert content["provenance"] == scores.provenance
    assert [score["type"] for score in content["types"]] == ["up_proj", "q_proj"]
    assert content["types"][1] == {
        **{"type": "q_proj", "nfn": 2.5, "modules": 2, "lowest": 1.0, "highest": 4.0, "family": "attention"},
        "no_place": "",
    }
    assert content["statistics"] == json.loads(json.dumps(scores.statistics().to_dict()))
    assert content["samples"] == {"ids": [7, 3], "batches": [0, 1]}
    assert content["modules"][0] == {
        **{"name": "layers.0.q_proj", "type": "q_proj", "layer": 0, "in_features": 4, "out_features": 8},
        **{"baseline": 0.5, "weight_norm": 2.0, "kind": "linear", "baseline_from": "weight"},
        "no_place": "",
        "target": {"name": "layers.0.q_proj", "parameter": False, "size": 12, "shape": [4, 8], "refused": ""},
        "totals": {
            **{"sum_gain": [6.0, 2.0], "sum_gain_sq": [20.0, 4.0], "tokens": [2.0, 2.0]},
            **{"skipped_zero": [0.0, 1.0], "skipped_nonfinite": [1.0, 0.0]},
        },
        "nfn_interval": scores.statistics().module_intervals[0].tolist(),
    }
    (unscored,) = content["unscored"]
    assert unscored == {
        **{"name": "lm_head", "layer_class": "Linear", "reason": "outside the repeated blocks"},
        **{"detail": "", "wanted": True},
    }
    few = content["few_tokens"]
    assert few["positions"] == [0, 2] and [entry["name"][-1] for entry in few["modules"]] == ["0", "1"]
    assert few["modules"][0]["totals"]["tokens"] == [2.0, 1.0] and "nfn_interval" not in few["modules"][0]
    text = (tmp_path / "scores.json").read_text()
    assert text.startswith('{\n "format": "plop_ext.scores",\n "version": 4,\n') and text.endswith("\n}\n")


def test_one_sample_has_no_intervals_and_the_published_script_no_statistics(tmp_path: Path) -> None:
    data = {"name": None, "samples": 1}
    one = made(
        totals=TOTALS.of_samples([0]),
        sample_ids=np.array([7]),
        sample_batches=np.array([0]),
        provenance={**made().provenance, "data": data},
    )
    content = saved(one, tmp_path / "one.json")
    assert content["statistics"] is not None and "nfn_interval" not in content["modules"][0]
    modules = made().modules[:2]
    script = saved(made("paper-script", modules=modules, totals=TOTALS.of_modules([0, 1])), tmp_path / "script.json")
    assert script["statistics"] is None and script["few_tokens"] is None and "nfn_interval" not in script["modules"][0]
    assert Scores.load(tmp_path / "script.json").paper_script


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


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("modules", GONE),
        ("modules", []),
        ("modules", ["a"]),
        ("modules", 3),
        ("modules.0.surplus", 1),
        ("modules.0.totals", GONE),
        ("modules.0.totals.tokens", GONE),
        ("modules.0.totals.tokens", [0.0]),
        ("modules.0.totals.tokens", "x"),
        ("modules.0.totals.tokens", [0.0, 0.0]),
        ("modules.0.totals.sum_gain", [None, 1.0]),
        ("modules.0.totals.sum_gain", [math.inf, 1.0]),
        ("modules.0.totals.sum_gain", ["6.0", "2.0"]),
        ("modules.0.totals.sum_gain", [-1.0, 2.0]),
        ("modules.0.totals.sum_gain_sq", [math.nan, 1.0]),
        ("modules.0.totals.skipped_zero", [0.0, -1.0]),
        ("modules.0.baseline", GONE),
        ("modules.0.baseline", "low"),
        ("modules.0.baseline", math.nan),
        ("modules.0.baseline", 0),
        ("modules.0.baseline", -1.0),
        ("modules.0.baseline", True),
        ("modules.0.baseline", 1e-310),
        ("modules.0.in_features", "4"),
        ("modules.0.in_features", 4.5),
        ("modules.0.in_features", True),
        ("modules.0.in_features", 0),
        ("modules.0.out_features", 0),
        ("modules.0.out_features", None),
        ("modules.0.name", 3),
        ("modules.0.type", 3),
        ("modules.0.kind", None),
        ("modules.0.baseline_from", None),
        ("modules.0.weight_norm", math.nan),
        ("modules.0.weight_norm", "2"),
        ("modules.0.layer", "x"),
        ("modules.0.layer", True),
        ("modules.0.layer", 1.0),
        ("modules.0.layer", 2**31),
        ("modules.0.layer", -(2**31)),
        ("modules.0.layer", 10**30),
        ("modules.0.target", None),
        ("modules.0.target", "q_proj"),
        ("modules.0.target.surplus", 1),
        ("modules.0.target.name", 3),
        ("modules.0.target.parameter", 0),
        ("modules.0.target.size", 0),
        ("modules.0.target.shape", ["4", "8"]),
        ("modules.0.target.shape", [4]),
        ("modules.0.target.refused", None),
        ("samples", GONE),
        ("samples.batches", GONE),
        ("samples.batches", [0]),
        ("samples.batches", [[0], [1]]),
        ("samples.batches", [0.0, 1.0]),
        ("samples.ids", [7]),
        ("samples.ids", ["0", "1"]),
        ("samples.ids", [7.0, 3.0]),
        ("samples.ids", [10**30, 0]),
        ("unscored", GONE),
        ("unscored", [3]),
        ("unscored.0.surplus", 1),
        ("unscored.0.name", 3),
        ("unscored.0.layer_class", 3),
        ("unscored.0.reason", None),
        ("unscored.0.detail", None),
        ("unscored.0.wanted", 1),
        ("few_tokens", GONE),
        ("few_tokens.modules", []),
        ("few_tokens.modules.0.out_features", 0),
        ("few_tokens.modules.0.baseline", 0),
        ("few_tokens.modules.0.totals.tokens", [2.0]),
        ("few_tokens.modules.0.totals.tokens", [2.0, -1.0]),
        ("few_tokens.modules.1.totals.sum_gain", [0.0, math.inf]),
        ("few_tokens.positions", []),
        ("few_tokens.positions", [0, 2, 3]),
        ("few_tokens.positions", [0, 0]),
        ("few_tokens.positions", [0, 0, 2]),
        ("few_tokens.positions", [-1, 2]),
        ("few_tokens.positions", [0, 5]),
        ("few_tokens.positions", [False, 2]),
        ("few_tokens.positions", [0.0, 2]),
        ("provenance", None),
        ("provenance.model", GONE),
        ("provenance.model.class", GONE),
        ("provenance.model.class", 3),
        ("provenance.model.parameters", "12"),
        ("provenance.model.weight_bytes", 12.0),
        ("provenance.data", GONE),
        ("provenance.data.name", GONE),
        ("provenance.data.name", 3),
        ("provenance.data.parts", [{"name": 3, "samples": 2}]),
        ("provenance.data.parts", [{"name": "a", "samples": 2}, {"name": "b", "samples": 1}]),
        ("provenance.data.samples", 2.0),
        ("provenance.data.samples", None),
        ("provenance.settings", GONE),
        ("provenance.settings.compat", GONE),
        ("provenance.settings.compat", "other"),
        ("provenance.seconds", "3 s"),
        ("provenance.seconds", math.inf),
        ("provenance.stop", {"settled": True}),
        *(("provenance.stop", {key: value for key, value in STOP.items() if key != missing}) for missing in STOP),
        ("provenance.stop", {**STOP, "stability": "0.9"}),
        ("provenance.stop", {**STOP, "settled_at": "16"}),
    ],
)
def test_a_damaged_file(place: str, value: Any, tmp_path: Path) -> None:
    path = edited(tmp_path, (place, value))
    with pytest.raises(InputError) as refused:
        Scores.load(path)
    assert str(refused.value) == f"`{path}` is a damaged scores file; write it again with `plop score`"


def test_the_published_script_scores_no_module_without_a_counted_token_either(tmp_path: Path) -> None:
    totals = {**{name: [0.0, 0.0] for name in TOTALS_FIELDS}, "skipped_zero": [1.0, 1.0]}
    path = edited(tmp_path, ("modules.0.totals", totals), ("provenance.settings.compat", "paper-script"))
    with pytest.raises(InputError, match="is a damaged scores file"):
        Scores.load(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("modules.0.totals.sum_gain", [0.0, 0.0]),
        ("modules.0.totals.tokens", [0.0, 1.0]),
        ("modules.0.baseline", 1),
        ("modules.0.in_features", 1),
        ("modules.0.weight_norm", 0),
        ("modules.0.layer", None),
        ("modules.0.layer", 2**31 - 1),
        ("modules.0.layer", 1 - 2**31),
        ("modules.0.nfn_interval", GONE),
        ("unscored", []),
        ("few_tokens.positions", [4, 0]),
        ("provenance.model.parameters", None),
        ("provenance.model.weight_bytes", 12),
        ("provenance.data.name", "toy"),
        ("provenance.data.parts", [{"name": "toy", "samples": 1}, {"name": None, "samples": 1}]),
        ("provenance.settings.compat", "paper-script"),
        ("provenance.seconds", None),
        ("provenance.seconds", 3),
        ("provenance.stop", None),
        ("provenance.stop", STOP),
        ("provenance.stop", {**STOP, "stability": 0.9, "settled_at": 16, "surplus": "x"}),
    ],
)
def test_a_file_with_values_at_the_edge_of_what_is_allowed(place: str, value: Any, tmp_path: Path) -> None:
    Scores.load(edited(tmp_path, (place, value)))


def test_whole_numbers_are_read_as_sums(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    content = saved(made(), path)
    for module in content["modules"]:
        module["totals"] = {name: [int(value) for value in values] for name, values in module["totals"].items()}
    path.write_text(json.dumps(content))
    loaded = Scores.load(path)
    assert loaded.totals.values.dtype == np.float64 and loaded.totals.values.tobytes() == TOTALS.values.tobytes()
    assert loaded.sample_ids.dtype == loaded.sample_batches.dtype == np.int64


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read `.*`: No such file or directory; name a file written by `plop score`$"),
        ("", "is not JSON; name a file written by `plop score`$"),
        ('{"format": "plop_ext.sc', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5_000, "is not JSON"),
        ("[1]", "is not a plop_ext.scores file but another JSON file"),
        ('{"a": 1}', "is not a plop_ext.scores file but another JSON file"),
        ('{"format": "plop_ext.placement", "version": 1}', "is not a plop_ext.scores file but plop_ext.placement"),
        (
            '{"format": "plop_ext.scores", "version": 3}',
            "has version 3 of plop_ext.scores, this plop_ext reads version 4; write it again with `plop score`$",
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
