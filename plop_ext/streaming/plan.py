"""The plan of a streamed run: memory, bytes to read and operations, computed before the run starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plop_ext.errors import InputError
from plop_ext.layers import LinearLayer
from plop_ext.memory import MIB, format_size
from plop_ext.models.reader import CHUNK, READERS
from plop_ext.streaming.skeleton import Skeleton, input_embedding, output_head
from plop_ext.streaming.weights import Weights, loaded_bytes, parameter_bytes
from plop_ext.totals import TOTALS_FIELDS

# Allocators keep some freed memory, and libraries load more of their code while they run.
_CPU_MARGIN = 192 * MIB
# CUDA's libraries keep much more on the host, and load it when a kernel is first used.
_HOST_MARGIN = 1024 * MIB
_DEVICE_MARGIN = 64 * MIB


@dataclass(frozen=True)
class Extent:
    """Samples and padded tokens per sample of one batch."""

    samples: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.samples * self.tokens


@dataclass(frozen=True)
class Plan:
    """Figures of a run; sizes are in bytes.

    Attributes:
        blocks: Number of blocks that run.
        block: Size of the largest loaded block.
        conversion: Additional memory for the conversion of a block's weights while the block is loaded.
        outside: Weights before the first block; released when the blocks start.
        read: Bytes read from the files in total.
        hidden: Hidden states of all batches.
        activations: Upper bound of the live activations of one batch inside a block.
        totals: Table of the results.
        staging: Pinned memory between disk and device; none on a CPU.
        flops: Floating-point operations of the matrix products.
        tokens: Padded tokens of all batches.
    """

    blocks: int
    block: int
    conversion: int
    outside: int
    read: int
    hidden: int
    activations: int
    totals: int
    staging: int
    flops: float
    tokens: int

    @property
    def device_least(self) -> int:
        """Memory needed on the device, without hidden states."""
        weights = max(self.outside + self.block, 2 * self.block) + self.conversion
        return weights + self.activations + _DEVICE_MARGIN

    def ram_least(self, device: torch.device, held: int) -> int:
        """Return the RAM needed without hidden states, if the process already uses `held` bytes."""
        own = self.device_least if device.type == "cpu" else self.staging
        return held + own + self.totals + (_CPU_MARGIN if device.type == "cpu" else _HOST_MARGIN)

    def least(self, device: torch.device, held: int) -> int:
        """Return the smallest sufficient memory budget: the larger of the needs of device and RAM."""
        ram = self.ram_least(device, held)
        return ram if device.type == "cpu" else max(ram, self.device_least)

    def rooms(self, device: torch.device, budget: int, held: int) -> tuple[int, int]:
        """Return the bytes of hidden states that fit the budget on the device and in RAM.

        Raises:
            InputError: If the budget is too small even with all of them on disk.
        """
        least = self.least(device, held)
        if budget < least:
            # Rounded up: the next process may use some megabytes more.
            named = math.ceil(least / MIB / 32 + 0.5) * 32
            raise InputError(
                f"`memory_budget` of {format_size(budget)} is too small for this model and batch size; it needs at "
                f"least {named}MiB; smaller batches need less"
            )
        in_ram = budget - self.ram_least(device, held)
        return (in_ram, 0) if device.type == "cpu" else (budget - self.device_least, in_ram)

    def rooms_in_free(self, device: torch.device, on_device: int, in_ram: int) -> tuple[int, int]:
        """Return the same for a run without a budget, which may take these bytes beyond those already used.

        Args:
            device: Device of the run.
            on_device: Bytes that may be taken on the device.
            in_ram: Bytes that may be taken in RAM.

        Raises:
            InputError: If they are too few even with all hidden states on disk.
        """
        ram = self.ram_least(device, 0)
        needs = [("RAM", ram, in_ram)]
        if device.type != "cpu":
            needs.append(("device memory", self.device_least, on_device))
        for name, least, room in needs:
            if room < least:
                raise InputError(
                    f"this model and batch size need {format_size(least)} of {name}, and {format_size(room)} may be "
                    "used (80 % of the free memory); use smaller batches, free memory, or set `memory_budget`"
                )
        return (in_ram - ram, 0) if device.type == "cpu" else (on_device - self.device_least, in_ram - ram)


def make(skeleton: Skeleton, weights: Weights | None, extents: Sequence[Extent], device: torch.device) -> Plan:
    """Compute the plan of a run.

    Args:
        skeleton: The model.
        weights: The checkpoint's tensors; None if there is only a configuration.
        extents: Extent of each batch.
        device: Device of the run.
    """
    blocks = [parameter_bytes(skeleton.blocks[index]) for index in range(skeleton.last + 1)]
    head = _head_bytes(skeleton.model)
    outside = parameter_bytes(skeleton.model) - parameter_bytes(skeleton.blocks) - head
    element = skeleton.dtype.itemsize
    rows = sum(extent.rows for extent in extents)
    largest = max(extents, key=lambda extent: extent.rows)
    samples = sum(extent.samples for extent in extents)
    width, per_token = _widths(skeleton)
    # Masks: one byte per pair of positions, plus one element of the model's type for kernels that add the mask.
    pairs = largest.rows * largest.tokens
    masks = pairs * (1 + element)
    config = skeleton.model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) == "eager":  # scores and probabilities of every head, in float32
        masks += pairs * int(getattr(config, "num_attention_heads", 1) or 1) * (2 * 4 + element)
    if weights is None:
        read, conversion, block = outside + sum(blocks), 0, max(blocks)
    else:
        parts = weights.blocks
        read = weights.outside.stored_bytes + sum(part.stored_bytes for part in parts)
        # transformers stacks and then concatenates: two copies in addition to the stored one.
        conversion = 2 * max(part.largest_group for part in (*parts, weights.outside))
        block = max(max(part.plain_bytes, size) for part, size in zip(parts, blocks, strict=True))
    macs = sum(layer.in_features * layer.out_features * share for layer, share in _shares(skeleton))
    return Plan(
        blocks=len(blocks),
        block=block,
        conversion=conversion,
        outside=outside,
        read=read,
        hidden=rows * width * element,
        activations=largest.rows * per_token * element + masks,
        totals=len(skeleton.found.layers) * samples * len(TOTALS_FIELDS) * 8 * 2,
        staging=(READERS + 2) * CHUNK if device.type == "cuda" else 0,
        flops=2.0 * macs * rows,
        tokens=rows,
    )


def _widths(skeleton: Skeleton) -> tuple[int, int]:
    """Return the width of the hidden state, and the elements per token of all inputs and outputs of a block."""
    config = skeleton.model.config.get_text_config(decoder=True)
    width = int(getattr(config, "hidden_size", 0) or max(layer.in_features for layer in skeleton.found.layers))
    per_block: dict[int | None, float] = {}
    for layer, share in _shares(skeleton):
        block = skeleton.block_of(layer.name)
        per_block[block] = per_block.get(block, 0.0) + share * (layer.in_features + layer.out_features)
    return width, int(max(per_block.values())) + 6 * width


def _shares(skeleton: Skeleton) -> list[tuple[LinearLayer, float]]:
    """Return each layer that runs and its share of the tokens: 1, or for an expert the average routed to it."""
    config = skeleton.model.config.get_text_config(decoder=True)
    chosen = getattr(config, "num_experts_per_tok", None) or 1

    def share(layer: LinearLayer) -> float:
        module: Any = layer.module
        return chosen / module.num_experts if layer.adapter.routed else 1.0

    return [(layer, share(layer)) for layer in skeleton.running]


def _head_bytes(model: Any) -> int:
    """Return the bytes of the output head that are not the embedding's."""
    head, embedding = output_head(model), input_embedding(model)
    if head is None:
        return 0
    kept = set() if embedding is None else {id(weight) for weight in embedding.parameters()}
    return sum(loaded_bytes(weight) for weight in head.parameters() if id(weight) not in kept)
