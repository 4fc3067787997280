"""An independent oracle: gains by plain hooks in float64, from inputs and weights alone, row by row.

It knows neither masks nor padding. On a sample that runs by itself, every row is a row of that sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.layer_oracle import dense_weight, expert_matrices

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Call:
    """What one call of a module adds to one matrix.

    Attributes:
        gains: [n] float64, ||W z|| / ||z||; NaN where z is zero.
        row: [n] the row of the module's input that each gain is from.
        shape: Extents of the module's input without the features; their product is the number of rows.
    """

    gains: Tensor
    row: Tensor
    shape: torch.Size

    @property
    def rows(self) -> int:
        return self.shape.numel()


Calls = dict[str, list[Call]]


def observe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    run: Callable[[nn.Module, Mapping[str, Any]], Any],
) -> tuple[list[Calls], list[Any]]:
    """The calls of each matrix of `modules`, and the model's outputs, batch by batch.

    The matrices of experts are named `<module>.<expert>.<projection>`, all others by their module.
    """
    weights = {name: matrix for name in modules for name, matrix in matrices_of(name, modules[name]).items()}
    found: list[Calls] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for key, z, row, shape in inputs_of(name, module, (*args, *kwargs.values())):
                call = Call(gains_of(weights[key], z), row, shape)
                found[-1].setdefault(key, []).append(call)

        return see

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    outputs = []
    try:
        with torch.no_grad():
            for batch in batches:
                found.append({})
                outputs.append(run(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return found, outputs


def gains_of(weight: Tensor, z: Tensor) -> Tensor:
    z = z.detach().double().reshape(-1, z.shape[-1])
    return (z @ weight.T).norm(dim=-1) / z.norm(dim=-1)


def matrices_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    """[M, K] float64 of every matrix of the module."""
    if is_experts(module):
        return {
            f"{name}.{expert}.{projection}": matrix
            for projection, matrices in expert_matrices(module).items()
            for expert, matrix in enumerate(matrices)
        }
    if is_grouped(module):
        return {name: torch.block_diag(*module.weight.detach().double().chunk(module.n_groups))}
    return {name: effective_weight(module) if has_own_forward(module) else dense_weight(module)}


def inputs_of(name: str, module: nn.Module, args: tuple[Any, ...]) -> Iterable[tuple[str, Tensor, Tensor, torch.Size]]:
    """For every matrix of the module: its name, the vectors it multiplies, their rows, and the shape of the rows."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if is_experts(module):
        yield from expert_inputs(name, module, tensors[0].detach(), tensors[1])
        return
    z = tensors[0].detach()
    if isinstance(module, CONVOLUTIONS):
        z = patches(module, z if z.dim() == len(module.kernel_size) + 2 else z[None])
        if is_causal(module):  # the model drops the rows after the last token
            z = z[:, : -module.padding[0]]
    elif is_grouped(module):
        z = z.flatten(-2)
    shape = z.shape[:-1]
    yield name, z, torch.arange(shape.numel()), shape


def expert_inputs(
    name: str, module: nn.Module, hidden: Tensor, chosen: Tensor
) -> Iterable[tuple[str, Tensor, Tensor, torch.Size]]:
    """Route tokens to one expert at a time."""
    *first, last = expert_matrices(module)
    with torch.no_grad():
        for expert in range(module.num_experts):
            token = torch.where(chosen == expert)[0]
            z = hidden[token]
            for projection in first:
                yield f"{name}.{expert}.{projection}", z, token, hidden.shape[:-1]
            weight = module.gate_up_proj[expert] if module.has_gate else module.up_proj[expert]
            y = z @ (weight if module.is_transposed else weight.T)
            if module.has_bias:
                y = y + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
            inner = module._apply_gate(y) if module.has_gate else module.act_fn(y)
            yield f"{name}.{expert}.{last}", inner, token, hidden.shape[:-1]


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """[B, *positions, K] float64: the patch at each output position."""
    x = x.double()
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        sides = [(side, span - 1 - side) for span in spans for side in ((span - 1) // 2,)]
    else:
        sides = [(side, side) for side in (conv.padding if conv.padding != "valid" else (0,) * len(spans))]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)
    dims = len(spans)
    for axis, (span, stride, dilation) in enumerate(zip(spans, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, span, stride)[..., ::dilation]
    # [B, C, positions..., kernel...]
    x = x.movedim(1, 1 + dims)
    return x.reshape(*x.shape[: 1 + dims], conv.in_channels * torch.Size(conv.kernel_size).numel())


def is_experts(module: nn.Module) -> bool:
    return hasattr(module, "num_experts") and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def is_causal(conv: nn.Module) -> bool:
    """Whether a convolution pads both ends, so that its first outputs see only what came before."""
    sizes = getattr(conv, "kernel_size", ()), getattr(conv, "padding", ()), getattr(conv, "stride", ())
    return len(sizes[0]) == 1 and sizes[0][0] > 1 and sizes[1] == (sizes[0][0] - 1,) and sizes[2] == (1,)


def is_grouped(module: nn.Module) -> bool:
    """Whether it multiplies each of several groups of features [..., groups, K] by a matrix of its own."""
    return isinstance(module, nn.Linear) and hasattr(module, "n_groups")


def has_own_forward(module: nn.Module) -> bool:
    plain = next((kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(module, kind)), None)
    return plain is not None and type(module).forward is not plain.forward


def effective_weight(module: nn.Module) -> Tensor:
    """The matrix that the module's own forward applies, from its outputs for unit vectors."""
    own = copy.deepcopy(module).double()
    if isinstance(own, CONVOLUTIONS):
        own.padding = (0,) * len(own.kernel_size)
        features = own.in_channels * torch.Size(own.kernel_size).numel()
        units = torch.eye(features, dtype=torch.float64).view(features, own.in_channels, *own.kernel_size)
    else:
        units = torch.eye(own.in_features, dtype=torch.float64)
    with torch.no_grad():
        y, offset = own(units), own(torch.zeros_like(units))
    y, offset = (value[0] if isinstance(value, tuple) else value for value in (y, offset))
    return (y - offset).flatten(1).T.contiguous()
