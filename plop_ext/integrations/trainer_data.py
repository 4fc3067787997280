"""What a stack gives `score_trainer`: the model, and the batches of its training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from plop_ext.errors import InputError


@dataclass(frozen=True)
class TrainerData:
    """The model and the batches of a training.

    Attributes:
        model: The model that will be trained.
        batches: Its batches, as arguments of the model.
    """

    model: nn.Module
    batches: Iterable[Any]


class Peeked:
    """Batches of which the first was read before the others.

    Args:
        batches: The batches.

    Raises:
        InputError: If there are none.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._iterator = iter(batches)
        try:
            self.first = next(self._iterator)
        except StopIteration:
            raise InputError("`trainer` has no training batch; give it data") from None

    def __iter__(self) -> Iterator[Any]:
        return chain([self.first], self._iterator)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    @property
    def marks_completions(self) -> bool:
        """Whether the batches tell on which tokens the loss counts."""
        labels = self.first.get("labels") if isinstance(self.first, Mapping) else None
        ids = self.first.get("input_ids") if labels is not None else None
        return isinstance(labels, Tensor) and getattr(ids, "shape", None) == labels.shape


class Mapped:
    """Batches changed one by one, with the length of the originals.

    Args:
        batches: The originals.
        change: The change.
    """

    def __init__(self, batches: Iterable[Any], change: Any) -> None:
        self._batches = batches
        self._change = change

    def __iter__(self) -> Iterator[Any]:
        return map(self._change, self._batches)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]
