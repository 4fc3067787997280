"""Tasks as tensors: tokens, and where the answers are in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.placement.settings import Settings
from benchmarks.placement.tasks import examples

_TRIED = 4  # examples for each one wanted, until the task is thought not to fit
_MULTIPLE = 8  # that lengths are rounded up to
END = 0  # the id of the end of text, also used as padding


@dataclass(frozen=True)
class Encoded:
    """Examples of one task and split.

    Attributes:
        tokens: [N, T] int64: prompt, answer, end of text, padding.
        positions: [N, A] int64: the positions that predict the answer's tokens.
        labels: [N, A] int64: those tokens, -100 behind the end.
        lengths: [N] int64: tokens without padding.
        prompts: [N] int64: tokens before the answer.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    lengths: Tensor
    prompts: Tensor

    def to(self, device: torch.device) -> Encoded:
        """The same on `device`."""
        return Encoded(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def first(self, count: int) -> Encoded:
        """The first `count` examples."""
        return Encoded(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))

    def last(self, count: int) -> Encoded:
        """The last `count` examples."""
        return Encoded(*(getattr(self, name)[-count:] for name in self.__dataclass_fields__))

    def trimmed(self) -> Encoded:
        """The same without the padding behind the longest example and the places in answers that none has."""
        length, answer = (int(each.max()) for each in (self.lengths, (self.labels >= 0).sum(1)))
        length = min(-(-length // _MULTIPLE) * _MULTIPLE, self.tokens.shape[1])
        return Encoded(
            self.tokens[:, :length], self.positions[:, :answer], self.labels[:, :answer], self.lengths, self.prompts
        )

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Batches as a model of transformers takes them."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        mask = place < self.lengths[:, None]
        labels = self.tokens.masked_fill(~mask | (place < self.prompts[:, None]), -100)
        whole = {"input_ids": self.tokens, "attention_mask": mask.long(), "labels": labels}
        return [
            {name: value[start : start + size] for name, value in whole.items()}
            for start in range(0, len(self.tokens), size)
        ]


def encode(task: str, tokenizer: Any, settings: Settings) -> dict[str, Encoded]:
    """The splits of `task`. Test and validation come first, so that they do not depend on the length of training."""
    sizes = {"test": settings.test, "validation": settings.validation, "train": settings.train}
    source, seen = examples(task), 0
    splits = {}
    for split, size in sizes.items():
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < size:
            seen += 1
            if seen > _TRIED * sum(sizes.values()):
                raise ValueError(f"`length` {settings.length} or `answer` {settings.answer} is too short for {task}")
            prompt, answer = (tokenizer.encode(text).ids for text in next(source))
            answer = [*answer, END]
            if len(prompt) + len(answer) <= settings.length and len(answer) <= settings.answer:
                rows.append((prompt, answer))
        splits[split] = _as_tensors(rows, settings.length, settings.answer)
    return splits


def encode_examples(
    given: Sequence[tuple[str, str]], tokenizer: Any, device: torch.device, start: tuple[int, ...] = ()
) -> Encoded:
    """Prompts and answers of any length, with the ids of `start` in front of each."""
    rows = [
        ([*start, *tokenizer.encode(prompt).ids], [*tokenizer.encode(answer).ids, END]) for prompt, answer in given
    ]
    length, longest = max(len(prompt) + len(answer) for prompt, answer in rows), max(len(answer) for _, answer in rows)
    return _as_tensors(rows, length, longest).to(device)


def whole(tokens: Tensor) -> Encoded:
    """[N, T] tokens as examples of which every token counts."""
    count, length = tokens.shape
    everything = torch.arange(length - 1, device=tokens.device).expand(count, -1)
    lengths = torch.full((count,), length, device=tokens.device)
    return Encoded(tokens, everything, tokens[:, 1:], lengths, torch.zeros_like(lengths))


def _as_tensors(rows: list[tuple[list[int], list[int]]], length: int, longest: int) -> Encoded:
    tokens = torch.full((len(rows), length), END)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    labels = torch.full((len(rows), longest), -100)
    for index, (prompt, answer) in enumerate(rows):
        tokens[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        positions[index, : len(answer)] = torch.arange(len(answer)) + len(prompt) - 1
        labels[index, : len(answer)] = torch.tensor(answer)
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    return Encoded(tokens, positions, labels, lengths, torch.tensor([len(prompt) for prompt, _ in rows]))
