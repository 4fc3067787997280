"""What may predict where adapters help, by module: NFN, weights, inputs, gradients, first steps of finetuning."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import plop_ext
from benchmarks.placement.encode import Encoded, whole
from benchmarks.placement.models import linear_modules, type_of
from benchmarks.placement.settings import Settings
from benchmarks.placement.train import Group, Slot, frozen_copy

Features = dict[str, dict[str, float]]
_BATCH = 64


def text_examples(tokens: Tensor, settings: Settings) -> Encoded:
    """Windows of ordinary text in the form of a task: everything counts, nothing is padding."""
    return whole(tokens[: settings.scored * settings.length].view(-1, settings.length))


def nfn_features(model: nn.Module, examples: Encoded) -> Features:
    """NFN as plop_ext scores it: all tokens, the answers' tokens only, and against random inputs instead of ||W||."""
    return {
        "nfn": score_nfn(model, examples),
        "nfn_answer": score_nfn(model, examples, mask="completion"),
        "nfn_probe": score_nfn(model, examples, baseline="probe"),
    }


def weight_features(model: nn.Module) -> Features:
    """Sizes and spectra of the weights."""
    found: Features = {}
    for name, linear in linear_modules(model).items():
        values = torch.linalg.svdvals(linear.weight.detach().double())
        energy = values.square()
        row = {
            "weights": float(linear.weight.numel()),
            "adapter": float(linear.in_features + linear.out_features),
            "weight_norm": float(energy.sum().sqrt()),
            "weight_spectral": float(values[0]),
            "weight_stable_rank": float(energy.sum() / energy[0]),
            "weight_effective_rank": _effective_rank(energy),
            "weight_condition": float(values[0] / values[-1]),
        }
        _put(found, name, row)
    return found


@torch.no_grad()
def input_features(model: nn.Module, examples: Encoded) -> Features:
    """What one forward can stream of the inputs of each module, over the tokens that are no padding."""
    moments: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    keep: list[Tensor] = []

    def read(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0][keep[0]].float()
        counts[name] = counts.get(name, 0) + int((rows != 0).any(1).sum())  # experts see zeros for tokens of others
        moments[name] = moments.get(name, torch.zeros((), device=rows.device)) + rows.t() @ rows
        sums[name] = sums.get(name, torch.zeros((), device=rows.device)) + rows.sum(0)

    with _hooks(model, read):
        for batch in examples.batches(_BATCH):
            keep[:] = [batch["attention_mask"].bool()]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    found: Features = {}
    for name, linear in linear_modules(model).items():
        if not counts[name]:
            continue
        moment, weight = moments[name].double() / counts[name], linear.weight.detach().double()
        energy = torch.linalg.eigvalsh(moment).clamp(min=0)
        passed = weight @ moment @ weight.t()
        gain = passed.trace() / moment.trace()
        row = {
            "input_norm": float(moment.trace().sqrt()),
            "input_effective_rank": _effective_rank(energy),
            "input_participation": float(energy.sum().square() / energy.square().sum()),
            "input_mean_share": float((sums[name].double() / counts[name]).square().sum() / moment.trace()),
            "output_norm": float(passed.trace().sqrt()),
            "output_effective_rank": _effective_rank(torch.linalg.eigvalsh(passed).clamp(min=0)),
            "nfn_energy": float((gain * linear.in_features / weight.square().sum()).sqrt()),
        }
        _put(found, name, row)
    return {feature: _filled(values, model) for feature, values in found.items()}


