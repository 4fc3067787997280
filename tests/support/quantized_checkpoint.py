"""Checkpoints in the formats of other tools, written by hand, and the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.edited_checkpoint import edit_config, edit_weights

FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_GROUP = 32


def is_linear(key: str) -> bool:
    """Return whether a weight is one that quantizers convert."""
    return ".layers." in key and key.endswith("_proj.weight")


def to_fp8(
    folder: Path, scale: str, extra: dict[str, Tensor] | None = None, per_row: bool = False
) -> dict[str, Tensor]:
    """Store linear weights as float8 codes with one scale each, or one a row; return what they stand for.

    `scale` is the name of the scales, and `extra` goes beside each of them.
    """
    meant: dict[str, Tensor] = {}

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = dict(weights)
        for key, weight in weights.items():
            if not is_linear(key):
                continue
            most = weight.float().abs().amax(dim=1, keepdim=True) if per_row else weight.float().abs().max()
            factor = (most / _FP8_MAX).reshape(-1, 1)
            stored[key] = (weight.float() / factor).to(FP8)
            stem = key.removesuffix("weight")
            stored[stem + scale] = factor
            stored |= {stem + name: value for name, value in (extra or {}).items()}
            meant[key] = stored[key].float() * factor
        return stored

    edit_weights(folder, change)
    return meant


def to_int4(folder: Path) -> dict[str, Tensor]:
    """Store linear weights as compressed-tensors' pack-quantized 4-bit codes in groups; return what they stand for."""
    meant: dict[str, Tensor] = {}

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = {key: value for key, value in weights.items() if not is_linear(key)}
        for key in filter(is_linear, weights):
            weight = weights[key].float()
            groups = weight.view(len(weight), -1, _GROUP)
            factor = (groups.abs().amax(dim=2, keepdim=True) / 7).bfloat16().float()
            codes = (groups / factor).round().clamp(-8, 7).to(torch.int64).view_as(weight)
            shifts = 4 * torch.arange(8)
            packed = (((codes + 8).view(len(weight), -1, 8)) << shifts).sum(dim=2)
            stem = key.removesuffix("weight")
            stored[stem + "weight_packed"] = (packed - ((packed >> 31) << 32)).to(torch.int32)
            stored[stem + "weight_scale"] = factor.squeeze(2).bfloat16()
            stored[stem + "weight_shape"] = torch.tensor(weight.shape)
            meant[key] = (codes.view_as(groups) * factor).view_as(weight)
        return stored

    edit_weights(folder, change)
    return meant


def to_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Store the experts of gpt-oss as random MXFP4 codes: 4 bits each, a power of two for 32; return their values."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([levels, -levels])
    meant: dict[str, Tensor] = {}

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = dict(weights)
        for key, weight in weights.items():
            if not key.endswith(("gate_up_proj", "down_proj")):
                continue
            experts, in_features, out_features = weight.shape
            codes = torch.randint(0, 16, (experts, out_features, in_features // 32, 32))
            exponents = torch.randint(120, 124, codes.shape[:-1])
            low, high = codes[..., 0::2], codes[..., 1::2]
            del stored[key]
            stored[key + "_blocks"] = (low | high << 4).to(torch.uint8)
            stored[key + "_scales"] = exponents.to(torch.uint8)
            values = levels[codes] * 2.0 ** (exponents - 127)[..., None]
            meant[key] = values.view(experts, out_features, in_features).transpose(1, 2)
        return stored

    edit_weights(folder, change)
    return meant


def compressed_tensors(folder: Path, bits: int, kind: str, strategy: str, layout: str, **weights: Any) -> None:
    """Declare the format in config.json as llm-compressor does."""
    scheme = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    edit_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "format": layout}},
        },
    )
