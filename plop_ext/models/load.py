"""Load a model and its tokenizer; refuse checkpoints that are incomplete, or that would be misread."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from plop_ext.arguments import check_flags, check_type
from plop_ext.errors import InputError, SetupError
from plop_ext.models import prefixes, quantization, sizes
from plop_ext.models.architecture import build_on_meta, model_class, read_config
from plop_ext.models.checkpoint import TensorEntry, stored_tensors
from plop_ext.models.code import Trust, ask_for_trust
from plop_ext.models.device import parse_device, parse_dtype
from plop_ext.models.direct import DirectWeights, EarlyReader, suits
from plop_ext.models.explained import explained, quiet
from plop_ext.models.source import Source, find
from plop_ext.models.tokenizer import load_tokenizer
from plop_ext.read_ahead import reading_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.distributed import DistributedConfig

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    for_training: bool = False,
    trust_remote_code: bool = False,
    distributed_config: DistributedConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer.

    A checkpoint that declares a causal language model, or no class, is loaded as a causal language model. Any other is
    loaded as the class that it declares, or without a head, so that encoders can be scored too. A checkpoint that
    lacks weights of the model is refused, because the missing weights would be random; one whose quantized weights
    would be read without their scales is refused as well. The sizes in config.json are compared with the files and
    the free memory before anything is allocated.

    Args:
        name_or_path: Folder of a model, such as a trainer's `checkpoint-500`; folder of an adapter, which is loaded on
            top of its base model; GGUF file, which is dequantized; name of a model on the hub; or `"plop-tiny"`, which
            ships with the package.
        dtype: Floating-point type of the weights: `"auto"` for the type in the checkpoint, a `torch.dtype`, or its
            name.
        device: Device to load to. Default CUDA if available, otherwise the CPU.
        attn_implementation: Attention implementation, such as `"eager"`, `"sdpa"` or `"flash_attention_2"`. Default
            the model's own.
        for_training: On a CPU, load the weights in float32 if `dtype` is `"auto"`, because half-precision matrix
            products are slow there.
        trust_remote_code: Run code that comes with the checkpoint. It can do anything that you can do on this
            machine: read it first.
        distributed_config: How the processes of torch.distributed share the weights
            (`transformers.distributed.DistributedConfig`). Default a whole model in each process.

    Returns:
        The model in eval mode, with the adapter if an adapter was named, and the tokenizer. A tokenizer without a
        padding token pads with the padding token of config.json, its end-of-sequence token, or token 0.

    Raises:
        InputError: If there is no such model, its files are damaged, incomplete or in a format that would be misread,
            if it does not fit the memory, or if an argument is out of range.
        SetupError: If the hub cannot be reached, or if a package that the model needs is missing.

    Example:
        >>> from plop_ext.models import load_model
        >>> model, tokenizer = load_model("plop-tiny", device="cpu")
        >>> model.training
        False
    """
    check_type((str, os.PathLike), "the name or folder of a model", name_or_path=name_or_path)
    check_type((str, type(None)), "a name, or None", attn_implementation=attn_implementation)
    check_flags(for_training=for_training, trust_remote_code=trust_remote_code)
    name_or_path = os.fspath(name_or_path)
    placed = parse_device(device)
    wanted = parse_dtype(dtype)
    if for_training and placed.type == "cpu" and wanted == "auto":
        wanted = torch.float32
    source = find(name_or_path, code=trust_remote_code)
    with reading_ahead(source.folder), EarlyReader(placed) as early, quiet():
        trust = ask_for_trust(name_or_path, source.folder, trust_remote_code)
        config = read_config(source, trust)
        tokenizer = load_tokenizer(source, config, trust)
        model = _load_base(source, config, trust, wanted, placed, attn_implementation, early, distributed_config)
        # Scores and adapters record this name. The folder of the packaged model depends on the environment.
        model.name_or_path = model.config.name_or_path = name_or_path
        if source.adapter is not None:
            model = _with_adapter(model, source)
    return model.eval(), tokenizer


def _load_base(
    source: Source,
    config: Any,
    trust: Trust,
    dtype: str | torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    early: EarlyReader,
    shared: DistributedConfig | None,
) -> Any:
    """Load the weights, after all that can be checked without them."""
    name = source.name
    stored = {} if source.gguf else stored_tensors(source.folder)
    method = quantization.prepare(name, source.folder, config)
    sizes.check_counts(name, config, stored)
    empty = build_on_meta(name, config, trust)
    names = empty.state_dict().keys()
    renamed = prefixes.renamings(name, stored, names)
    if method is None and not trust.given:
        leaves = {key.rpartition(".")[2] for key in names}
        unread = [key for key in stored if key.rpartition(".")[2] not in leaves]
        quantization.refuse_unread_scales(name, unread, stored, method)
    sizes.check_files(name, empty, stored)
    if shared is None:
        sizes.check_memory(name, _needed(empty, config, stored, method, dtype), device)
    plain = shared is None and method is None and not (source.gguf or renamed or trust.given or trust.asked)
    reader = early.take() if plain and suits(empty, stored, dtype) else None
    concrete = type(empty)
    del empty

    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if shared is not None:
        options["distributed_config"] = shared
    elif device.type != "cpu":
        # Straight to the device, which quantized checkpoints require.
        options["device_map"] = {"": device}
    if renamed:
        options["key_mapping"] = renamed
    if source.gguf:
        options |= _dequantized_gguf(source.gguf)
    options |= {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, where the error can name them
    }
    cls, own_code = model_class(config, trust)
    try:
        with explained(name, "weights"):
            if reader is None:
                model, report = cls.from_pretrained(str(source.folder), **own_code, **options)
            else:
                with DirectWeights(stored, reader) as weights:
                    model, report = concrete.from_pretrained(None, state_dict=weights.state_dict, **options)
                _read_generation_config(model, source)
    except SetupError as error:
        packages = quantization.packages_for(method)
        if packages is None:
            raise
        raise SetupError(f"`name_or_path` {name!r} is stored as {method}; pip install {packages} ({error})") from error
    quantization.refuse_unread_scales(name, report["unexpected_keys"], stored, method)
    _refuse_incomplete(name, model, report)
    prefixes.forget(model, renamed)
    return model


def _read_generation_config(model: Any, source: Source) -> None:
    """Set the generation settings of the folder, as `from_pretrained` does for a folder."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    folder = str(source.folder)
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # none, or a damaged one: older models have these settings in config.json
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


def _needed(
    empty: Any, config: Any, stored: dict[str, TensorEntry], method: str | None, dtype: str | torch.dtype
) -> int:
    """Return the memory of the loaded weights."""
    if method is not None and not quantization.is_dequantized(method):
        return sum(entry.n_bytes for entry in stored.values())
    if not isinstance(dtype, torch.dtype):
        types = (entry.dtype for entry in stored.values() if entry.dtype is not None)
        of_files = next((dtype for dtype in types if dtype.is_floating_point), torch.float32)
        declared = getattr(config, "dtype", None)
        dtype = declared if isinstance(declared, torch.dtype) else of_files
    return sizes.loaded_bytes(empty, dtype)


def _dequantized_gguf(file: str) -> dict[str, Any]:
    from transformers import GgufConfig

    return {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}


def _refuse_incomplete(name: str, model: Any, report: dict[str, Any]) -> None:
    """Raise an error for weights that the checkpoint lacks, or holds in another shape."""
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


def _with_adapter(model: Any, source: Source) -> Any:
    """Put the adapter on its base model, and say what is scored."""
    from peft import PeftModel

    with explained(source.name, "adapter"):
        adapted = PeftModel.from_pretrained(model, str(source.adapter))
    logger.warning(
        "%s is an adapter: the weights of its base model are scored, on the inputs that the adapted model gives them",
        source.name,
    )
    return adapted
