"""Does the order of the types depend on what is scored? NFN of one model under other samples, lengths and forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement import features
from benchmarks.placement.encode import END, Encoded, encode_examples, whole
from benchmarks.placement.models import type_means
from benchmarks.placement.settings import Settings
from benchmarks.placement.tasks import examples

TEXT = "text"
REFERENCE = "reference"
_SAMPLES = (8, 16, 32, 64)
_LENGTHS = (16, 32, 128, 256, 512)
_DRAWS = 3
_TEMPLATE = "<|user|>\n{prompt}\n<|assistant|>\n"

Condition = tuple[str, str, Mapping[str, float]]  # data, what is different, NFN by type


def of_text(model: nn.Module, tokens: Tensor, settings: Settings) -> Iterator[Condition]:
    """Ordinary text: other samples, fewer of them, other lengths, and an end of text in front of each.

    Args:
        model: On the device of `tokens`.
        tokens: [N] ids of held-out text.
        settings: Sizes of the reference: `scored` windows of `length` tokens.
    """
    count, length = settings.scored, settings.length
    drawn = windows(tokens, count * (_DRAWS + 1), length)
    for draw in range(_DRAWS + 1):
        part = drawn[draw * count : (draw + 1) * count]
        yield TEXT, f"other samples, {draw}" if draw else REFERENCE, _means(model, whole(part))
    yield from _fewer(model, TEXT, whole(drawn[:count]))
    for other in _LENGTHS:
        if count * other <= len(tokens):
            yield TEXT, f"{other} tokens", _means(model, whole(windows(tokens, count, other)))
    marked = torch.cat([torch.full_like(drawn[:count, :1], END), drawn[:count]], 1)
    yield TEXT, "end of text in front", _means(model, whole(marked))


def of_task(
    model: nn.Module, task: str, tokenizer: Any, data: Mapping[str, Encoded], settings: Settings
) -> Iterator[Condition]:
    """A task: other samples, fewer of them, answers only, padding, an end of text in front, and a chat template.

    Args:
        model: On the device of `data`.
        task: Its name.
        tokenizer: Of the model.
        data: Split -> examples.
        settings: Sizes of the reference: the first `scored` examples.
    """
    count, device = settings.scored, data["train"].tokens.device
    given = list(islice(examples(task), count))
    reference = encode_examples(given, tokenizer, device)
    yield task, REFERENCE, _means(model, reference)
    others = (data["train"].first(count), data["train"].last(count), data["validation"].first(count))
    for draw, other in enumerate(others, 1):
        yield task, f"other samples, {draw}", _means(model, other.trimmed())
    yield from _fewer(model, task, reference)
    yield task, "answers only", _means(model, reference, mask="completion")
    yield task, "padded to twice the length", _means(model, padded(reference))
    marked = encode_examples(given, tokenizer, device, start=(END,))
    yield task, "end of text in front", _means(model, marked)
    chat = [(_TEMPLATE.format(prompt=prompt), answer) for prompt, answer in given]
    yield task, "chat template", _means(model, encode_examples(chat, tokenizer, device))


def of_finetuned(
    base: nn.Module, data: Mapping[str, Mapping[str, Encoded]], settings: Settings, device: torch.device
) -> Iterator[Condition]:
    """Each task scored on the model that was finetuned on it: LoRA on all modules, one rate, one seed."""
    for task, changed, _ in features.finetuned(base, data, settings, device, settings.steps):
        yield task, "finetuned model", _means(changed, data[task]["test"].first(settings.scored).trimmed())


def windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """[count, length] windows of `tokens`, spread evenly over the text."""
    step = (len(tokens) - length) // max(count - 1, 1)
    starts = torch.arange(count, device=tokens.device) * step
    return tokens[starts[:, None] + torch.arange(length, device=tokens.device)]


def padded(examples: Encoded) -> Encoded:
    """The same examples in rows of twice the length."""
    more = torch.full_like(examples.tokens, END)
    return Encoded(
        torch.cat([examples.tokens, more], 1), examples.positions, examples.labels, examples.lengths, examples.prompts
    )


def _fewer(model: nn.Module, data: str, examples: Encoded) -> Iterator[Condition]:
    for count in _SAMPLES:
        if count < len(examples.tokens):
            yield data, f"{count} samples", _means(model, examples.first(count))


def _means(model: nn.Module, examples: Encoded, **options: str) -> Mapping[str, float]:
    return type_means(features.score_nfn(model, examples, **options))
