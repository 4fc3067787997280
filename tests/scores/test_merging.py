"""Runs over different data of one model add up, and single samples can be looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plop_ext import reference
from plop_ext.errors import InputError
from plop_ext.score_data.modules import FEW_ROUTED, few_routed_detail
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from plop_ext.unscored import UnscoredModule
from tests.support.architecture_parts import text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.gain_tables import scores, table
from tests.support.made_scores import TOTALS, few_tokens, made
from tests.support.tiny_models import llama, token_batch
from tests.support.totals import make_totals


def run(batches: list[dict[str, torch.Tensor]], **options: Any) -> Scores:
    torch.manual_seed(0)
    return score(llama(), batches, max_samples=None, progress=False, **options)


def shards() -> list[dict[str, torch.Tensor]]:
    batches = [token_batch([30, 20], seed=0), token_batch([25, 40], seed=1), token_batch([22], seed=2)]
    for start, batch in zip((0, 2, 4), batches, strict=True):
        batch["sample_ids"] = torch.arange(start, start + len(batch["input_ids"]))
    return batches


def test_shards_merged_are_the_whole(tmp_path: Path) -> None:
    whole = run(shards(), data_name="toy")
    merged = Scores.merge([run(shards()[:1], data_name="toy"), run(shards()[1:], data_name="toy")])
    assert merged.totals.values.tobytes() == whole.totals.values.tobytes()
    assert merged.sample_ids.tolist() == whole.sample_ids.tolist() == [0, 1, 2, 3, 4]
    assert merged.sample_batches.tolist() == whole.sample_batches.tolist() == [0, 0, 1, 1, 2]
    assert (merged.nfn == whole.nfn).all()
    assert merged.provenance["data"]["samples"] == 5 and merged.provenance["merged"] == 2
    merged.save(tmp_path / "m.json")
    again = Scores.load(tmp_path / "m.json")
    assert again.sample_data == ("toy",) * 5 and (again.nfn == whole.nfn).all()


def test_the_order_by_ids_does_not_depend_on_the_shards() -> None:
    code, maths = shards(), [token_batch([33, 31], seed=9)]
    whole = run(code, data_name="code")
    cut = [run([code[i]], data_name="code") for i in (2, 0, 1)]
    merged = Scores.merge(cut, order="ids")
    assert merged.totals.values.tobytes() == whole.totals.values.tobytes()
    assert merged.sample_ids.tolist() == [0, 1, 2, 3, 4]
    assert (merged.nfn == whole.nfn).all()
    assert repr(merged.statistics()) == repr(Scores.merge([whole]).statistics())
    mixed = Scores.merge([cut[0], run(maths, data_name="maths"), cut[1], cut[2]], order="ids")
    assert mixed.sample_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert mixed.sample_data == ("code",) * 5 + ("maths",) * 2
    with pytest.raises(InputError, match="`order` must be one of given, ids"):
        Scores.merge(cut, order="rows")


def test_experts_with_too_few_tokens_in_a_shard_count_in_the_whole(tmp_path: Path) -> None:
    """By shard other experts have too few tokens; the merged runs are the run over all, scored and unscored."""
    model, batch = ARCHITECTURES["qwen3_moe"].build(), text_batch()
    with torch.no_grad():  # little goes to expert 2 of layer 0, nothing to expert 3
        weight = model.model.layers[0].mlp.gate.weight
        weight[3] = 0
        weight[:2] *= 20
    single = [
        {"sample_ids": torch.tensor([i]), **{key: value[i : i + 1] for key, value in batch.items()}} for i in range(3)
    ]
    settings = {"max_samples": None, "data_name": "toy", "progress": False}
    whole = score(model, single, **settings)
    parts = [score(model, single[i : i + 1], **settings) for i in range(3)]
    assert any(part.module_names != whole.module_names for part in parts)
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.json")
    for runs in (parts, [Scores.load(tmp_path / f"{number}.json") for number in range(3)]):
        merged = Scores.merge([Scores.merge(runs[:2]), runs[2]])
        assert merged.module_names == whole.module_names and merged.unscored == whole.unscored
        assert merged.totals.values.tobytes() == whole.totals.values.tobytes()
        few, few_of_whole = merged.few_tokens, whole.few_tokens
        assert (few is None) == (few_of_whole is None)
        if few is not None and few_of_whole is not None:
            assert few.modules == few_of_whole.modules and few.positions == few_of_whole.positions
            assert few.totals.values.tobytes() == few_of_whole.totals.values.tobytes()
    assert all(name not in whole.module_names for name in (item.name for item in whole.unscored))


def test_ids_of_two_data_sets_are_different_samples() -> None:
    first = run(shards()[:2], data_name="code")
    second = run([token_batch([33, 31], seed=9)], data_name="maths")
    merged = Scores.merge([first, second])
    assert merged.sample_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert merged.sample_data == ("code",) * 4 + ("maths",) * 2
    assert merged.provenance["data"]["name"] == "code + maths"
    nested = Scores.merge([merged, run([token_batch([20])], data_name="prose")])
    assert nested.sample_data[-1] == "prose" and len(nested.provenance["data"]["parts"]) == 3
    tokens = first.tokens + second.tokens
    assert merged.tokens == tokens
    with pytest.raises(InputError, match="sample 0 of `maths` is in scores 1 and 2: it would count twice"):
        Scores.merge([merged, second])


@pytest.mark.parametrize(("data", "source"), [("toy", "of `toy`"), (None, "of unnamed data")])
def test_a_sample_twice_is_named(data: str | None, source: str) -> None:
    parts = [scores(table([0.5, 1.0], samples=3), data=data, first_id=start) for start in (0, 50, 2)]
    message = (
        f"sample 2 {source} is in scores 1 and 3: it would count twice; merge runs over different samples, or give "
        "each data set its own `data_name`"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Scores.merge(parts)


def changed(**model: Any) -> Scores:
    return scores(table([0.5, 1.0]), first_id=50, **model)


def with_baseline(value: float) -> Scores:
    """Scores in which the second module has another baseline than 1."""
    found = changed()
    return replace(found, modules=(found.modules[0], replace(found.modules[1], baseline=value), *found.modules[2:]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            scores(table([0.5, 1.0, 2.0]), first_id=50),
            "hold other modules than the first (`layers.0.c`); merge runs of one model",
        ),
        (
            replace(changed(), modules=changed().modules[::-1]),
            "hold other modules than the first; merge runs of one model",
        ),
        (changed(parameters=7), "are of another model: parameters 7, not 1000000"),
        (changed(parameters=None), "are of another model: parameters None, not 1000000"),
        (changed(**{"class": "Other"}), "are of another model: class Other, not Toy"),
        *(
            (
                with_baseline(value),
                "have another weight in `layers.1.a` than the first; merge runs of one model",
            )
            for value in (1.00011, 0.99989)
        ),
    ],
)
def test_another_model_is_refused(other: Scores, message: str) -> None:
    parts = [scores(table([0.5, 1.0])), scores(table([0.5, 1.0]), first_id=100)]
    for number in (2, 3):
        with pytest.raises(InputError, match=f"^scores {number} {re.escape(message)}$"):
            Scores.merge([*parts[: number - 1], other])


def test_rounding_errors_of_a_baseline_make_no_other_model() -> None:
    first = scores(table([0.5, 1.0]))
    for value in (1.00009, 0.99991):
        assert Scores.merge([first, with_baseline(value)]).modules == first.modules


def test_other_settings_are_refused() -> None:
    first, second = scores(table([0.5, 1.0])), scores(table([0.5, 1.0]), first_id=50)
    settings = {**second.provenance["settings"], "mask": "completion"}
    message = "scores 2 have mask=completion, the first mask=attention; use the same settings"
    with pytest.raises(InputError, match=f"^{message}$"):
        Scores.merge([first, replace(second, provenance={**second.provenance, "settings": settings})])
    with pytest.raises(InputError, match=r"^`merge` got no scores; give at least one$"):
        Scores.merge([])


def test_the_merged_provenance_adds_up() -> None:
    unnamed = {"name": None, "samples": 2}
    common = {**made().provenance, "stop": {"settled": True}, "host": "first"}
    first = made(provenance={**common, "data": {"name": "a", "hash": "f"}, "seconds": 1.23456})
    second = made(sample_ids=np.array([8, 9]), provenance={**common, "data": unnamed, "seconds": 2, "host": "second"})
    third = made(sample_ids=np.array([4, 5]), provenance={**common, "data": {"name": "a"}, "seconds": 0.5})
    merged = Scores.merge([Scores.merge([first, second]), third]).provenance
    parts = ({"name": "a", "hash": "f", "samples": 2}, unnamed, {"name": "a", "samples": 2})
    assert merged == {
        **{"settings": {"compat": None}, "model": {"class": "Made"}, "host": "first", "merged": 2, "seconds": 3.735},
        "data": {"name": "a", "samples": 6, "parts": parts},
    }
    assert Scores.merge([second]).provenance["data"] == {"name": None, "samples": 2, "parts": (unnamed,)}
    untimed = Scores.merge([first, made(sample_ids=np.array([4, 5]))]).provenance
    assert "seconds" not in untimed and untimed["merged"] == 2


def test_batches_are_numbered_on() -> None:
    parts = [
        made(sample_ids=np.array([i, i + 1]), sample_batches=np.array(batches))
        for i, batches in ((0, [0, 2]), (2, [1, 0]), (4, [0, 0]))
    ]
    merged = Scores.merge(parts)
    assert merged.sample_batches.tolist() == [0, 2, 4, 3, 5, 5] and merged.sample_ids.tolist() == list(range(6))
    np.testing.assert_array_equal(merged.totals, np.concatenate([TOTALS] * 3, axis=1))


def routed(ids: Sequence[int], *tokens: Sequence[float]) -> Scores:
    """The scores of `made`, whose two experts saw too few tokens: these in each sample."""
    unscored = (
        UnscoredModule("lm_head", "Linear", "outside the repeated blocks", "", False),
        *(
            UnscoredModule(f"layers.0.experts.{i}", "Linear", FEW_ROUTED, few_routed_detail(sum(counts)))
            for i, counts in enumerate(tokens)
        ),
    )
    few = few_tokens(totals=make_totals(2, 2, sum_gain=np.array(tokens) * 2, tokens=np.array(tokens)))
    return made(sample_ids=np.array(ids), few_tokens=few, unscored=unscored)


def test_an_expert_is_scored_from_16_tokens_of_all_runs_on() -> None:
    merged = Scores.merge([routed([0, 1], [1, 2], [0, 0]), routed([2, 3], [9, 4], [12, 3])])
    assert merged.module_names == ("layers.0.experts.0", *made().module_names)
    assert merged.totals.tokens[0].tolist() == [1, 2, 9, 4] and merged.nfn[0] == 2
    np.testing.assert_array_equal(merged.totals.values[1:], np.concatenate([TOTALS] * 2, axis=1))
    assert merged.few_tokens is not None and merged.few_tokens.positions == (2,)
    assert [module.name for module in merged.few_tokens.modules] == ["layers.0.experts.1"]
    assert merged.few_tokens.totals.tokens.tolist() == [[0, 0, 12, 3]]
    assert merged.unscored == (
        UnscoredModule("lm_head", "Linear", "outside the repeated blocks", "", False),
        UnscoredModule("layers.0.experts.1", "Linear", FEW_ROUTED, "15 of at least 16"),
    )
    whole = Scores.merge([routed([4, 5], [0, 0], [1, 0]), merged])
    first, q, second, *rest = whole.module_names
    assert (first, second) == ("layers.0.experts.0", "layers.0.experts.1") and whole.few_tokens is None
    assert (q, *rest) == made().module_names
    assert whole.unscored == merged.unscored[:1] and whole.totals.tokens[2].tolist() == [1, 0, 0, 0, 12, 3]


def test_per_sample_is_the_score_of_the_sample_alone() -> None:
    batches = shards()
    found = run(batches, data_name="toy").per_sample()
    model = llama()
    assert found.nfn.shape == (len(found.modules), 5) == found.nfn_std.shape == found.tokens.shape
    position = 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            alone = {key: batch[key][row : row + 1] for key in ("input_ids", "attention_mask")}
            expected = reference.nfn(model, [alone], found.modules)
            np.testing.assert_allclose(found.nfn[:, position], list(expected.values()), rtol=1e-4)
            assert set(found.tokens[:, position]) == {int(batch["attention_mask"][row].sum())}
            position += 1
    for place, label in enumerate(found.types):
        members = [i for i, name in enumerate(found.modules) if name.endswith(label)]
        np.testing.assert_allclose(found.type_nfn[place], found.nfn[members].mean(axis=0))
    assert found.ids.tolist() == [0, 1, 2, 3, 4] and found.data == ("toy",) * 5


def test_per_sample_spread_is_the_one_over_tokens() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(8, 6, bias=False)])[0])
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([linear])})
    model.forward = lambda x: model["layers"][0](x)  # type: ignore[method-assign]
    x = torch.randn(3, 20, 8)
    found = score(model, [x], max_samples=None, progress=False).per_sample()
    weight = linear[0].weight.detach()
    gains = (x @ weight.T).norm(dim=-1) / x.norm(dim=-1) / reference.mean_gain(weight)
    np.testing.assert_allclose(found.nfn[0], gains.mean(dim=1), rtol=1e-5)
    np.testing.assert_allclose(found.nfn_std[0], gains.std(dim=1, correction=0), rtol=1e-4)


def test_samples_without_tokens_are_nan_not_zero() -> None:
    source = table([0.5, 2.0], layers=2, samples=3)
    source.tokens[:, 1] = 0
    source.sum_gain[:, 1] = 0
    found = scores(source).per_sample()
    assert np.isnan(found.nfn[:, 1]).all() and np.isnan(found.type_nfn[:, 1]).all()
    assert np.isfinite(found.nfn[:, [0, 2]]).all()


def test_the_file_says_how_sure_it_is(tmp_path: Path) -> None:
    found = scores(table([0.8, 1.0, 1.01, 1.5], own_layer_sd=0.05))
    found.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    statistics = content["statistics"]
    assert statistics["k"] == 3 and statistics["resamples"] == 1000
    assert {"kendall_tau_samples", "kendall_tau_layers", "ties", "auto", "signal"} <= statistics.keys()
    low, high = statistics["types"][0]["over_layers"]
    assert low < statistics["types"][0]["nfn"] < high
    low, high = content["modules"][0]["nfn_interval"]
    assert low < found.nfn[0] < high
    assert Scores.load(tmp_path / "s.json").statistics().to_dict() == found.statistics().to_dict()
    one = scores(table([0.8, 1.5], samples=1))
    one.save(tmp_path / "one.json")
    assert "NaN" not in (tmp_path / "one.json").read_text()


def test_statistics_of_the_published_script_do_not_exist() -> None:
    found = run(shards(), compat="paper-script")
    with pytest.raises(InputError, match="have no statistics; score without compat"):
        found.statistics()
    with pytest.raises(InputError, match="`k` must be between 1 and 4"):
        scores(table([0.8, 1.0, 1.01, 1.5])).statistics(k=5)
