"""The images, videos and sound clips of a batch, and the samples to which they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plop_ext.streams.facts import ModelFacts
from plop_ext.streams.stream import Items, Stream, Untold

_IMAGES = ("pixel_values", "pixel_values_videos")
_PATCHES = "flattened_patches"
_GRIDS = {"images": ("image_grid_thw", "image_grid_hws", "image_grid_hw", "grid_thw"), "videos": ("video_grid_thw",)}
_SOUNDS = ("input_features", "input_values", "audio_features", "audio_values", "input_audio_embeds")
_SOUND_MASKS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask", "audio_mask", "padding_mask")
# Strides at which backbones look at an image.
_STRIDES = (1, 2, 4, 8, 16, 32, 64)


def vision_streams(
    fields: Mapping[str, Any], facts: ModelFacts, owner: Tensor | None, samples: int, count_all: bool
) -> Iterator[Stream]:
    """Yield the streams of the images and the videos of a batch.

    Args:
        fields: The batch.
        facts: The model.
        owner: [B, T] int64 on the CPU, the sample of each token of `input_ids`; None without tokens.
        samples: Number of samples.
        count_all: Count padding.
    """
    patches = fields.get(_PATCHES)
    if isinstance(patches, Tensor) and patches.dim() == 3 and len(patches) == samples:
        mask = fields.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != patches.shape[:2]:  # that of the text: padding is zeros
            mask = (patches != 0).any(dim=2)
        flags = () if count_all else (mask.bool(),)
        padded = any(not bool(flag.all()) for flag in flags)
        yield Items("images", torch.ones(samples, dtype=torch.int64), flags=flags, padded=padded)
    for what, name in zip(("images", "videos"), _IMAGES, strict=True):
        pixels = fields.get(name)
        if not isinstance(pixels, Tensor) or pixels.dim() < 2:
            continue
        placed = _placed(fields, facts, what, owner, samples)
        sizes = _sizes(fields, facts, what, pixels)
        if sizes is not None:
            yield _of_sizes(what, sizes, placed, samples, facts)
            continue
        yield _of_pixels(what, pixels, fields, placed, samples, facts, count_all)


def audio_streams(
    fields: Mapping[str, Any], facts: ModelFacts, owner: Tensor | None, samples: int, count_all: bool
) -> Iterator[Stream]:
    """Yield the stream of the sound clips of a batch; arguments as for `vision_streams`."""
    sound = next((fields[name] for name in _SOUNDS if isinstance(fields.get(name), Tensor)), None)
    if sound is None:
        return
    names = _SOUND_MASKS if owner is not None else (*_SOUND_MASKS, "attention_mask")
    mask = next((fields[name] for name in names if isinstance(fields.get(name), Tensor)), None)
    clips = int(sound.shape[0]) if mask is None or mask.dim() != 2 else len(mask)
    placed = _placed(fields, facts, "clips", owner, samples)
    count = _count(placed, clips, samples)
    flags: list[Tensor] = []
    padded = False
    if mask is not None and mask.dim() == 2:
        valid = mask.bool()
        padded = not bool(valid.all())
        flags.append(valid)
        whole, lengths = torch.tensor([mask.shape[1]]), valid.sum(dim=1).cpu()
        for function in facts.lengths:
            total, frames = int(function(whole)), function(lengths)
            if total > 0:
                flags.append(torch.arange(total) < frames.reshape(-1, 1))
                flags += [functional.pad(flags[-1], (0, -total % n)) for n in sorted(facts.multiples) if total % n]
            if count is None and placed is not None and int(frames.sum()) == int(placed.sum()):
                count = _counted(_fitted(frames, placed), samples)
    if count is None:
        yield Untold(f"come from {clips} clips that cannot be assigned to {samples} samples")
    elif count_all:
        yield Items("clips", count, latents=facts.queries)
    else:
        yield Items("clips", count, flags=tuple(flags), padded=padded, latents=facts.queries)


def _placed(
    fields: Mapping[str, Any], facts: ModelFacts, what: str, owner: Tensor | None, samples: int
) -> Tensor | None:
    """Return [S] int64: the placeholders of items among the tokens of each sample; None without any."""
    ids = fields.get("input_ids")
    if owner is None or not isinstance(ids, Tensor) or ids.shape != owner.shape or not facts.placeholders[what]:
        return None
    found = torch.isin(ids.cpu(), torch.tensor(sorted(facts.placeholders[what])))
    count = torch.zeros(samples, dtype=torch.int64).index_add_(0, owner[found], torch.ones_like(owner[found]))
    return count if int(count.sum()) else None


def _count(placed: Tensor | None, items: int, samples: int) -> Tensor | None:
    """Return [S] int64: the items of each sample, if all items are of one size; None if they cannot be told."""
    if placed is not None:
        shares, total = placed * items, int(placed.sum())
        if not (shares % total).any():
            return shares // total
        # As many items as samples with placeholders: each of these has one, for any number of placeholders.
        return (placed > 0).long() if int((placed > 0).sum()) == items else None
    return torch.ones(samples, dtype=torch.int64) if items == samples else None


def _sizes(fields: Mapping[str, Any], facts: ModelFacts, what: str, pixels: Tensor) -> Tensor | None:
    """Return [N] int64: the patches of each item before any are merged; None if all items have the same number."""
    for name in _GRIDS[what]:
        if isinstance(grid := fields.get(name), Tensor) and grid.dim() == 2:
            return grid.cpu().long().prod(dim=1)
    sizes = fields.get("image_sizes")
    # Images of several sizes, cut into patches and joined (Pixtral). LLaVA-NeXT has tiles of one size instead.
    if what == "images" and isinstance(sizes, Tensor) and pixels.dim() == 4 and len(sizes) == len(pixels):
        patch = next(iter(facts.patch_sizes), None)
        if len(facts.patch_sizes) == 1 and patch is not None:
            return (sizes.cpu().long() // patch).prod(dim=1)
    return None


def _of_sizes(what: str, sizes: Tensor, placed: Tensor | None, samples: int, facts: ModelFacts) -> Stream:
    """Return the stream of items of known sizes: a sample owns as many as its placeholders have room for."""
    items = len(sizes)
    if placed is None:
        if items != samples:
            return Untold(f"come from {items} {what} that cannot be assigned to {samples} samples")
        owner = torch.arange(samples)
    else:
        fitted = _fitted(sizes, placed)
        if fitted is None:
            return Untold(f"come from {items} {what} that do not fit the placeholders of {samples} samples")
        owner = fitted
    count = torch.bincount(owner, minlength=samples)
    per_sample = torch.zeros(samples, dtype=torch.int64).index_add_(0, owner, sizes)
    return Items(what, count, sizes=per_sample, latents=facts.queries)


def _fitted(sizes: Tensor, placed: Tensor) -> Tensor | None:
    """Return [N] int64: the sample of each item, so that placeholders are in proportion to sizes; None if they cannot.

    If there are as many items as samples with placeholders, each of these samples has one.

    Args:
        sizes: [N] int64.
        placed: [S] int64, placeholders of each sample.
    """
    ends, room = sizes.cumsum(0), int(placed.sum())
    shares = placed.cumsum(0) * int(sizes.sum())
    if not (shares % room).any() and torch.isin(shares // room, torch.cat((ends.new_zeros(1), ends))).all():
        return torch.searchsorted(shares // room, ends)
    return (placed > 0).nonzero().reshape(-1) if int((placed > 0).sum()) == len(sizes) else None


def _counted(owner: Tensor | None, samples: int) -> Tensor | None:
    """Return [S] int64: the items of each sample."""
    return None if owner is None else torch.bincount(owner, minlength=samples)


def _of_pixels(
    what: str,
    pixels: Tensor,
    fields: Mapping[str, Any],
    placed: Tensor | None,
    samples: int,
    facts: ModelFacts,
    count_all: bool,
) -> Stream:
    """Return the stream of items of one size, some of which may be padded or be padding."""
    mask = fields.get("pixel_attention_mask", fields.get("pixel_mask"))
    mask = mask if isinstance(mask, Tensor) and what == "images" else None
    if pixels.dim() == 5 and len(pixels) == samples and mask is not None and mask.shape[:2] == pixels.shape[:2]:
        # Samples with fewer images are filled up with empty ones, which the model drops (Idefics).
        present = (pixels != 0).flatten(2).any(dim=2).cpu()
        count = present.sum(dim=1)
        mask = mask[present.to(mask.device)]
        items = int(count.sum())
    else:
        items = len(pixels)
        found = _count(placed, items, samples)
        if found is None:
            return Untold(f"come from {items} {what} that cannot be assigned to {samples} samples")
        count = found
    flags: list[Tensor] = []
    padded = False
    if mask is not None and len(mask) == items and not count_all:
        valid = mask.bool()
        padded = not bool(valid.all())
        if valid.dim() == 2:  # a mask of patches (SigLIP 2)
            flags.append(valid)
        else:
            for size in sorted(facts.patch_sizes) or _STRIDES:
                pooled = functional.max_pool2d(valid.float().unsqueeze(1), size, ceil_mode=not facts.patch_sizes)
                flags.append(pooled.flatten(1).bool())
    question = fields.get("qformer_attention_mask")
    if isinstance(question, Tensor) and len(question) == items and not count_all:  # tokens beside the queries
        frames = pixels.shape[1] if pixels.dim() == 5 else 1
        asked = [question.bool()]
        asked += [functional.pad(asked[0], (number, 0), value=True) for number in sorted(facts.queries)]
        flags += [layout.repeat(1, frames) for layout in asked]
    return Items(what, count, flags=tuple(flags), padded=padded, latents=facts.queries)
