"""The examination of one class: its scores against the oracle, and its LoRA through training, saving and reloading."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import Scores, score
from plop_ext.errors import InputError
from plop_ext.layers import discover
from plop_ext.layers.scope import OTHER, parts_of
from plop_ext.placement import Placement
from tests.support.census.inputs import Sample, padded, samples_for
from tests.support.census.models import builder
from tests.support.census.plain_oracle import Call, Calls, matrices_of, observe

TOLERANCE = 1e-5
RANK = 2
# Models of windowed attention that pad a sequence to whole windows.
PADS_INSIDE = {"led", "longformer", "pegasus_x"}
# Models that put a token after the padding.
ENDS_WITH_CLASS = {"videoprism"}
# What a model calls its result, the first that it has; models of two encoders have one result of each.
RESULTS = (("logits",), ("prediction_logits",), ("text_embeds", "image_embeds"), ("last_hidden_state",))


@dataclass
class Examination:
    """What was found of one class.

    Attributes:
        scored: Scored matrices.
        unscored: Matrices that may be missed, with the reason.
        by_batch: Whether the oracle is the padded batch, because padding changes the model's own outputs.
        worst: The largest relative error of a mean gain of one matrix on one sample.
        faults: What is wrong, one line each.
    """

    scored: int = 0
    unscored: tuple[str, ...] = ()
    by_batch: bool = False
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)


def examine(class_name: str, model_type: str, folder: Path) -> Examination:
    """Score, place, train, save and reload the tiny model of a class."""
    build = builder(class_name, model_type)
    model = build()
    samples = samples_for(model)
    batch = padded(samples)
    found = Examination()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [batch], scope="all", max_samples=None, progress=False)
        found.scored = len(scores.modules)
        found.unscored = tuple(f"{item.name}: {item.reason}" for item in scores.unscored if item.wanted)
        compare(model, samples, batch, scores, found)
        score(model, [batch], max_samples=None, progress=False)  # the default scope has something to score
        compare_scopes(model, found)
        try:
            train_and_reload(build, model, batch, scores.place(strategy="all"), folder, found)
        except Exception as error:  # PEFT's and the model's own refusals are outcomes of the table
            found.faults.append(f"{type(error).__name__}: {error}")
    return found


def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    without_cache = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    return model(**batch, **without_cache)


def results(output: Any) -> list[Tensor]:
    named = dict(output.items()) if hasattr(output, "items") else {}
    for names in RESULTS:
        if all(isinstance(named.get(name), Tensor) for name in names):
            return [named[name] for name in names]
    values = named.values() if named else output if isinstance(output, (tuple, list)) else [output]
    return [next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())]


def compare(model: nn.Module, samples: list[Sample], batch: Sample, scores: Scores, found: Examination) -> None:
    """Compare every matrix on every sample with the oracle: counted rows, mean gain, and norm of the weight."""
    modules = dict(model.named_modules())
    parts: dict[str, list[int]] = defaultdict(list)
    for position, entry in enumerate(scores.modules):
        owner = entry.name
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        expert = entry.kind == "stacked experts"
        parts[entry.name if expert else owner].append(position)
    watched = {name: modules[name] for name in parts if name in modules}
    watched |= {name: modules[name] for name in (key.rsplit(".", 2)[0] for key in parts if key not in modules)}

    alone, outputs = observe(model, watched, samples, run)
    if model.config.model_type in PADS_INSIDE:
        block = getattr(model.config, "block_size", None)
        alone = [without_inner_padding(calls, sample, block) for calls, sample in zip(alone, samples, strict=True)]
    with torch.no_grad():
        together = results(run(model, batch))
    found.by_batch = changes_with_padding(together, [results(output) for output in outputs])
    expected = alone
    if found.by_batch:
        (calls,), _ = observe(model, watched, [batch], run)
        expected = divided(calls, alone, batch, 1 if model.config.model_type in ENDS_WITH_CLASS else 0)

    weights = {key: matrix for name, module in watched.items() for key, matrix in matrices_of(name, module).items()}
    for name, positions in parts.items():
        norms = [scores.modules[position].weight_norm or 0.0 for position in positions]
        if abs(sum(norm**2 for norm in norms) / float(weights[name].square().sum()) - 1) > TOLERANCE:
            found.faults.append(f"{name}: norm of the weight {norms}, expected {float(weights[name].norm())}")
        for sample, calls in enumerate(expected):
            totals = scores.totals.of_samples(sample).of_modules(positions)
            gains = torch.cat([call.gains for call in calls.get(name, [])] or [torch.empty(0)])
            gains = gains[gains.isfinite()]
            if any(rows != len(gains) for rows in totals.tokens):
                found.faults.append(f"{name}: {totals.tokens[0]:.0f} rows of sample {sample}, expected {len(gains)}")
            elif len(gains):
                # The parts of a packed weight share the square of its gain.
                actual = totals.sum_gain[0] if len(positions) == 1 else totals.sum_gain_sq.sum()
                error = abs(actual / float((gains if len(positions) == 1 else gains.square()).sum()) - 1)
                found.worst = max(found.worst, float(error))
                if error > TOLERANCE:
                    found.faults.append(f"{name}: gain of sample {sample} is wrong by {error:.1e}")


def compare_scopes(model: nn.Module, found: Examination) -> None:
    """Check that each matrix is in one scope, unless the default scope falls back to the only part there is.

    Parts of none of the modalities, as of robots and proteins, are in the scope of everything only.
    """
    names: dict[str, set[str]] = {}
    for scope in ("all", "language", "vision", "audio"):
        with contextlib.suppress(InputError):  # the model has no such part
            names[scope] = {layer.name for layer in discover(model, scope=scope).layers}
    part = parts_of(model)
    everything = {name for name in names.pop("all") if part is None or part(name) != OTHER}
    alone = [scope for scope, own in names.items() if own == everything]
    counts = Counter(name for own in names.values() for name in own)
    if not alone and (set(counts) != everything or max(counts.values()) > 1):
        wrong = sorted(name for name in everything if counts[name] != 1)
        found.faults.append(f"{wrong[0]}: in {counts[wrong[0]]} scopes, as {len(wrong)} of {len(everything)}")


def without_inner_padding(calls: Calls, sample: Sample, block: int | None) -> Calls:
    """Drop the rows with which the model fills its windows: after the last token, or half a block on both sides."""
    tokens = sample["input_ids"].shape[1]

    def kept(call: Call) -> Call:
        shifted = block is not None and call.rows > -(-tokens // block) * block
        first = block // 2 if block is not None and shifted else 0
        part = slice(first, min(first + tokens, call.rows))
        return Call(call.gains[part], call.row[part], call.shape)

    return {name: [kept(call) for call in own] for name, own in calls.items()}


def changes_with_padding(together: list[Tensor], alone: list[list[Tensor]]) -> bool:
    """Whether the results of a sample in the batch differ from those of the sample alone."""
    for number, own in enumerate(alone):
        for mine, all_of_them in zip(own, together, strict=True):
            part = all_of_them[number : number + 1]
            part = part[tuple(slice(extent) for extent in mine.shape)]
            if part.shape != mine.shape or not (part - mine).abs().max() <= TOLERANCE * mine.abs().max():
                return True
    return False


def divided(calls: Calls, alone: list[Calls], batch: Sample, last: int) -> list[Calls]:
    """Divide the rows of a padded batch among its samples: each has as many as alone, and the rest is padding.

    Padding follows the rows of a sample, up to the `last` ones; in a module that reads several streams of tokens one
    after another, it follows those of each stream. An input of more dimensions is padded where it is longer than that
    of the sample alone. An input that is the same for one sample as for all is a table of positions, of no sample.
    """
    size = len(alone)
    masks = [value for name, value in batch.items() if name.endswith("mask") and value.dim() == 2]
    samples: list[Calls] = [{} for _ in alone]
    for name, of_module in calls.items():
        for number, call in enumerate(of_module):
            own_calls = [own[name][number] if number < len(own.get(name, ())) else None for own in alone]
            shapes = [None if own_call is None else own_call.shape for own_call in own_calls]
            if call.shape[0] == 1 and len(call.shape) > 1 and set(shapes) == {call.shape}:
                continue
            rows = [0 if own_call is None else own_call.rows for own_call in own_calls]
            width = call.rows // size
            sample_of, place = call.row // width, call.row % width
            if call.shape[-1] == size and any(call.shape[0] == mask.shape[1] for mask in masks):  # time first
                sample_of, place = call.row % size, call.row // size
            streams = 1
            for mask in masks:
                if width % mask.shape[1] == 0 and rows == (mask.sum(dim=1) * (width // mask.shape[1])).tolist():
                    streams = width // mask.shape[1]
            for sample, own in enumerate(samples):
                own_rows = place % (width // streams) < rows[sample] // streams
                if last and width - last in {mask.shape[1] for mask in masks}:
                    own_rows = (place < rows[sample] - last) | (place >= width - last)
                shape = shapes[sample]
                if len(call.shape) > 2 and call.shape[0] == size and shape is not None:
                    inside = torch.zeros(call.shape[1:], dtype=torch.bool)
                    inside[tuple(slice(extent) for extent in shape[1:])] = True
                    own_rows = inside.flatten()[place]
                chosen = (sample_of == sample) & own_rows
                if sum(rows) == call.rows:  # one sample after another, without padding
                    before = sum(rows[:sample])
                    chosen = (call.row >= before) & (call.row < before + rows[sample])
                own.setdefault(name, []).append(Call(call.gains[chosen], call.row[chosen], call.shape))
    return samples


def train_and_reload(
    build: Callable[[], nn.Module],
    model: nn.Module,
    batch: Sample,
    placement: Placement,
    folder: Path,
    found: Examination,
) -> None:
    """Train one step, and compare the values of LoRA and the model's results with those of the saved adapter."""
    from peft import PeftModel, get_peft_model

    adapted = get_peft_model(model, placement.lora_config(r=RANK))
    placement.verify(adapted)
    lora = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    if sum(weight.numel() for weight in lora.values()) != placement.num_parameters(RANK):
        found.faults.append("LoRA has another size than the placement says")
    optimizer = torch.optim.AdamW(lora.values(), lr=0.1)
    loss = sum((value * torch.randn_like(value)).mean() for value in results(run(adapted, batch)))
    loss.backward()  # type: ignore[union-attr]
    dead = [
        name for name, weight in lora.items() if "lora_B" in name and (weight.grad is None or not weight.grad.any())
    ]
    if dead:
        found.faults.append(f"{dead[0]}: no gradient, as {len(dead)} of {len(lora) // 2}")
    optimizer.step()
    with torch.no_grad():
        trained = results(run(adapted, batch))
    adapted.save_pretrained(folder)

    fresh = build()
    placement.check_model(fresh)
    reloaded = PeftModel.from_pretrained(fresh, folder)
    placement.verify(reloaded)
    values = dict(reloaded.named_parameters())
    lost = [name for name, weight in lora.items() if name not in values or not torch.equal(values[name], weight)]
    if lost:
        found.faults.append(f"{lost[0]}: another value after a reload, as {len(lost)} of {len(lora)}")
    with torch.no_grad():
        again = results(run(reloaded, batch))
    if not all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(trained, again, strict=True)):
        found.faults.append("other results after a reload")
