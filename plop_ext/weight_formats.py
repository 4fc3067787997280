"""The format that a configuration declares for quantized weights, and what to do about one that is misread.

A loader that does not know a format takes the codes for weights and ignores their scales: the model loads and runs,
and every score is wrong.
"""

from __future__ import annotations

from typing import Any

from plop_ext.errors import InputError

ORIGINAL = "give the 16-bit checkpoint that it was made from, or one in the format of compressed-tensors, FP8 or NF4"
# Stands for a format that a configuration does not name.
UNNAMED = "an unnamed format"
# What is known of formats that transformers does not know.
REASONS = {
    "exl2": "it is a format of ExLlamaV2",
    "exl3": "it is a format of ExLlamaV3",
    "mlx": "it is a format of MLX",
    "modelopt": "transformers does not read the scales of NVIDIA ModelOpt",
}


def declared(config: Any) -> tuple[Any, Any] | None:
    """Return the part of a configuration that declares a format, as transformers finds it, and what it declares."""
    for part in (config, _text_config(config)):
        settings = getattr(part, "quantization_config", None)
        if settings:
            return part, settings
    return None


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, TypeError, ValueError):  # no configuration of transformers, or one with several texts
        return None


def name_of(settings: Any) -> str:
    """Return the name of a declared format."""
    of = settings.get if isinstance(settings, dict) else lambda key: getattr(settings, key, None)
    if of("load_in_4bit") or of("load_in_8bit"):
        return "bitsandbytes"
    method = of("quant_method")
    return UNNAMED if method is None else str(getattr(method, "value", method))


def is_known(method: str) -> bool:
    """Return whether the installed transformers reads a format."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return method in {key.removesuffix("_4bit").removesuffix("_8bit") for key in AUTO_QUANTIZATION_CONFIG_MAPPING}


def reason_against(method: str) -> str:
    """Return why a format that transformers does not know is refused."""
    if method == UNNAMED:
        return "its quantization_config has no quant_method"
    return REASONS.get(method, "transformers does not know this format")


def refuse_misread(model: Any) -> None:
    """Raise an error for a loaded model whose format the loader did not know.

    A loader that knows the format replaces the declaration of config.json by an object of its own.

    Raises:
        InputError: If the model's weights are codes without their scales.
    """
    found = declared(getattr(model, "config", None))
    if found is None or not isinstance(found[1], dict):
        return
    method = name_of(found[1])
    if not is_known(method):
        raise InputError(
            f"`model` was loaded from a checkpoint that is quantized by {method}, without the scales of its weights:"
            f" {reason_against(method)}; {ORIGINAL} (if its weights are right, delete `config.quantization_config`)"
        )
