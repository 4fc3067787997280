"""The memory that training a placement adds to that of the model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plop_ext.arguments import check_type, check_whole
from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget

if TYPE_CHECKING:
    import torch
    from torch import nn

# Bytes of one value.
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Adam keeps two moments per parameter, in the parameter's type.
_OPTIMIZER_STATES = 2
# Projections back to the residual stream, which share their input with no sibling, even if the widths are equal.
_OWN_INPUT = {"o_proj", "out_proj", "c_proj", "down_proj", "fc2", "wo", "w2", "dense", "dense_4h_to_h", "lin2"}


@dataclass(frozen=True)
class Cost:
    """Memory that training a placement adds, in bytes.

    Attributes:
        trainable_parameters: Exact, as PEFT counts them.
        parameter_bytes: The adapters.
        gradient_bytes: Their gradients.
        optimizer_bytes: The two moments of Adam.
        activation_bytes: Tensors that the adapters keep from the forward for the backward.
    """

    trainable_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the four."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def cost(
    targets: Sequence[LoraTarget],
    ranks: Mapping[str, int],
    model: nn.Module | torch.dtype | str,
    batch: int,
    seq: int,
    *,
    adapter_dtype: str = "float32",
) -> Cost:
    """Predict the memory that training these targets adds; see `Placement.cost`.

    Args:
        targets: The adapted targets.
        ranks: Name of each target to its rank.
        model: The model, or the type of its weights.
        batch: Samples in a step.
        seq: Tokens in a sample.
        adapter_dtype: Type of the adapters.

    Raises:
        InputError: If a size is below 1 or a type is unknown.
    """
    check_whole(batch=batch, seq=seq, required=True)
    width, adapter_width = _width(model), _width(adapter_dtype)
    parameters = sum(ranks[target.name] * target.size for target in targets)
    tokens = batch * seq
    modules = {target.name: target.shape for target in targets if not target.parameter}
    kept = tokens * _kept_per_token(modules, width, adapter_width)
    kept += tokens * adapter_width * sum(ranks[name] for name in modules)
    # PEFT adds the whole update to a parameter in each forward, and the backward of the product needs the sum.
    kept += width * sum(math.prod(target.shape) for target in targets if target.parameter)
    return Cost(
        trainable_parameters=parameters,
        parameter_bytes=parameters * adapter_width,
        gradient_bytes=parameters * adapter_width,
        optimizer_bytes=parameters * adapter_width * _OPTIMIZER_STATES,
        activation_bytes=kept,
    )


def _kept_per_token(shapes: Mapping[str, tuple[int, ...]], width: int, adapter_width: int) -> int:
    """Return the bytes of adapter inputs kept per token: one copy each if PEFT casts, else one per distinct tensor."""
    if adapter_width != width:
        return adapter_width * sum(shape[0] for shape in shapes.values())
    distinct = set()
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        distinct.add((parent, shape[0], leaf if leaf in _OWN_INPUT else ""))
    return width * sum(in_features for _, in_features, _ in distinct)


def _width(model: nn.Module | torch.dtype | str) -> int:
    """Return the bytes of one value of a model's weights."""
    if not isinstance(model, str):
        import torch
        from torch import nn

        check_type((nn.Module, torch.dtype), "a model or the type of its weights", model=model)
        parameters = getattr(model, "parameters", None)
        dtype = next((p.dtype for p in parameters() if p.is_floating_point()), "float32") if parameters else model
        model = str(dtype)
    name = model.removeprefix("torch.")
    if name not in WIDTHS:
        raise InputError(f"`model` has values of type {name:.40}; name one of {', '.join(WIDTHS)}")
    return WIDTHS[name]
