"""Convolutions as linear maps of patches.

Each output position applies W [out_channels, K] to a patch z of K = in_channels * kernel elements (with groups, W is
block-diagonal). The sum of squares of each patch is a box filter over the squares of the input, so no patch is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext import ops
from plop_ext.layers.adapter import LayerAdapter, register_adapter
from plop_ext.layers.attributes import check_weight
from plop_ext.layers.linear import check_in_place
from plop_ext.layers.walk import plain_class

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@register_adapter
class ConvAdapter(LayerAdapter):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, with any stride, padding, dilation and groups."""

    kind = "convolution"
    priority = -10  # after `OwnForwardAdapter`

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, CONVOLUTIONS)

    def check(self, module: nn.Module) -> None:
        check_weight(module)
        check_in_place(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        conv = cast(nn.Conv2d, module)
        return conv.in_channels * conv.weight[0, 0].numel(), conv.out_channels

    def blocks(self, module: nn.Module) -> int:
        return cast(nn.Conv2d, module).groups

    def weight_rows(self, module: nn.Module) -> Tensor:
        return cast(nn.Conv2d, module).weight.flatten(1)

    def input_sumsq(self, module: nn.Module, x: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, module)
        x = x.detach() if x.dim() == conv.weight.dim() else x.detach().unsqueeze(0)
        padded = None if conv.padding_mode == "zeros" else (conv._reversed_padding_repeated_twice, conv.padding_mode)
        padding = conv.padding if padded is None else 0
        return patch_sumsq(x, conv.kernel_size, conv.stride, padding, conv.dilation, padded)

    def output(self, module: nn.Module, output: Any) -> Tensor:
        weight = cast(nn.Conv2d, module).weight
        return conv_rows(output if output.dim() == weight.dim() else output.unsqueeze(0))

    def probe(self, module: nn.Module, z: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, module)
        return self.apply_to_patches(module, z, conv.weight, conv.bias)

    def apply_to_patches(self, module: nn.Module, z: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply a kernel to single patches [P, K], without padding: one output position for each."""
        conv = cast(nn.Conv2d, module)
        patches = z.view(len(z), conv.in_channels, *conv.kernel_size)
        return _CONV[kernel.dim() - 2](patches, kernel, bias, groups=conv.groups).flatten(1)

    def against_lora(self, module: nn.Module) -> str:
        """Return why PEFT cannot adapt the module.

        PEFT makes A by the class of the module, from its channels, kernel size, stride and padding alone, and B with
        its groups. The sum of such a B A is not block-diagonal, so that PEFT cannot merge it.
        """
        conv = cast(nn.Conv2d, module)
        if conv.groups > 1:
            return "PEFT cannot merge LoRA into a grouped convolution"
        if any(step != 1 for step in conv.dilation) or conv.padding_mode != "zeros":
            return "PEFT makes LoRA of a convolution without its dilation and padding mode"
        kind, plain = plain_class(conv), _PLAIN[conv.weight.dim() - 2]
        if kind.forward is not plain.forward or kind.__init__ is not plain.__init__:
            return f"PEFT makes LoRA of a convolution by its class, and {kind.__name__} has a forward of its own"
        return ""


def conv_rows(y: Tensor) -> Tensor:
    """Return the output [N, M, *size] of a convolution as rows [N, positions, M]."""
    return y.flatten(2).transpose(1, 2)


def patch_sumsq(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    padded: tuple[Any, str] | None = None,
) -> Tensor:
    """Return the sums of squares [N * positions] of the patches that a convolution cuts out of its input.

    Args:
        x: [N, C, *size].
        kernel_size: As of the convolution, like the next three.
        stride: Distance of the patches.
        padding: Zeros around the input.
        dilation: Distance of the elements of a patch.
        padded: Extents and mode of a padding with other values than zeros, for `functional.pad`.
    """
    pixels = conv_rows(x)
    energy = torch.empty(pixels.shape[:-1].numel(), dtype=ops.sum_dtype(x.dtype), device=x.device)
    ops.row_sumsq_(energy, pixels)
    # float64: on CUDA a float32 convolution may run in TF32, which has three digits.
    energy = energy.double().view(len(x), 1, *x.shape[2:])
    if padded is not None:
        energy = functional.pad(energy, padded[0], mode=padded[1])
    box = torch.ones(1, 1, *kernel_size, dtype=energy.dtype, device=x.device)
    return _CONV[x.dim() - 2](energy, box, None, stride, padding, dilation).flatten()
