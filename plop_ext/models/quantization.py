"""How quantized checkpoints are read; one that would be misread is refused before it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plop_ext.errors import InputError
from plop_ext.models.checkpoint import TensorEntry
from plop_ext.weight_formats import ORIGINAL, declared, is_known, name_of, reason_against

# Read as plain weights of the model's type, because layers of these formats cannot be scored as they are stored.
_DEQUANTIZED = ("compressed-tensors", "mxfp4")
# Packages that the loader of a format needs, where its own error names a module.
_PACKAGES = {
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "quark": "amd-quark",
    "torchao": "torchao",
}
# Names of scale tensors, and the formats that have them.
_FORMATS = {
    r"weight_scale_inv": "fine-grained FP8",
    r"qzeros|scales": "GPTQ, AWQ or MXFP4",
    r"absmax|quant_map|scb": "bitsandbytes",
    r"weight_scale(_2)?|weight_global_scale": "ModelOpt or compressed-tensors",
}
_SCALE = re.compile(r"scale|absmax|quant_map|qzeros|^scb$", re.IGNORECASE)
# Scales of activations and of the key-value cache do not change what W is.
_NOT_OF_A_WEIGHT = re.compile(r"(input|output|act|activation|q|k|v|kv|prob|softmax)_", re.IGNORECASE)


def method_of(config: Any) -> str | None:
    """Return the name of the format that a configuration declares, or None."""
    found = declared(config)
    return None if found is None else name_of(found[1])


def prepare(name: str, folder: Path, config: Any) -> str | None:
    """Check that transformers knows a checkpoint's format, and set in `config` how to read it.

    Args:
        name: The model, as the user named it.
        folder: Its folder.
        config: Its configuration, which is changed.

    Returns:
        The format; None for a checkpoint that declares none.

    Raises:
        InputError: If transformers does not know the format.
    """
    found = declared(config)
    if found is None:
        algorithm = _modelopt_algorithm(folder / "hf_quant_config.json")
        if algorithm is not None:
            raise _unknown(name, "modelopt", f"{algorithm}, says its hf_quant_config.json")
        return None
    owner, settings = found
    method = name_of(settings)
    if not is_known(method):
        raise _unknown(name, method, "says its config.json")
    if method in _DEQUANTIZED and isinstance(settings, dict):
        owner.quantization_config = {**settings, "dequantize": True}
    return method


def is_dequantized(method: str) -> bool:
    """Return whether a format is loaded as plain weights of the model's type."""
    return method in _DEQUANTIZED


def packages_for(method: str | None) -> str | None:
    """Return the packages that loading a format needs, for `pip install`; None if the loader's error names them."""
    return _PACKAGES.get(method or "")


def refuse_unread_scales(
    name: str, unread: Iterable[str], stored: Mapping[str, TensorEntry], method: str | None
) -> None:
    """Raise an error if scales are not read that belong to codes in the checkpoint.

    Args:
        name: The model, as the user named it.
        unread: Keys of the checkpoint that the model does not use.
        stored: All tensors of the checkpoint.
        method: The format that the checkpoint declares, or None.
    """
    with_codes = {_parent(key) for key, entry in stored.items() if entry.holds_codes and not _is_scale(key)}
    with_codes |= {key for key, entry in stored.items() if entry.holds_codes}
    scales = sorted(key for key in unread if _is_scale(key) and _parent(key) in with_codes)
    if not scales:
        return
    leaf = scales[0].rpartition(".")[2]
    kind = next((kind for pattern, kind in _FORMATS.items() if re.search(f"(?:{pattern})$", leaf, re.I)), "unknown")
    if method is None:
        fix = f"if its config.json has lost its quantization_config, download it again; otherwise {ORIGINAL}"
    else:
        fix = f"transformers does not read them as {method}, the format in its config.json; {ORIGINAL}"
    raise InputError(
        f"`name_or_path` {name!r} holds quantized weights whose {len(scales)} scales would be ignored, such as"
        f" {scales[0]} (format: {kind}), so that all scores would be wrong; {fix}"
    )


def _modelopt_algorithm(path: Path) -> str | None:
    """Return the algorithm in the file in which ModelOpt describes its exports; None if the weights are plain."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(found) if found else None


def _unknown(name: str, method: str, where: str) -> InputError:
    return InputError(
        f"`name_or_path` {name!r} is quantized by {method} ({where}): {reason_against(method)}; {ORIGINAL}"
    )


def _is_scale(key: str) -> bool:
    leaf = key.rpartition(".")[2]
    return bool(_SCALE.search(leaf)) and not _NOT_OF_A_WEIGHT.match(leaf)


def _parent(key: str) -> str:
    return key.rpartition(".")[0]
