"""The interface of layer adapters, and their registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plop_ext.layers.gram import grams, is_narrow
from plop_ext.layers.parametrized import changed_by_peft
from plop_ext.layers.sharded import row_sums
from plop_ext.layers.split import Split
from plop_ext.layers.walk import plain_class
from plop_ext.ops import FLOATS

# Packages with linear layers that are no `nn.Linear`, which PEFT adapts by classes of its own.
_QUANTIZED_BY = {"aqlm", "eetq", "gptqmodel", "hqq", "neural_compressor", "transformer_engine"}


class Unsupported(Exception):
    """Raised by an adapter that matches a module which cannot be scored; the message gives the reason."""


@dataclass(frozen=True)
class Part:
    """One logical matrix W of a module: the whole weight, a part of a packed weight, or one expert's projection.

    Attributes:
        suffix: End of the matrix's name, after the name of the module: empty, `.q`, `.3.gate_proj`.
        type_suffix: End of the matrix's type, after the type of the module: empty, `.q`, `.gate_proj`.
        in_features: K.
        out_features: M.
    """

    suffix: str
    type_suffix: str
    in_features: int
    out_features: int


class LayerAdapter:
    """One kind of linear layer. Adapters are stateless: one instance serves every module of the kind.

    A new kind of layer needs one subclass and one `register_adapter` call. You have to implement `matches`,
    `features`, and one of `weight_rows` and `weight_chunks`. The other methods describe an ordinary layer: the input
    is the first argument, the output is a tensor, and the bias is the attribute `bias`. Override the methods in which
    your layer differs.

    Attributes:
        kind: Name of the kind of layer, for reports: "linear", "Conv1D", "bitsandbytes 4-bit".
        weights: Source of ||W||_F: "weight", "dequantized", "identity" (see `OpaqueAdapter`) or "forward" (see
            `ProductAdapter`).
        divisible: Whether a module can be scored whose weight is divided in its forward, as by tensor parallelism.
        routed: Whether each part receives only the tokens that are routed to it.
        priority: If several adapters match a module, the one with the highest priority is used; among equals, the
            latest registered. The default 0 suits an adapter for one class. Choose a priority below 0 for an adapter
            that shall be used only if no adapter for the class matches: the package has -10 for any `nn.Linear` with
            a floating-point weight (`LinearAdapter`) and for convolutions, -5 for those of them that have a forward of
            their own, and -100 for the fallback (`OpaqueAdapter`). Choose one above 0
            to take precedence over adapters that are registered later.
    """

    kind = "linear"
    weights = "weight"
    divisible = False
    routed = False
    priority = 0

    def matches(self, module: nn.Module) -> bool:
        """Return whether `module` is of this kind."""
        raise NotImplementedError

    def for_module(self, module: nn.Module) -> LayerAdapter:
        """Return the adapter that reads this module of the kind: this one, unless modules of the kind differ."""
        return self

    def check(self, module: nn.Module) -> None:
        """Raise `Unsupported` if this module cannot be scored."""

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return (in_features, out_features): K and M of the weight W, which is [M, K]."""
        raise NotImplementedError

    def blocks(self, module: nn.Module) -> int:
        """Return the number of equal blocks if W is block-diagonal; its rows then hold K / blocks values."""
        return 1

    def weight_rows(self, module: nn.Module) -> Tensor:
        """Return W as a view [M, K], not a copy: float32, float64, float16 or bfloat16, with any strides."""
        raise NotImplementedError

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        """Return the rows of W in order, as chunks [*, K], because a dequantized weight may not fit the memory."""
        return (self.weight_rows(module),)

    def sums_shards(self, module: nn.Module) -> bool:
        """Return whether `part_sumsq` reads a sharded weight without gathering it."""
        return False

    def weight_sumsq(self, module: nn.Module) -> Tensor:
        """Return [M] float32 or float64, on the weight's device: the sum of squares of each row of W."""
        totals = [row_sums(rows, module) for rows in self.weight_chunks(module)]
        return totals[0] if len(totals) == 1 else torch.cat(totals)

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the bias [M], or None. It is subtracted from the output, because it is not part of the feature."""
        return getattr(module, "bias", None)

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the input among the arguments of a call: [..., K], unless `input_sumsq` is overridden."""
        return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))

    def input_sumsq(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the sums of squares [R] of the vectors to which W is applied; None if these are rows of the input."""
        return None

    def output(self, module: nn.Module, output: Any) -> Tensor:
        """Return the output [..., M], including the bias, from the result of a call."""
        return output

    def base_output(self, module: nn.Module, x: Tensor, output: Any) -> Any:
        """Return the result of a call without the LoRA that PEFT adds to a parameter within the forward.

        Args:
            module: The module, during its forward.
            x: The input.
            output: The result of the call.

        Raises:
            Unsupported: If the output without LoRA cannot be computed.
        """
        if changed_by_peft(module):
            raise Unsupported("PEFT adds LoRA to the weight within the forward; score the model without adapters")
        return output

    def probe(self, module: nn.Module, z: Tensor) -> Tensor:
        """Return W z + bias [P, M] for `z` [P, K], by the module's own forward."""
        return self.output(module, module.forward(z))

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Return the type of the module's inputs, also if the weight is stored as codes of another type."""
        tensors = (*module.parameters(), *module.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.dtype in FLOATS), torch.float32)

    def lora_size(self, module: nn.Module) -> int:
        """Return the number of parameters that rank-1 LoRA adds."""
        return sum(self.features(module))

    def against_lora(self, module: nn.Module) -> str:
        """Return why PEFT cannot adapt the module; empty if it can."""
        kind = plain_class(module)
        if isinstance(module, nn.Linear) or kind.__module__.split(".", 1)[0] in _QUANTIZED_BY:
            return ""
        return f"PEFT does not support the class {kind.__name__}"

    def parts(self, module: nn.Module, split: Split | None) -> tuple[Part, ...]:
        """Return the logical matrices of the module."""
        in_features, out_features = self.features(module)
        if split is None:
            return (Part("", "", in_features, out_features),)
        return tuple(
            Part(f".{name}", f".{name}", in_features, split.features(out_features, index))
            for index, name in enumerate(split.names)
        )

    def part_sumsq(self, module: nn.Module, split: Split | None) -> Tensor:
        """Return [parts] float64: ||W||_F^2 of each part."""
        rows = self.weight_sumsq(module)
        if split is None:
            return rows.sum(dtype=torch.float64).reshape(1)
        parts = range(len(split.names))
        return torch.stack([split.select(rows, index).sum(dtype=torch.float64) for index in parts])

    def part_grams(self, module: nn.Module, split: Split | None) -> list[Tensor | None]:
        """Return the Gram matrix of each narrow part, one per block of W, and None for the other parts.

        Returns:
            For each part [blocks, n, n] float64 on the weight's device: W W^T or W^T W, whichever is smaller.
        """
        parts, blocks = self.parts(module, split), self.blocks(module)
        return [
            grams(self._part_rows(module, split, index).unflatten(0, (blocks, -1)))
            if is_narrow(part.in_features, part.out_features)
            else None
            for index, part in enumerate(parts)
        ]

    def _part_rows(self, module: nn.Module, split: Split | None, part: int) -> Tensor:
        """Return the rows of one narrow part."""
        chunks = self.weight_chunks(module)
        if split is None:
            rows = list(chunks)
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        wanted = split.select(torch.arange(self.features(module)[1]), part).flatten()
        rows, start = [], 0
        for chunk in chunks:
            stop = start + len(chunk)
            rows.append(chunk[(wanted[(wanted >= start) & (wanted < stop)] - start).to(chunk.device)])
            start = stop
        return torch.cat(rows)


_ADAPTERS: list[LayerAdapter] = []

AdapterT = TypeVar("AdapterT", bound=type[LayerAdapter])


def register_adapter(adapter: AdapterT) -> AdapterT:
    """Register a `LayerAdapter`; use it as a class decorator.

    If several adapters match a module, the one with the highest `LayerAdapter.priority` is used; among equals, the
    latest registered. With the default priority, your adapter takes precedence over all adapters of the package.

    Args:
        adapter: The class, of which one instance is created.

    Returns:
        The class.

    Example:
        >>> from plop_ext.layers import LayerAdapter, register_adapter
        >>> @register_adapter
        ... class ScaledLinearAdapter(LayerAdapter):
        ...     kind = "scaled linear"
        ...     def matches(self, module):
        ...         return type(module).__name__ == "ScaledLinear"
        ...     def features(self, module):
        ...         return module.weight.shape[1], module.weight.shape[0]
        ...     def weight_chunks(self, module):
        ...         yield module.weight * module.scale[:, None]
    """
    _ADAPTERS.insert(0, adapter())
    _ADAPTERS.sort(key=lambda known: known.priority, reverse=True)  # stable: the latest stays first
    return adapter


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """Return the adapter for `module`, or None."""
    adapter = next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
    return None if adapter is None else adapter.for_module(module)
