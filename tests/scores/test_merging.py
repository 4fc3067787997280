"""Runs over different data of one model add up, and single samples can be looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plop_ext import reference
from plop_ext.errors import InputError
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from tests.support.architecture_parts import text_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.gain_tables import scores, table
from tests.support.tiny_models import llama, token_batch


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


def test_damaged_modules_with_too_few_tokens_are_refused(tmp_path: Path) -> None:
    model, batch = ARCHITECTURES["qwen3_moe"].build(), text_batch()
    found = score(model, [{key: value[:1] for key, value in batch.items()}], progress=False)
    assert found.few_tokens is not None
    found.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    for positions in ([0] * len(found.few_tokens.modules), [], [10**6] * len(found.few_tokens.modules)):
        content["few_tokens"]["positions"] = positions
        (tmp_path / "s.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="is a damaged scores file"):
            Scores.load(tmp_path / "s.json")


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


def test_a_sample_twice_is_named() -> None:
    with pytest.raises(InputError, match="sample 2 of `toy` is in scores 1 and 2"):
        Scores.merge([run(shards()[:2], data_name="toy"), run(shards()[1:], data_name="toy")])
    with pytest.raises(InputError, match="sample 0 of unnamed data is in scores 1 and 2"):
        Scores.merge([run(shards()[:1]), run(shards()[:1])])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scores(table([0.5, 1.0, 2.0]), first_id=50), "hold other modules than the first"),
        (scores(table([0.5, 1.0]), first_id=50, parameters=7), "are of another model: parameters 7, not 1000000"),
        (scores(table([0.5, 1.0]), first_id=50, **{"class": "Other"}), "are of another model: class Other, not Toy"),
    ],
)
def test_another_model_is_refused(other: Scores, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scores.merge([scores(table([0.5, 1.0])), other])


def test_other_settings_and_weights_are_refused() -> None:
    first, second = scores(table([0.5, 1.0])), scores(table([0.5, 1.0]), first_id=50)
    settings = {**second.provenance["settings"], "mask": "completion"}
    with pytest.raises(InputError, match="scores 2 have mask=completion, the first mask=attention"):
        Scores.merge([first, replace(second, provenance={**second.provenance, "settings": settings})])
    modules = (replace(second.modules[0], baseline=1.01), *second.modules[1:])
    with pytest.raises(InputError, match=r"another weight in `layers\.0\.a`"):
        Scores.merge([first, replace(second, modules=modules)])
    with pytest.raises(InputError, match="got no scores"):
        Scores.merge([])


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
    gains = (x @ weight.T).norm(dim=-1) / x.norm(dim=-1) / (weight.norm() / 8**0.5)
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
