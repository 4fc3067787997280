"""What the collector may ask of a layer, and the registry of those who can answer."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor, nn


class Unsupported(Exception):
    """Raised by `LayerAdapter.check`: the class matches, but this very module cannot be scored; the text says why."""


class LayerAdapter(Protocol):
    """Knows one kind of linear layer. Stateless: one instance serves every module of its kind.

    A new kind of layer is one class with these methods and one `register_adapter` call; nothing else changes.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind."""
        ...

    def check(self, module: nn.Module) -> None:
        """Raise `Unsupported` if this module's weight cannot be read as it is."""
        ...

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features): K and M of the weight W in R^{M x K}."""
        ...

    def weight_rows(self, module: nn.Module) -> Tensor:
        """A [*, *] view of the weight whose sum of squares is ||W||_F^2. Orientation does not matter."""
        ...

    def bias(self, module: nn.Module) -> Tensor | None:
        """[M], or None. It is not part of the feature and is subtracted from the output."""
        ...

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The [..., K] input among the arguments of one call."""
        ...

    def output(self, output: Any) -> Tensor:
        """The [..., M] output, bias included, among what one call returned."""
        ...


_ADAPTERS: list[LayerAdapter] = []

AdapterT = TypeVar("AdapterT", bound=type)


def register_adapter(adapter: AdapterT) -> AdapterT:
    """Class decorator: make a `LayerAdapter` known. The latest registered is asked first.

    Example:
        >>> from plop_ext.layers import register_adapter
        >>> @register_adapter
        ... class MyLinearAdapter:
        ...     def matches(self, module): return type(module).__name__ == "MyLinear"
        ...     # check, features, weight_rows, bias, input, output: see LayerAdapter
    """
    _ADAPTERS.insert(0, adapter())
    return adapter


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter that knows `module`'s kind, or None."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
