"""Experts as linear layers of their own, so that replicas, scores and PEFT treat them as any other layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Expert(nn.Module):
    """One gated MLP."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, K] -> [B, T, K]"""
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class RoutedExperts(nn.Module):
    """A sparse MLP that runs every expert on all tokens, on zeros where it was not chosen.

    An expert without biases maps zeros to zeros, so outputs, gradients and what scores read of it are those of the
    tokens routed to it. It costs experts / chosen times the arithmetic, and no step waits for the device.

    Attributes:
        balance: Of the last forward in training: how unevenly the router used the experts, 1 if evenly.
    """

    balance: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = block.gate
        fused = block.experts
        self.parts = nn.ModuleList(Expert(*pair) for pair in zip(fused.gate_up_proj, fused.down_proj, strict=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, K] -> [B, T, K]"""
        logits, weights, chosen = self.gate(hidden.reshape(-1, hidden.shape[-1]))
        empty = torch.zeros_like(logits, dtype=weights.dtype)
        shares = empty.scatter(1, chosen, weights).view(*hidden.shape[:2], -1).to(hidden.dtype)  # [B, T, E]
        if self.training:
            used = empty.scatter(1, chosen, 1.0).mean(0) / chosen.shape[1]
            self.balance = len(self.parts) * (used * logits.float().softmax(-1).mean(0)).sum()
        output = torch.zeros_like(hidden)
        for expert, share in zip(self.parts, shares.unbind(-1), strict=True):
            output = output + share[..., None] * expert(hidden * (share > 0)[..., None])
        return output


def unfuse(model: Any) -> None:
    """Replace the fused experts of every block of `model`."""
    for layer in model.model.layers:
        layer.mlp = RoutedExperts(layer.mlp)
    model.config.model_type = "unfused"  # PEFT looks for fused experts in models whose type has them


def balance(model: nn.Module) -> Tensor | float:
    """The sum over the blocks of how unevenly experts were used; 0 without any."""
    return sum((module.balance for module in model.modules() if isinstance(module, RoutedExperts)), start=0.0)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear
