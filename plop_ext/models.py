"""Load a model and its tokenizer; refuse incomplete checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plop_ext import demo_assets
from plop_ext.errors import InputError, SetupError, first_line
from plop_ext.hub import cached_when_offline

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    for_training: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer.

    A checkpoint that declares a causal language model, or no class, is loaded as a causal language model. Any other is
    loaded as the class that it declares, or without a head, so that encoders can be scored too. A checkpoint that
    lacks weights of the model is refused, because the missing weights would be random.

    Args:
        name_or_path: Folder of a model, name of a model on the hub, or `"plop-tiny"`, which ships with the package.
        dtype: Floating-point type of the weights: `"auto"` for the type in the checkpoint, a `torch.dtype`, or its
            name.
        device: Device to load to. Default CUDA if available, otherwise the CPU.
        attn_implementation: Attention implementation, such as `"eager"`, `"sdpa"` or `"flash_attention_2"`. Default
            the model's own.
        for_training: On a CPU, load the weights in float32 if `dtype` is `"auto"`, because half-precision matrix
            products are slow there.

    Returns:
        The model in eval mode, and the tokenizer, which pads with its end-of-sequence token if it has no padding
        token.

    Raises:
        InputError: If there is no such model, its files are damaged or incomplete, or an argument is out of range.
        SetupError: If the hub cannot be reached, or if a package that the model needs is missing.

    Example:
        >>> from plop_ext.models import load_model
        >>> model, tokenizer = load_model("plop-tiny", device="cpu")
        >>> model.training
        False
    """
    placed = parse_device(device)
    wanted = parse_dtype(dtype)
    if for_training and placed.type == "cpu" and wanted == "auto":
        wanted = torch.float32
    if name_or_path == demo_assets.MODEL_NAME:
        return _load(name_or_path, str(demo_assets.model_path()), wanted, placed, attn_implementation)
    folder = Path(name_or_path).expanduser()
    if is_model_folder(name_or_path, folder):
        return _load(name_or_path, str(folder), wanted, placed, attn_implementation)
    with cached_when_offline() as online:
        try:
            return _load(name_or_path, name_or_path, wanted, placed, attn_implementation)
        except InputError as error:
            if online:
                raise
            raise SetupError(
                f"`name_or_path` {name_or_path!r} is no local folder, and the hub cannot be reached; give the folder"
                f" of a model, or {demo_assets.MODEL_NAME}"
            ) from error


def _load(
    name: str, source: str, dtype: str | torch.dtype, device: torch.device, attn_implementation: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from the folder or hub name `source`, called `name` in errors."""
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if device.type != "cpu":
        # Straight to the device, which quantized checkpoints require.
        options["device_map"] = {"": device}
    with quiet():
        with explained(name, "config"):
            config = AutoConfig.from_pretrained(source)
        with explained(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source)
        with explained(name, "weights"):
            model, report = model_class(config).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, where the error can name them
                **options,
            )
    for key, found, wanted in report["mismatched_keys"]:
        raise InputError(
            f"`name_or_path` {name!r}: the checkpoint holds {key} as {tuple(found)}, and config.json asks for"
            f" {tuple(wanted)}; download or save it again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"`name_or_path` {name!r}: the checkpoint lacks {len(missing)} of the weights of {type(model).__name__},"
            f" such as {missing[0]}; download or save it again"
        )
    if report["unexpected_keys"]:
        logger.info("%s: %d weights of the checkpoint are not used", name, len(report["unexpected_keys"]))
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    # Scores and adapters record this name. The folder of the packaged model depends on the environment.
    model.name_or_path = model.config.name_or_path = name
    return model.eval(), tokenizer


def model_class(config: Any) -> Any:
    """Return the class to load a checkpoint with."""
    import transformers

    declared = (getattr(config, "architectures", None) or [""])[0]
    if not declared or declared.endswith(_CAUSAL_SUFFIXES):
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return getattr(transformers, declared, transformers.AutoModel)


def is_model_folder(name: str, folder: Path) -> bool:
    """Return whether `folder` holds a model; False if the folder does not exist and `name` may be on the hub."""
    if folder.is_file():
        raise InputError(f"`name_or_path` {name} is a file; give the folder that holds the model's config.json")
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or not name.strip():
            raise InputError(f"`name_or_path` {name!r}: no such folder; check the path")
        return False
    if (folder / "config.json").is_file():
        return True
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "its base model"
        raise InputError(f"`name_or_path` {name} is an adapter, not a model; give {base}")
    raise InputError(f"`name_or_path` {name} holds no model: it has no config.json; give a folder that has one")


@contextmanager
def explained(name: str, part: str) -> Iterator[None]:
    """Turn any failure to load within the block into a one-line error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        raise SetupError(f"`name_or_path` {name!r} needs a package: {first_line(error)}; install it") from error
    except Exception as error:
        if "attn_implementation" in str(error):
            raise InputError(f"`attn_implementation` does not suit {name!r}: {first_line(error)}") from error
        what = {
            "config": "config.json cannot be used",
            "tokenizer": "the tokenizer cannot be loaded",
            "weights": "the weights cannot be loaded",
        }[part]
        raise InputError(
            f"`name_or_path` {name!r}: {what} ({first_line(error)}); check the name, or download or save it again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers; this module raises errors for their contents."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return the device, by default CUDA if available, or raise an error that names it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` {device!r} is no device; give cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SetupError(
            f"`device` {device}: torch sees {torch.cuda.device_count()} CUDA devices; use another, or cpu"
        )
    return chosen


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return `"auto"` or the floating-point type of that name, or raise an error that names it."""
    chosen = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if chosen != "auto" and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise InputError(f"`dtype` {dtype!r} is no floating-point type; give auto, float32, bfloat16 or float16")
    return chosen
