"""A model without weights, its repeated blocks, and the layers to score in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers import Discovery, Elsewhere, LinearLayer, discover, weights_elsewhere
from plop_ext.models import quantization, sizes
from plop_ext.models.architecture import build as build_model
from plop_ext.models.architecture import read_config
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.models.code import NO_CODE, Trust
from plop_ext.models.explained import explained, quiet
from plop_ext.models.source import Source

ALTERNATIVE = 'load it with `device_map="auto"` and give it to `plop_ext.score` instead'

# Quantizers whose layers are recognized before, and complete after, their tensors are read.
_QUANTIZERS = ("bitsandbytes", "fp8", "compressed-tensors", "mxfp4")


@dataclass(frozen=True)
class Skeleton:
    """A model before any of its weights is read.

    Attributes:
        model: The model with its parameters on the meta device and its buffers on the CPU, in eval mode.
        dtype: Type of its loaded floating-point weights.
        quantizer: Quantizer of transformers for a quantized checkpoint; None for any other.
        prefix: Name of the list of blocks.
        blocks: The list itself.
        found: The layers to score, all of them in blocks.
        last: Index of the last block that holds one.
        running: All linear layers of the blocks up to `last`, scored or not, which run and take memory.
    """

    model: Any
    dtype: torch.dtype
    quantizer: Any
    prefix: str
    blocks: nn.ModuleList
    found: Discovery
    last: int
    running: tuple[LinearLayer, ...]

    def block_of(self, name: str) -> int | None:
        """Return the index of the block that holds a module or parameter."""
        return _index_in(self.prefix, name)


def build(
    source: Source,
    checkpoint: Checkpoint | None,
    *,
    trust: Trust = NO_CODE,
    dtype: str | torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    scope: str = "language",
) -> Skeleton:
    """Build the model that config.json describes, without weights, and find what to score.

    Args:
        source: The model.
        checkpoint: The checkpoint's tensors; None if only config.json is there.
        trust: Whether code of the checkpoint may run.
        dtype: Type of the weights; `"auto"` uses that of config.json, or else that of the checkpoint.
        device: Device of the run.
        attn_implementation: Attention kernel; None uses the model's default.
        include: As for `plop_ext.score`.
        exclude: As for `plop_ext.score`.
        scope: As for `plop_ext.score`.

    Raises:
        InputError: If the model cannot be built, or its layers are not in one list of blocks.
    """
    model, resolved, quantizer = _meta_model(source, trust, checkpoint, dtype, device, attn_implementation)
    with _weights_elsewhere(model):
        found = discover(model, include=include, exclude=exclude, scope=scope)
        everything = discover(model, scope="all").layers
    lists = {layer.name: _block_list(model, layer.name) for layer in found.layers}
    for name, prefix in lists.items():
        if prefix is None:
            raise InputError(f"`{name}` is in no list of repeated blocks: it cannot be streamed; {ALTERNATIVE}")
    prefixes = sorted({prefix for prefix in lists.values() if prefix is not None})
    if len(prefixes) > 1:
        raise InputError(
            f"the layers to score are in {len(prefixes)} lists of blocks ({', '.join(prefixes)}), and one can be "
            f"streamed; choose by `include`, `exclude` or `scope`, or {ALTERNATIVE}"
        )
    prefix = prefixes[0]
    blocks = model.get_submodule(prefix)
    last = max(index for index in (_index_in(prefix, name) for name in lists) if index is not None)
    places = [(layer, _index_in(prefix, layer.name)) for layer in everything]
    running = tuple(layer for layer, index in places if index is not None and index <= last)
    return Skeleton(model, resolved, quantizer, prefix, blocks, found, last, running)


def _index_in(prefix: str, name: str) -> int | None:
    """Return the index of the item of the list `prefix` that holds the module or parameter `name`."""
    if not name.startswith(prefix + "."):
        return None
    return int(name[len(prefix) + 1 :].partition(".")[0])


def _meta_model(
    source: Source,
    trust: Trust,
    checkpoint: Checkpoint | None,
    dtype: str | torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
) -> tuple[Any, torch.dtype, Any]:
    from accelerate import init_empty_weights
    from transformers.quantizers.auto import get_hf_quantizer

    name, stored = source.name, {} if checkpoint is None else checkpoint.entries
    with quiet():
        config = read_config(source, trust)
        method = quantization.prepare(name, source.folder, config)
        if method not in (None, *_QUANTIZERS):
            raise InputError(f"checkpoints quantized by {method} cannot be streamed; {ALTERNATIVE}")
        sizes.check_counts(name, config, stored)
        quantizer = None
        if method is not None:
            with explained(name, "config"):
                quantizer, config, _ = get_hf_quantizer(config, None, {"": device}, True, {})
        resolved = dtype
        if not isinstance(resolved, torch.dtype):
            of_files = None if checkpoint is None else checkpoint.float_dtype()
            resolved = getattr(config, "dtype", None) or of_files or torch.float32
        if quantizer is not None and hasattr(quantizer, "update_dtype"):
            resolved = quantizer.update_dtype(resolved)
        model = build_model(
            name, config, trust, resolved, attn_implementation, init_empty_weights(include_buffers=False)
        )
        sizes.check_files(name, model, stored)
        if quantizer is not None:
            with explained(name, "weights"):
                quantizer.preprocess_model(
                    model=model, dtype=resolved, device_map={"": device}, checkpoint_files=None, use_kernels=False
                )
    model.name_or_path = model.config.name_or_path = name
    model.requires_grad_(False)
    return model.eval(), resolved, quantizer


def output_head(model: Any) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, if the model has one."""
    return _asked(model, "get_output_embeddings")


def input_embedding(model: Any) -> nn.Module | None:
    """Return the table of token embeddings, if the model has one."""
    return _asked(model, "get_input_embeddings")


def _asked(model: Any, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):  # models without tokens
        return None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _weights_elsewhere(model: nn.Module) -> Iterator[None]:
    """Make weights on the meta device count as present, and quantized ones as quantized, within the block."""
    weights = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(weight).__module__.startswith("bitsandbytes"):
            weights.append((module, weight))
            module._parameters["weight"] = _quantized_stand_in(weight)
    try:
        with weights_elsewhere(model):
            yield
    finally:
        for module, weight in weights:
            module._parameters["weight"] = weight


def _quantized_stand_in(weight: Any) -> Any:
    """Return a weight of bitsandbytes that counts as quantized, as the loaded one will."""
    stand_in: Any = nn.Parameter(torch.empty(weight.shape, dtype=torch.int8, device="meta"), requires_grad=False)
    stand_in.quant_state = stand_in.SCB = Elsewhere
    return stand_in


def _block_list(model: nn.Module, name: str) -> str | None:
    """Return the name of the outermost list of modules that holds `name`."""
    parts = name.split(".")
    module: Any = model
    for position, part in enumerate(parts):
        if isinstance(module, nn.ModuleList):
            return ".".join(parts[:position])
        module = getattr(module, part, None)
    return None