def gradient_features(model: Any, examples: Encoded) -> Features:
    """Norms of the gradient of the task's loss at the base weights: the price of one backward."""
    weights = {name: linear.weight for name, linear in linear_modules(model).items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in examples.batches(_BATCH):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        for total, gradient in zip(totals.values(), torch.autograd.grad(loss, list(weights.values())), strict=True):
            total += gradient
    model.requires_grad_(False)
    count = int((examples.labels >= 0).sum())
    found: Features = {}
    for name, total in totals.items():
        values = torch.linalg.svdvals(total.double() / count)
        row = {
            "gradient_l1": float(total.abs().sum(dtype=torch.float64) / count),
            "gradient_frobenius": float(values.square().sum().sqrt()),
            "gradient_nuclear": float(values.sum()),
            "gradient_spectral": float(values[0]),
            "gradient_weight_l1": float((total * weights[name].detach()).abs().sum(dtype=torch.float64) / count),
        }
        _put(found, name, row)
    return found


def early_features(
    base: nn.Module, data: Mapping[str, Mapping[str, Encoded]], settings: Settings, device: torch.device
) -> dict[str, Features]:
    """NFN after the first steps of finetuning all modules, and how far each weight has moved, for every task.

    Args:
        base: The model in float32.
        data: Task -> split -> examples, on `device`.
        settings: Sizes.
        device: Where it trains.
    """
    return {
        task: {
            "nfn_early": score_nfn(changed, data[task]["validation"]),
            "moved": {name: float(delta.norm()) for name, delta in deltas.items()},
        }
        for task, changed, deltas in finetuned(base, data, settings, device, settings.early_steps)
    }


def finetuned(
    base: nn.Module, data: Mapping[str, Mapping[str, Encoded]], settings: Settings, device: torch.device, steps: int
) -> Iterator[tuple[str, nn.Module, Mapping[str, Tensor]]]:
    """Task by task, the model after `steps` of finetuning all modules, and what was added to each weight.

    Args:
        base: The model in float32.
        data: Task -> split -> examples, on `device`.
        settings: Sizes; the learning rate is the middle one.
        device: Where it trains.
        steps: Of finetuning.
    """
    model = frozen_copy(copy.deepcopy(base), device)
    settings = dataclasses.replace(settings, compile=False)  # a few replicas are done sooner than a compilation
    ranks = dict.fromkeys(linear_modules(base), settings.rank)
    rate = settings.rates[len(settings.rates) // 2]
    group = Group(model, data, settings, len(data), settings.rank, steps)
    group.train([Slot(task, ranks, rate, 0) for task in data])
    for index, task in enumerate(data):
        changed, deltas = copy.deepcopy(base), group.merged(index)
        with torch.no_grad():
            for name, linear in linear_modules(changed).items():
                linear.weight += deltas[name].to(linear.weight)
        yield task, changed, deltas


def score_nfn(model: nn.Module, examples: Encoded, **options: str) -> dict[str, float]:
    """NFN by module, as `plop_ext.score` gives it with `options`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small models and samples: that they say little is what is measured here
        scores = plop_ext.score(
            model,
            examples.batches(_BATCH),
            max_samples=None,
            stop=None,
            progress=False,
            **options,  # type: ignore
        )
    return _filled(dict(zip(scores.module_names, map(float, scores.nfn), strict=True)), model)


def _filled(values: Mapping[str, float], model: nn.Module) -> dict[str, float]:
    """The values of all modules; of experts that no token was routed to, the mean of their type."""
    groups = defaultdict[str, list[float]](list)
    for name, value in values.items():
        groups[type_of(name)].append(value)
    return {
        name: values[name] if name in values else sum(groups[type_of(name)]) / len(groups[type_of(name)])
        for name in linear_modules(model)
    }


def _effective_rank(energy: Tensor) -> float:
    """The exponential of the entropy of a spectrum of energies."""
    shares = energy / energy.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _put(features: Features, module: str, row: Mapping[str, float]) -> None:
    for name, value in row.items():
        features.setdefault(name, {})[module] = value


@contextmanager
def _hooks(model: nn.Module, read: Callable[[str, nn.Module, tuple[Tensor, ...]], None]) -> Iterator[None]:
    handles = [linear.register_forward_pre_hook(partial(read, name)) for name, linear in linear_modules(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded(features: Features, modules: Sequence[str]) -> dict[str, list[float]]:
    """`features` as lists in the order of `modules`, at six digits."""
    return {name: [float(f"{values[module]:.6g}") for module in modules] for name, values in features.items()}
