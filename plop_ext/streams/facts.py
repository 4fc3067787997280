"""What the configuration of a model says about its rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.layers.streams import ModelStreams
from plop_ext.layers.walk import base_model

# By modality, the ids that stand for its items in `input_ids`.
_PLACEHOLDERS = {
    "images": ("image_token_id", "image_token_index", "image_patch_id"),
    "videos": ("video_token_id", "video_token_index"),
    "clips": ("audio_token_id", "audio_token_index"),
}
# Numbers of learned rows: of a resampler or a decoder per image, and of a model of text per sample.
_QUERIES = ("num_latents", "num_query_tokens", "num_queries", "resampler_n_latents", "num_mask_tokens")
_LATENTS = ("num_latents", "num_global_tokens")
# Multiples to which models pad the sequence.
_MULTIPLES = ("attention_window", "block_size", "context_size", "local_attn_chunk_length", "lsh_attn_chunk_length")
_LENGTHS = (
    "_get_feat_extract_output_lengths",
    "_get_subsampling_output_length",
    "_get_subsampling_output_lengths",
    "_get_output_length",
)

# Models that put the rows of the image before the tokens of the text, or a class token after them.
_STARTS_WITH_IMAGE = frozenset({"git"})
_ENDS_WITH_CLASS = frozenset({"videoprism_text_model"})

# Models whose ids are [B * num_codebooks, T]: a row per codebook of each sample.
_ROW_PER_CODEBOOK = frozenset({"musicgen_decoder", "musicgen_melody_decoder"})

Lengths = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the rows of a model before any batch.

    Attributes:
        main: Stream of the model's main input.
        encodes: Whether the model has an encoder and a decoder of tokens.
        pad_token_id: Id of padding in the decoder's ids, or None.
        placeholders: Ids in `input_ids` that stand for images, videos and clips.
        patch_sizes: Sizes of an image patch, in pixels.
        codebooks: Rows of ids per sequence.
        virtual: Rows that prompt tuning puts before the tokens of a sequence, and that do not count.
        before: Numbers of rows of the model's own that stand before the tokens: prompts, or an image.
        after: Numbers of rows of the model's own that stand after them.
        pools: The model may keep every n-th token only, for one of these n.
        repeats: The model may read each token this many times, sequence by sequence.
        multiples: The model may pad sequences on the right to a multiple of one of these.
        staggered: The model may shift sequences by half of one of these blocks, which it pads on both sides.
        tables: Lengths of tables of relative positions, which some models multiply with the weights of attention.
        latents: Numbers of learned rows per sequence of tokens.
        queries: Numbers of learned rows per image or clip.
        ignores_segments: The model's attention reads any number in a mask as 1, as all of transformers does, unless
            Axolotl replaced the part that reads masks for flash attention.
        lengths: Functions from the length of a sound clip to the number of its rows.
    """

    main: str
    encodes: bool
    pad_token_id: int | None
    placeholders: dict[str, frozenset[int]]
    patch_sizes: frozenset[int]
    codebooks: int
    virtual: int
    before: frozenset[int]
    after: frozenset[int]
    pools: frozenset[int]
    repeats: frozenset[int]
    multiples: frozenset[int]
    staggered: frozenset[int]
    tables: frozenset[int]
    latents: frozenset[int]
    queries: frozenset[int]
    ignores_segments: bool
    lengths: tuple[Lengths, ...]


def facts_of(model: nn.Module) -> ModelFacts:
    """Read the facts from the configuration and the methods of `model`."""
    configs = list(_configs(getattr(base_model(model), "config", None)))

    def numbers(names: tuple[str, ...]) -> frozenset[int]:
        return frozenset(n for config in configs for name in names for n in _integers(getattr(config, name, None)))

    streams = ModelStreams(model)
    kinds = {getattr(config, "model_type", None) for config in configs}
    root: Any = base_model(model)
    pad = getattr(getattr(root, "config", None), "pad_token_id", None)
    return ModelFacts(
        main=streams.main,
        encodes=streams.pairs,
        pad_token_id=pad if isinstance(pad, int) else None,
        placeholders={what: numbers(names) for what, names in _PLACEHOLDERS.items()},
        patch_sizes=numbers(("patch_size",)) - {0},
        codebooks=next((c.num_codebooks for c in configs if getattr(c, "model_type", None) in _ROW_PER_CODEBOOK), 1),
        virtual=_virtual_tokens(model),
        before=frozenset(_before(configs)) | frozenset(_image_rows(configs) if kinds & _STARTS_WITH_IMAGE else ()),
        after=frozenset({1}) if kinds & _ENDS_WITH_CLASS else frozenset(),
        pools=frozenset(2**block for config in configs for block in range(1, _pooled_blocks(config))),
        repeats=frozenset(n + more for n in numbers(("ngram",)) for more in (0, 1)) - {1},
        multiples=numbers(_MULTIPLES) - {0, 1},
        staggered=frozenset(config.block_size for config in configs if getattr(config, "stagger_local_blocks", False)),
        tables=frozenset(2 * span for config in configs for span in _spans(config)),
        latents=numbers(_LATENTS) - {0},
        queries=numbers(_QUERIES) - {0},
        ignores_segments=hasattr(getattr(root, "config", None), "model_type") and not _reads_segments(root),
        lengths=tuple(_lengths(base_model(model), configs)),
    )


