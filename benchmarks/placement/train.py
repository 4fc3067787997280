"""Finetunes a group of replicas: each slot has its own placement, task, learning rate and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement.adam import RowAdam
from benchmarks.placement.encode import Encoded
from benchmarks.placement.models import blocks_of, hidden_states
from benchmarks.placement.replicas import Replicas, answer_losses, initial_down
from benchmarks.placement.settings import Settings

_EVALUATED = 64  # examples of each replica in a forward of evaluation


@dataclass(frozen=True)
class Slot:
    """What one replica trains.

    Attributes:
        task: Its data.
        ranks: Module -> rank.
        rate: Learning rate.
        seed: Of the initial adapter and the order of the data.
        start: Initial A by module; empty: PEFT's default.
    """

    task: str
    ranks: Mapping[str, int]
    rate: float
    seed: int
    start: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one replica: mean losses per answer token, None where not finite, and shares of exact answers."""

    validation_loss: float | None
    validation_exact: float
    test_loss: float | None
    test_exact: float


class Group:
    """A program that trains `slots` replicas at once, built once and used for many groups.

    Args:
        model: The frozen base.
        data: Task -> split -> examples, on the model's device.
        settings: Sizes.
        slots: R.
        width: Largest rank.
        steps: Steps of training.
    """

    def __init__(
        self,
        model: Any,
        data: Mapping[str, Mapping[str, Encoded]],
        settings: Settings,
        slots: int,
        width: int,
        steps: int,
    ) -> None:
        self.model, self.settings, self.slots, self.width, self.steps = model, settings, slots, width, steps
        self.device = next(model.parameters()).device
        self.tasks = list(data)
        self.splits = {
            split: _joined([data[task][split] for task in self.tasks]) for split in ("train", "validation", "test")
        }
        self.replicas = Replicas(model, slots, width, settings.scale)
        self.adam = RowAdam(self.replicas.flat, steps)
        self.order = torch.zeros(slots, steps, settings.batch, dtype=torch.int64, device=self.device)
        self._starts: dict[int, dict[str, Tensor]] = {}
        with self.replicas.attached():
            self._blocks = blocks_of(model, settings.compile)
            self._update = torch.compile(self.adam.step, dynamic=False) if settings.compile else self.adam.step
            self._step = self._program()

    def run(self, slots: Sequence[Slot]) -> list[Outcome]:
        """Train and evaluate up to R replicas."""
        self.train(slots)
        with self.replicas.attached():
            validation, test = (self._evaluate(split, slots) for split in ("validation", "test"))
        return [Outcome(*values) for values in zip(*validation, *test, strict=True)]

    def train(self, slots: Sequence[Slot]) -> None:
        """Train up to R replicas; slots that are left over train nothing."""
        if not 0 < len(slots) <= self.slots:
            raise ValueError(f"`slots` must be 1 to {self.slots}, got {len(slots)}")
        spare = self.slots - len(slots)
        starts = [{**self._start(slot.seed), **(slot.start or {})} for slot in slots]
        self.replicas.reset([slot.ranks for slot in slots] + [{}] * spare, starts + [{}] * spare)
        self.adam.reset(torch.tensor([slot.rate for slot in slots] + [0.0] * spare, device=self.device))
        self.order.copy_(torch.stack([self._order_of(slot) for slot in [*slots, *[slots[0]] * spare]]))
        with self.replicas.attached():
            for _ in range(self.steps):
                self._step()

    def _start(self, seed: int) -> dict[str, Tensor]:
        if seed not in self._starts:
            self._starts[seed] = initial_down(self.model, self.width, seed)
        return self._starts[seed]

    def _order_of(self, slot: Slot) -> Tensor:
        """[steps, B] examples, as rows of the joined training split."""
        count = len(self.splits["train"].tokens) // len(self.tasks)
        order = example_order(count, self.steps, self.settings.batch, slot.seed)
        return order + count * self.tasks.index(slot.task)

    def _eager_step(self) -> None:
        train = self.splits["train"]
        rows = self.order.index_select(1, self.adam.done.view(1)).flatten()
        labels = train.labels[rows]
        hidden = hidden_states(self.model, self._blocks, train.tokens[rows])
        losses, _ = answer_losses(hidden, self.model.lm_head, train.positions[rows], labels)
        by_replica = (self.slots, -1)
        means = losses.view(by_replica).sum(1) / (labels >= 0).view(by_replica).sum(1)
        gradients = torch.autograd.grad(means.sum(), self.replicas.parameters)
        self._update(torch.cat([gradient.reshape(self.slots, -1) for gradient in gradients], dim=1))

    def _program(self) -> Callable[[], None]:
        """The step itself, or a CUDA graph of it."""
        if self.device.type != "cuda":
            return self._eager_step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.adam.done.zero_()
                self._eager_step()
        torch.cuda.current_stream().wait_stream(stream)
        self.adam.done.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager_step()
        return graph.replay

    @torch.no_grad()
    def _evaluate(self, split: str, slots: Sequence[Slot]) -> tuple[list[float | None], list[float]]:
        """Mean loss per answer token and share of exact answers of every slot."""
        examples = self.splits[split]
        count = len(examples.tokens) // len(self.tasks)
        tasks = [self.tasks.index(slot.task) for slot in slots]
        first = count * torch.tensor(tasks + [0] * (self.slots - len(slots)), device=self.device)
        loss, tokens, exact = (torch.zeros(self.slots, device=self.device) for _ in range(3))
        blocks = blocks_of(self.model, compiled=False)
        for start in range(0, count, _EVALUATED):
            places = torch.arange(start, min(start + _EVALUATED, count), device=self.device)
            rows = (first[:, None] + places).flatten()
            hidden = hidden_states(self.model, blocks, examples.tokens[rows])
            labels = examples.labels[rows]
            losses, right = answer_losses(hidden, self.model.lm_head, examples.positions[rows], labels)
            loss += losses.view(self.slots, -1).sum(1)
            tokens += (labels >= 0).view(self.slots, -1).sum(1)
            exact += right.view(self.slots, -1).sum(1)
        means = (loss / tokens).tolist()[: len(slots)]
        return [mean if math.isfinite(mean) else None for mean in means], (exact / count).tolist()[: len(slots)]

    @torch.no_grad()
    def merged(self, slot: int) -> Mapping[str, Tensor]:
        """What the adapters of a slot add to the weights: module -> [M, K]."""
        return {
            name: self.settings.scale * (layer.down[slot] @ layer.up[slot]).t()
            for name, layer in self.replicas.layers.items()
        }


def example_order(count: int, steps: int, batch: int, seed: int) -> Tensor:
    """[steps, B] examples out of `count`, in an order of the seed; each once before any comes again."""
    generator = torch.Generator().manual_seed(7_919 * seed + 1)
    rounds = -(-steps * batch // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * batch].view(steps, batch)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of all tasks, task by task, without common padding."""
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in Encoded.__dataclass_fields__)
    return Encoded(*joined).trimmed()


def frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device` in the dtype that finetuning runs in: bfloat16 on a GPU."""
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval().requires_grad_(False)
