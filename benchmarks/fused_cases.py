"""Calls of the fused ops in the shapes of published models, and the transformers modules that do the same work."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.roofline import Widths
from benchmarks.shapes import SHAPES
from plop_ext import ops

EPS = 1e-6
# Tokens of a sample: as many rows share one table of angles.
SAMPLE = 1024
_CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2"}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class FusedCase(ABC):
    """One fused op in one shape.

    Attributes:
        model: Key of `SHAPES`.
        tokens: Rows.
        dtype: Of everything but the sums.
        device: Where it runs.
        op: Name of the op.
        written: Names of the tensors that hold what `modules` returns.
    """

    model: str
    tokens: int
    dtype: torch.dtype
    device: torch.device

    op: ClassVar[str]
    written: ClassVar[tuple[str, ...]]

    @property
    def config(self) -> Mapping[str, Any]:
        return SHAPES[self.model]

    @property
    def widths(self) -> Widths:
        return Widths.of(self.config)

    @property
    @abstractmethod
    def label(self) -> str:
        """The shape, as tables show it."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """Elements of the activations read and written."""

    @property
    @abstractmethod
    def vectors(self) -> int:
        """How many sums per row the op writes."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """New inputs and outputs of one call."""

    @abstractmethod
    def run(self, tensors: Tensors) -> None:
        """The op."""

    @abstractmethod
    def modules(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Return the same by separate PyTorch operators, as transformers runs them, without the sums."""

    @property
    def bytes(self) -> int:
        """What has to move: each activation read or written once, and the sums."""
        return self.elements * self.dtype.itemsize + 4 * self.vectors * self.tokens

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _sums(self) -> Tensor:
        return torch.empty(self.tokens, device=self.device)

    @property
    def _modeling(self) -> Any:
        family = self.config["model_type"]
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    def _norm(self, features: int) -> Any:
        norm = getattr(self._modeling, f"{_CLASSES[self.config['model_type']]}RMSNorm")(features, EPS)
        norm.weight = nn.Parameter(self._random(features), requires_grad=False)
        return norm

    @property
    def _unit_offset(self) -> bool:
        return self.config["model_type"] == "gemma2"


class AddNorm(FusedCase):
    """Residual add and norm; in Gemma the norm before the add too."""

    op = "add_rms_norm_"
    written = ("hidden", "normed")

    @cached_property
    def _norms(self) -> tuple[Any, Any]:
        inner = self._norm(self.widths.hidden) if self._unit_offset else None
        return inner, self._norm(self.widths.hidden)

    @property
    def label(self) -> str:
        return f"K {self.widths.hidden}" + (", two norms" if self._unit_offset else "")

    @property
    def elements(self) -> int:
        return 4 * self.tokens * self.widths.hidden

    @property
    def vectors(self) -> int:
        return 2

    def tensors(self) -> Tensors:
        shape = self.tokens, self.widths.hidden
        return {
            "x": self._random(*shape),
            "residual": self._random(*shape),
            "hidden": self._empty(*shape),
            "normed": self._empty(*shape),
            "x_sumsq": self._sums(),
            "normed_sumsq": self._sums(),
        }

    def run(self, tensors: Tensors) -> None:
        inner, norm = self._norms
        ops.add_rms_norm_(
            tensors["normed"],
            tensors["hidden"],
            tensors["x"],
            tensors["residual"],
            norm.weight,
            EPS,
            None if inner is None else inner.weight,
            EPS,
            self._unit_offset,
            None,
            tensors["x_sumsq"],
            tensors["normed_sumsq"],
        )

    def modules(self, tensors: Tensors) -> tuple[Tensor, ...]:
        inner, norm = self._norms
        x = tensors["x"] if inner is None else inner(tensors["x"])
        hidden = tensors["residual"] + x
        return hidden, norm(hidden)


class GatedActivation(FusedCase):
    """Activation of the gate, times up."""

    op = "gated_activation_"
    written = ("out",)

    @property
    def label(self) -> str:
        return f"I {self.widths.intermediate}, {self._activation}"

    @property
    def elements(self) -> int:
        return 3 * self.tokens * self.widths.intermediate

    @property
    def vectors(self) -> int:
        return 3

    @property
    def _activation(self) -> str:
        return "gelu_tanh" if self._unit_offset else "silu"

    def tensors(self) -> Tensors:
        shape = self.tokens, self.widths.intermediate
        found = {"gate": self._random(*shape), "up": self._random(*shape), "out": self._empty(*shape)}
        return {**found, **{f"{name}_sumsq": self._sums() for name in found}}

    def run(self, tensors: Tensors) -> None:
        ops.gated_activation_(
            tensors["out"],
            tensors["gate"],
            tensors["up"],
            self._activation,
            None,
            None,
            tensors["gate_sumsq"],
            tensors["up_sumsq"],
            tensors["out_sumsq"],
        )

    def modules(self, tensors: Tensors) -> tuple[Tensor, ...]:
        if self._activation == "silu":
            return (nn.functional.silu(tensors["gate"]) * tensors["up"],)
        return (nn.functional.gelu(tensors["gate"], approximate="tanh") * tensors["up"],)


class Rotary(FusedCase):
    """Rotary embedding of q and k; in Qwen3 the norm of each head before it too."""

    op = "rotary_"
    written = ("q_out", "k_out")

    @cached_property
    def _norms(self) -> tuple[Any, Any] | None:
        if self.config["model_type"] != "qwen3":
            return None
        return self._norm(self._head), self._norm(self._head)

    @property
    def _head(self) -> int:
        return self.widths.queries // int(self.config["num_attention_heads"])

    @property
    def label(self) -> str:
        heads = f"{self.config['num_attention_heads']} / {self.config['num_key_value_heads']} x {self._head}"
        return heads + (", head norm" if self.config["model_type"] == "qwen3" else "")

    @property
    def elements(self) -> int:
        return 2 * self.tokens * (self.widths.queries + self.widths.keys)

    @property
    def vectors(self) -> int:
        return 2

    def tensors(self) -> Tensors:
        length = min(self.tokens, SAMPLE)
        q = self.tokens // length, length, self.config["num_attention_heads"], self._head
        k = *q[:2], self.config["num_key_value_heads"], self._head
        angles = torch.randn(1, length, self._head // 2, device=self.device).repeat(1, 1, 2)
        return {
            "q": self._random(*q),
            "k": self._random(*k),
            "cos": angles.cos().to(self.dtype),
            "sin": angles.sin().to(self.dtype),
            "q_out": self._empty(*q),
            "k_out": self._empty(*k),
            "q_sumsq": self._sums(),
            "k_sumsq": self._sums(),
        }

    def run(self, tensors: Tensors) -> None:
        norms = self._norms
        ops.rotary_(
            tensors["q_out"],
            tensors["k_out"],
            tensors["q"],
            tensors["k"],
            tensors["cos"],
            tensors["sin"],
            None if norms is None else norms[0].weight,
            None if norms is None else norms[1].weight,
            EPS,
            False,
            None,
            None,
            tensors["q_sumsq"],
            tensors["k_sumsq"],
        )

    def modules(self, tensors: Tensors) -> tuple[Tensor, ...]:
        q, k = tensors["q"], tensors["k"]
        if self._norms is not None:
            q, k = self._norms[0](q), self._norms[1](k)
        rotate = self._modeling.apply_rotary_pos_emb
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), tensors["cos"], tensors["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)


CASES: tuple[type[FusedCase], ...] = (AddNorm, GatedActivation, Rotary)