def _configs(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config
    for inner in getattr(config, "__dict__", {}).values():
        if hasattr(inner, "to_dict"):
            yield from _configs(inner)


def _spans(config: Any) -> Iterator[int]:
    """Yield the reach of relative positions to either side, in models that share projections with them (DeBERTa)."""
    if getattr(config, "relative_attention", False):
        names = ("position_buckets", "max_relative_positions", "max_position_embeddings")
        yield from (span for name in names for span in _integers(getattr(config, name, None)) if span > 0)


def _before(configs: list[Any]) -> Iterator[int]:
    """Yield the numbers of rows that a model puts before the tokens of a sequence."""
    for config in configs:
        yield from _integers(getattr(config, "prompt_length", None))
        # The second of two convolutions over time looks as far back as its kernel (Zaya).
        yield from (kernel - 1 for kernel in _integers(getattr(config, "cca_time1", None)) if kernel > 1)


def _pooled_blocks(config: Any) -> int:
    """Return the number of blocks, before each of which but the first the tokens are pooled in pairs (Funnel)."""
    return len(config.block_sizes) if getattr(config, "pooling_type", None) and hasattr(config, "block_sizes") else 0


def _image_rows(configs: list[Any]) -> Iterator[int]:
    """Yield the numbers of patches of an image, with a class token."""
    for config in configs:
        size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if isinstance(size, int) and isinstance(patch, int) and patch:
            yield (size // patch) ** 2 + 1


def _integers(value: Any) -> Iterator[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return (item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _reads_segments(model: Any) -> bool:
    """Return whether Axolotl's packing of samples by numbered masks is in force."""
    utils = sys.modules.get("transformers.modeling_flash_attention_utils")
    patched = getattr(getattr(utils, "_get_unpad_data", None), "__module__", "").startswith("axolotl")
    return patched and "flash" in str(getattr(model.config, "_attn_implementation", ""))


def _virtual_tokens(model: nn.Module) -> int:
    """Return how many rows prompt tuning by PEFT puts before a sequence; prefix tuning has none."""
    config = getattr(model, "active_peft_config", None) if base_model(model) is not model else None
    if not getattr(config, "is_prompt_learning", False) or "PREFIX" in str(getattr(config, "peft_type", "")):
        return 0
    return int(getattr(config, "num_virtual_tokens", 0) or 0)


def _lengths(model: nn.Module, configs: list[Any]) -> Iterator[Lengths]:
    """Yield functions from lengths of sound clips to numbers of rows, by the model's methods and convolutions."""
    for module in model.modules():
        for name in _LENGTHS:
            if callable(getattr(type(module), name, None)) and hasattr(module, "config"):
                # Some return the lengths before and after a pooling.
                functions = (partial(_by_method, getattr(module, name), part) for part in (0, 1))
                yield from (function for function in functions if _runs(function))
    for config in configs:
        kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
        if isinstance(kernels, (list, tuple)) and isinstance(strides, (list, tuple)):
            for stages in range(1, len(kernels) + 1):
                yield partial(_by_convolutions, kernels[:stages], strides[:stages])
            if isinstance(squeeze := getattr(config, "squeeze_factor", None), int):  # SEW pools the last of them
                yield partial(_by_convolutions, (*kernels, squeeze), (*strides, squeeze))
        for name in ("adaptor", "adapter"):
            kernel, stride = getattr(config, f"{name}_kernel_size", None), getattr(config, f"{name}_stride", None)
            if isinstance(kernel, int) and isinstance(stride, int):  # padded by half the kernel on both sides
                yield partial(_by_convolutions, (kernel - 2 * (kernel // 2),), (stride,))
    yield partial(_by_convolutions, (1,), (2,))  # Whisper, whose second convolution has a stride of 2 and is padded


def _by_method(method: Callable[[Tensor], Any], part: int, lengths: Tensor) -> Tensor:
    """Return the lengths that a model's method gives for one clip after the other, as some take no more than one."""
    found = [method(length.clone()) for length in lengths]
    return torch.tensor([int(each[part] if isinstance(each, tuple) else each) for each in found])


def _runs(function: Lengths) -> bool:
    """Return whether a model's method runs: some read a field that their configuration does not have."""
    try:
        function(torch.tensor([1000]))
    except Exception:  # raised by the code of the model
        return False
    return True


def _by_convolutions(kernels: Sequence[int], strides: Sequence[int], lengths: Tensor) -> Tensor:
    for kernel, stride in zip(kernels, strides, strict=True):
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
    return lengths
