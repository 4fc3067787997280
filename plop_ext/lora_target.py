"""`LoraTarget`: the module or parameter that LoRA adapts for a scored matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LoraTarget:
    """A module or a parameter that LoRA adapts for a scored matrix.

    Several matrices can share a target: the parts of a packed weight, and all experts of a layer.

    Attributes:
        name: Full name of the module, or of the parameter.
        parameter: Whether the target is an entry of PEFT's `target_parameters`.
        size: Number of parameters that LoRA of rank 1 adds to the module or parameter.
        shape: (in_features, out_features) of the module, or the shape of the parameter.
        refused: Reason why PEFT cannot adapt the target; empty if PEFT can.
    """

    name: str
    parameter: bool
    size: int
    shape: tuple[int, ...]
    refused: str = ""

    @classmethod
    def of_module(cls, name: str, in_features: int, out_features: int) -> LoraTarget:
        """Make the target of an ordinary linear layer, which LoRA adapts by K x r and r x M."""
        return cls(name, False, in_features + out_features, (in_features, out_features))

    @property
    def max_rank(self) -> int:
        """The largest useful rank: an update of W has at most rank min(K, M)."""
        return min(self.shape[-2:])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LoraTarget:
        """Make a target from the result of `to_dict`.

        Raises:
            TypeError, ValueError: If a field is missing, surplus, of another type or out of range.
        """
        target = cls(**{**fields, "shape": tuple(fields["shape"])})
        extents = (target.size, *target.shape)
        sizes_fit = len(target.shape) >= 2 and set(map(type, extents)) == {int} and min(extents) > 0
        texts_fit = isinstance(target.name, str) and isinstance(target.refused, str)
        if not (sizes_fit and texts_fit and type(target.parameter) is bool):
            raise ValueError(f"no LoRA target: {target}")
        return target
