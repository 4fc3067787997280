"""LoRA replicas side by side over one frozen base: one forward and one backward for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.placement.models import linear_modules


class ReplicatedLinear(nn.Module):
    r"""A frozen linear layer with one adapter per replica: \(y_i = W x_i + b + s\,x_i A_i B_i\).

    The replicas' samples follow each other in the batch. A replica without an adapter here has A = B = 0, and so do
    the columns beyond a replica's rank: their gradients are 0, so they stay 0.

    Args:
        base: The layer.
        down: [R, K, r] A of all replicas.
        up: [R, r, M] B of all replicas.
        scale: s.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        """[R * n, T, K] -> [R * n, T, M]"""
        output = self.base(inputs)
        rows = inputs.reshape(self.down.shape[0], -1, inputs.shape[-1])
        narrow = torch.bmm(rows, self.down.to(inputs.dtype))
        flat = output.reshape(rows.shape[0], rows.shape[1], -1)
        return torch.baddbmm(flat, narrow, self.up.to(inputs.dtype), alpha=self.scale).view_as(output)


class Replicas:
    """The adapters of `count` replicas on every linear module of a model, all in one flat tensor.

    Args:
        model: The base; its parameters are frozen.
        count: R.
        width: Largest rank.
        scale: alpha / r.
    """

    def __init__(self, model: nn.Module, count: int, width: int, scale: float) -> None:
        self.model, self.count, self.width, self.scale = model, count, width, scale
        self.linears = linear_modules(model)
        sizes = [width * (linear.in_features + linear.out_features) for linear in self.linears.values()]
        device = next(model.parameters()).device
        self.flat = torch.zeros(count, sum(sizes), device=device)  # [R, P]
        self.layers: dict[str, ReplicatedLinear] = {}
        model.requires_grad_(False)
        start = 0
        for (name, linear), size in zip(self.linears.items(), sizes, strict=True):
            middle = start + width * linear.in_features
            down = self.flat[:, start:middle].view(count, linear.in_features, width)
            up = self.flat[:, middle : start + size].view(count, width, linear.out_features)
            self.layers[name] = ReplicatedLinear(linear, down, up, scale)
            start += size

    @property
    def parameters(self) -> list[Tensor]:
        """The leaves that gradients are taken of, in the order of `flat`."""
        return [tensor for layer in self.layers.values() for tensor in (layer.down, layer.up)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model with the replicas in it."""
        try:
            for name, layer in self.layers.items():
                _replace(self.model, name, layer)
            yield
        finally:
            for name, linear in self.linears.items():
                _replace(self.model, name, linear)

    @torch.no_grad()
    def reset(self, ranks: Sequence[Mapping[str, int]], starts: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin anew.

        Args:
            ranks: Of each replica: module -> rank; a module that is left out has no adapter.
            starts: Of each replica: module -> [K, r'] initial A, of which the first columns are taken.
        """
        self.flat.zero_()
        for index, (rank, start) in enumerate(zip(ranks, starts, strict=True)):
            for name, r in rank.items():
                if r > self.width:
                    raise ValueError(f"`ranks` of replica {index} has {r} for {name}, more than {self.width}")
                self.layers[name].down[index, :, :r] = start[name][:, :r]


def initial_down(model: nn.Module, width: int, seed: int) -> dict[str, Tensor]:
    """PEFT's initial A of every module for a seed, [K, width]: the same whatever the rank and the placement."""
    device = next(model.parameters()).device
    result = {}
    for index, (name, linear) in enumerate(linear_modules(model).items()):
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        values = torch.rand(width, linear.in_features, generator=generator).mul_(2).sub_(1)
        result[name] = (values.t() / math.sqrt(linear.in_features)).contiguous().to(device)
    return result


def answer_losses(hidden: Tensor, head: nn.Linear, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and correctness of the answers' tokens.

    Args:
        hidden: [N, T, K]
        head: The output layer.
        positions: [N, A]
        labels: [N, A], -100 where there is no token.

    Returns:
        [N, A] losses, 0 where there is no token, and [N] whether every token is the most likely one, given those
        before it: what greedy decoding would have written.
    """
    read = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = head(read).float()
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    exact = ((logits.argmax(-1) == labels) | (labels < 0)).all(dim=1)
    return losses.view_as(labels), exact


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
