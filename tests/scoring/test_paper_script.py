"""`compat="paper-script"` against the published script's algorithm, written here again from its description."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import Scores
from plop_ext.score_data.paper_script import PAPER_GROUPS
from tests.support import tiny_models
from tests.support.tiny_models import Plain, token_batch

BATCHES = [token_batch([20, 31, 17]), token_batch([9], seed=1), token_batch([40, 12], side="left", seed=2)]


def published(model: nn.Module, batches: Sequence[Any], noise: bool = False) -> dict[str, float]:
    """Each module's `actual` or, with noise for inputs, `random`.

    Of each batch the last call counts, with every row of it (padding too); of all batches, the plain mean.
    """
    values: dict[str, list[float]] = {}
    for batch in batches:
        last: dict[str, float] = {}

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str, last: Any = last) -> None:
            z = args[0].reshape(-1, args[0].shape[-1]).float()
            z = torch.randn_like(z) if noise else z
            z = z / (z.norm(dim=1, keepdim=True) + 1e-8)
            weight = module.weight.float()
            weight = weight / (weight.pow(2).mean().sqrt() + 1e-8)
            last[name] = (z @ weight.T).norm(dim=1).mean().item() / weight.shape[1]

        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                named = lambda m, a, o, name=name, hook=hook: hook(m, a, o, name)  # noqa: E731
                handles.append(module.register_forward_hook(named))
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
        for handle in handles:
            handle.remove()
        for name, value in last.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def score(model: nn.Module, batches: Sequence[Any], **settings: Any) -> Scores:
    return plop_ext.score(model, batches, compat="paper-script", progress=False, **settings)


@pytest.fixture(scope="module")
def llama_scores() -> Scores:
    return score(tiny_models.llama(), BATCHES, probes=4096)


def test_actual_equals_the_scripts_for_every_module_and_the_head(llama_scores: Scores) -> None:
    expected = published(tiny_models.llama(), BATCHES)
    metrics = llama_scores.paper_metrics()
    assert set(metrics) == set(expected) and "lm_head" in metrics
    for name, value in expected.items():
        assert metrics[name]["actual"] == pytest.approx(value, rel=1e-5)


def test_random_is_the_expectation_of_the_scripts_noise(llama_scores: Scores) -> None:
    noise = [token_batch([512], seed=seed) for seed in range(8)]
    expected = published(tiny_models.llama(max_position_embeddings=512), noise, noise=True)
    for name, values in llama_scores.paper_metrics().items():
        assert values["random"] == pytest.approx(expected[name], rel=5e-3)


def test_the_difference_from_the_script_is_within_the_scripts_own_noise() -> None:
    """Two runs of the script differ by the noise that it draws; ours, with few probes, differ by no more from it."""
    model = tiny_models.llama(max_position_embeddings=512, hidden_size=128, intermediate_size=192)
    data = [token_batch([512], seed=seed) for seed in range(4)]
    runs = [list(published(model, data, noise=True).values()) for _ in range(4)]
    ours = [values["random"] for values in score(model, data).paper_metrics().values()]
    from_script = [np.abs(np.divide(ours, run) - 1) for run in runs]
    of_script = [np.abs(np.divide(one, other) - 1) for one, other in itertools.combinations(runs, 2)]
    assert np.median(from_script) < np.median(of_script)
    assert np.max(from_script) < np.max(of_script)


@pytest.mark.parametrize("seed", range(3))
def test_random_is_the_exact_expectation_within_a_thousandth(seed: int) -> None:
    model = nn.Sequential(nn.Linear(192, 160), nn.Linear(160, 192))
    with torch.no_grad():
        model[1].weight.mul_(torch.linspace(0.1, 3, 192)[:, None])  # badly conditioned
    metrics = score(model, [torch.randn(2, 20, 192)], seed=seed).paper_metrics()
    for name, values in metrics.items():
        weight = model[int(name)].weight.detach().double()
        u = nn.functional.normalize(torch.randn(20_000, weight.shape[1], dtype=torch.float64))
        squares = (u @ weight.T).square().sum(dim=1)
        expected = squares.sqrt().mean() - (squares.mean() - weight.square().sum() / len(u[0])) / (
            2 * squares.mean().sqrt()
        )
        scale = weight.square().mean().sqrt() * weight.shape[1]
        assert values["random"] == pytest.approx(float(expected / scale), rel=1e-3)


def test_types_are_substrings_and_ratios_of_sums(llama_scores: Scores) -> None:
    actual = published(tiny_models.llama(), BATCHES)
    random = {name: values["random"] for name, values in llama_scores.paper_metrics().items()}
    expected = {}
    for group in PAPER_GROUPS:
        members = [name for name in actual if group in name]
        expected[group] = sum(actual[name] for name in members) / sum(random[name] for name in members)
    assert {item.type: item.nfn for item in llama_scores.by_type()} == pytest.approx(expected, rel=1e-5)
    assert llama_scores.types == tuple(sorted(expected, key=lambda group: expected[group]))


def test_substrings_match_other_modules_too() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.old_gate_proj_2 = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.old_gate_proj_2(self.gate_proj(x))

    scores = score(nn.Sequential(Expert()), [torch.randn(2, 20, 16)])
    (group,) = scores.by_type()
    assert (group.type, group.modules) == ("gate_proj", 2)
    assert scores.place(types=1).modules == ("0.gate_proj", "0.old_gate_proj_2")


def test_two_types_are_placed_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.up_proj(self.gate_proj(x))

    scores = score(nn.Sequential(Two()), [torch.randn(2, 20, 16)])
    assert scores.place(types=2).modules == ("0.gate_proj", "0.up_proj")


def test_padding_counts_and_batches_weigh_the_same() -> None:
    model = tiny_models.llama()
    ours = plop_ext.score(model, BATCHES, progress=False)
    script = score(model, BATCHES)
    assert script.tokens == sum(batch["input_ids"].numel() for batch in BATCHES) > ours.tokens
    assert script.provenance["settings"]["mask"] == "all"
    twice = score(model, [*BATCHES, BATCHES[1]])
    assert np.abs(twice.gain / script.gain - 1).max() > 1e-3  # the short batch weighs as much as the long ones


def test_the_last_call_of_a_module_counts_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(torch.relu(self.q_proj(x)))

    model, batches = Twice(), [torch.randn(3, 20, 16), torch.randn(1, 9, 16)]
    metrics = score(model, batches).paper_metrics()
    assert metrics["q_proj"]["actual"] == pytest.approx(published(model, batches)["q_proj"], rel=1e-5)


def test_zero_inputs_are_gains_of_zero() -> None:
    batch = torch.randn(2, 20, 16)
    batch[0, :7] = 0
    model = nn.Sequential(nn.Linear(16, 16))
    metrics = score(model, [batch]).paper_metrics()
    assert metrics["0"]["actual"] == pytest.approx(published(model, [batch])["0"], rel=1e-5)


def test_a_batch_that_does_not_call_a_module_has_no_part_in_its_mean() -> None:
    class Sometimes(Plain):
        def forward(self, x: Tensor, *unused: Any, **ignored: Any) -> Tensor:
            return super().forward(x) if len(x) > 1 else self.layers[0](x)

    model, batches = Sometimes(), [torch.randn(2, 20, 16), torch.randn(1, 20, 16), torch.randn(3, 20, 16)]
    metrics = score(model, batches).paper_metrics()
    for name, value in published(model, batches).items():
        assert metrics[name]["actual"] == pytest.approx(value, rel=1e-5)


def test_a_model_without_the_scripts_names_cannot_be_placed() -> None:
    scores = score(Plain(), [torch.randn(2, 20, 16)])
    with pytest.raises(
        plop_ext.InputError, match=r"^`scores` has no module type of the published script; score without compat$"
    ):
        scores.place()
