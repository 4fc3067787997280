"""Quantized weights: the norm of the values that the forward applies, dequantized a few rows at a time.

The raw values of a quantized weight are codes, whose norm has no meaning. Each adapter here dequantizes in chunks of
about a million values. Formats without a dequantizer are measured through their forward (`opaque.py`). Libraries are
looked up in `sys.modules`, never imported: their modules cannot exist before they are imported.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.layers.adapter import LayerAdapter, Unsupported, register_adapter
from plop_ext.layers.attributes import attribute, check_weight, tensor

CHUNK_ELEMENTS = 1 << 20


def _is_a(module: nn.Module, home: str, name: str) -> bool:
    """Return whether the module is of a class, or of a subclass without a forward of its own."""
    cls = getattr(sys.modules.get(home), name, None)
    return cls is not None and isinstance(module, cls) and type(module).forward is cls.forward


def _row_chunks(rows: int, row_length: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows with about `CHUNK_ELEMENTS` elements, each starting at a multiple of `multiple`."""
    step = multiple * max(1, CHUNK_ELEMENTS // (row_length * multiple))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@register_adapter
class TensorSubclassAdapter(LayerAdapter):
    """torchao: an ordinary `nn.Linear` whose weight is a tensor subclass with `dequantize`."""

    kind = "torchao"
    weights = "dequantized"

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        weight = tensor(module, "weight")
        if weight is None:
            return False
        data = weight.data
        return type(data) is not Tensor and type(data).__module__.startswith("torchao") and hasattr(data, "dequantize")

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        weight: Any = module.weight
        rows, row_length = weight.shape
        try:
            weight[:1].dequantize()
        except (NotImplementedError, AttributeError, TypeError, RuntimeError, AssertionError):
            yield weight.dequantize()  # a layout that cannot be sliced: the whole weight at once
            return
        for start, stop in _row_chunks(rows, row_length):
            yield weight[start:stop].dequantize()

    def dtype(self, module: nn.Module) -> torch.dtype:
        weight: Any = module.weight
        return weight.dtype


@register_adapter
class BitsAndBytes4bitAdapter(LayerAdapter):
    """`bitsandbytes.nn.Linear4bit`: NF4 and FP4, with or without quantized statistics."""

    kind = "bitsandbytes 4-bit"
    weights = "dequantized"

    def matches(self, module: nn.Module) -> bool:
        return _is_a(module, "bitsandbytes.nn", "Linear4bit")

    def check(self, module: nn.Module) -> None:
        if getattr(tensor(module, "weight"), "quant_state", None) is None:
            raise Unsupported("its weight is not quantized yet; move the model to its device first")

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        functional: Any = sys.modules["bitsandbytes.functional"]
        weight: Any = module.weight
        data, state = weight.data, weight.quant_state
        absmax, nested = state.absmax, state.nested
        if getattr(state, "packing_format_for_cpu", False):
            # The first forward on some CPUs packs the codes and transposes the scales, as [K / blocksize, M].
            # The library's inverse leaves plain scales transposed, and quantizes nested ones once more.
            absmax = absmax.T.reshape(-1)
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        codes = data.view(torch.uint8).reshape(-1)
        if nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        in_features, out_features = self.features(module)
        for start, stop in _row_chunks(
            out_features, in_features, state.blocksize // math.gcd(in_features, state.blocksize)
        ):
            begin, end = start * in_features, stop * in_features
            part = functional.QuantState(
                absmax=absmax[begin // state.blocksize : -(-end // state.blocksize)].float(),
                shape=torch.Size((stop - start, in_features)),
                code=state.code,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                dtype=state.dtype,
            )
            yield functional.dequantize_4bit(codes[begin // 2 : -(-end // 2)].view(-1, 1), part)

    def dtype(self, module: nn.Module) -> torch.dtype:
        layer: Any = module
        return layer.compute_dtype or layer.weight.quant_state.dtype


@register_adapter
class BitsAndBytes8bitAdapter(LayerAdapter):
    """`bitsandbytes.nn.Linear8bitLt`: int8 codes with one scale per row."""

    kind = "bitsandbytes 8-bit"
    weights = "dequantized"

    def matches(self, module: nn.Module) -> bool:
        return _is_a(module, "bitsandbytes.nn", "Linear8bitLt")

    def check(self, module: nn.Module) -> None:
        weight = tensor(module, "weight")
        if weight is None or weight.dtype != torch.int8 or self._scales(module) is None:
            raise Unsupported("its weight is not quantized yet; move the model to its device first")

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        weight: Any = module.weight
        scales = self._scales(module).float() / 127
        rows, row_length = weight.shape
        for start, stop in _row_chunks(rows, row_length):
            yield weight.data[start:stop].float() * scales[start:stop, None]

    def dtype(self, module: nn.Module) -> torch.dtype:
        return torch.float16

    @staticmethod
    def _scales(module: nn.Module) -> Any:
        layer: Any = module
        scales = getattr(layer.weight, "SCB", None)
        return scales if scales is not None else getattr(layer.state, "SCB", None)


@register_adapter
class CompressedTensorsAdapter(LayerAdapter):
    """A layer that compressed-tensors has not decompressed yet: of any class, with codes or without a weight.

    Its library decompresses the whole model in place before the first forward, which makes it an ordinary layer.
    """

    kind = "compressed-tensors"

    def matches(self, module: nn.Module) -> bool:
        status = attribute(module, "quantization_status")
        return getattr(status, "value", status) == "compressed"

    def check(self, module: nn.Module) -> None:
        raise Unsupported(
            "its weights are compressed; load it with `quantization_config=CompressedTensorsConfig(dequantize=True)`,"
            " or with `plop_ext.models.load_model`"
        )


@register_adapter
class FP8LinearAdapter(LayerAdapter):
    """transformers' `FP8Linear` (DeepSeek-V3 checkpoints): float8 with one scale per block or per tensor."""

    kind = "fine-grained FP8"
    weights = "dequantized"

    def matches(self, module: nn.Module) -> bool:
        return _is_a(module, "transformers.integrations.finegrained_fp8", "FP8Linear")

    def check(self, module: nn.Module) -> None:
        check_weight(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        layer: Any = module
        weight, scale = layer.weight.data, layer.weight_scale_inv.data.float()
        block = layer.block_size
        rows, row_length = weight.shape
        for start, stop in _row_chunks(rows, row_length, 1 if block is None else block[0]):
            values = weight[start:stop].float()
            if block is not None:
                blocks = scale[start // block[0] : -(-stop // block[0])]
                blocks = blocks.repeat_interleave(block[0], dim=0)[: stop - start]
                values *= blocks.repeat_interleave(block[1], dim=1)[:, : values.shape[1]]
            elif weight.element_size() == 1:
                values *= scale
            yield values

    def dtype(self, module: nn.Module) -> torch.dtype:
        return torch.bfloat16


@register_adapter
class HQQAdapter(LayerAdapter):
    """`hqq.core.quantize.HQQLinear`: groups of codes with a zero and a scale."""

    kind = "HQQ"
    weights = "dequantized"

    def matches(self, module: nn.Module) -> bool:
        return _is_a(module, "hqq.core.quantize", "HQQLinear")

    def check(self, module: nn.Module) -> None:
        if not attribute(module, "ready"):
            raise Unsupported("its weight is not quantized yet")

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        out_features, in_features = layer.meta["shape"]
        return in_features, out_features

    def weight_rows(self, module: nn.Module) -> Tensor:
        """Return the whole matrix at once, because groups extend across rows, in the type of the forward."""
        layer: Any = module
        return layer.dequantize()

    def dtype(self, module: nn.Module) -> torch.dtype:
        layer: Any = module
        return layer.compute_dtype
