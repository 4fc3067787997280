"""Batches and models with images, sounds or patches beside the text, or instead of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.architecture_parts import (
    HEADS,
    HIDDEN,
    INNER,
    TEXT,
    VISION,
    VOCAB,
    finished,
)
from tests.support.stream_texts import Batch, ids, masked, padded, targets_of

_IMAGE, _VIDEO = VOCAB - 1, VOCAB - 2

# Heights and widths in patches of the images of each sample.
_GRIDS: tuple[tuple[tuple[int, int], ...], ...] = (((4, 4), (8, 4)), (), ((2, 4), (4, 2), (4, 4)))


def pictured(samples: tuple[int, ...]) -> Batch:
    """Samples of a Qwen2-VL-like model with images of several sizes."""
    rows, grids, pixels = [], [], []
    for sample in samples:
        parts = [ids(4, sample)]
        for number, (height, width) in enumerate(_GRIDS[sample]):
            grids.append([1, height, width])
            seed = torch.Generator().manual_seed(10 * sample + number)
            pixels.append(torch.randn(height * width, 3 * 2 * 4 * 4, generator=seed))
            parts += [
                torch.tensor([VOCAB - 3]),
                torch.full((height * width // 4,), _IMAGE),
                torch.tensor([VOCAB - 4]),
            ]
        rows.append(torch.cat([*parts, ids(3, 20 + sample)]))
    tokens = padded(rows)
    batch: Batch = {
        "input_ids": tokens,
        "attention_mask": masked(rows),
        "mm_token_type_ids": (tokens == _IMAGE).long(),
    }
    if pixels:
        batch |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    return batch


def qwen2_5_vl() -> nn.Module:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": INNER, "num_heads": 4, "out_hidden_size": HIDDEN}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            **vision,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return finished(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> nn.Module:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": INNER, "num_heads": 4, "out_hidden_size": HIDDEN}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "head_dim": HIDDEN // HEADS},
        vision_config={
            **vision,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return finished(transformers.Qwen3VLForConditionalGeneration(config))


# Images of each sample, all of one size.
COUNTS = (2, 0, 1)


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def illustrated(samples: tuple[int, ...], tokens: int = 4) -> Batch:
    """Samples of a LLaVA-like model: each image has `tokens` placeholders."""
    rows = []
    for sample in samples:
        placeholders = torch.full((tokens,), _IMAGE)
        parts = [part for _ in range(COUNTS[sample]) for part in (placeholders, ids(2, sample))]
        rows.append(torch.cat([ids(3, sample), *parts, ids(4, 5 + sample)]))
    pixels = torch.cat([images(COUNTS[sample], sample) for sample in samples])
    batch: Batch = {"input_ids": padded(rows), "attention_mask": masked(rows)}
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def idefics3() -> nn.Module:
    import transformers

    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**VISION, "image_size": 32, "patch_size": 4},
        image_token_id=_IMAGE,
        scale_factor=2,
    )
    return finished(transformers.Idefics3ForConditionalGeneration(config))


def tiles(samples: tuple[int, ...], most: int) -> Batch:
    """Samples of an Idefics-like model: images are filled up to `most` per sample, and pixels are padded."""
    batch = illustrated(samples, tokens=16)
    pixels = torch.zeros(len(samples), most, 3, 32, 32)
    mask = torch.zeros(len(samples), most, 32, 32, dtype=torch.long)
    for row, sample in enumerate(samples):
        for number in range(COUNTS[sample]):
            height = 32 if number == 0 else 24
            seed = torch.Generator().manual_seed(10 * sample + number)
            pixels[row, number, :, :height] = torch.randn(3, height, 32, generator=seed)
            mask[row, number, :height] = 1
    batch.pop("pixel_values", None)
    return batch | ({"pixel_values": pixels, "pixel_attention_mask": mask} if most else {})


def whisper_batch(samples: tuple[int, ...]) -> Batch:
    features = [torch.randn(8, 40, generator=torch.Generator().manual_seed(sample)) for sample in samples]
    targets = [targets_of()[sample] for sample in samples]
    return {"input_features": torch.stack(features), "labels": padded(targets, -100)}


def patches(batch: Batch, rows: int) -> Tensor:
    """Which patches of 4 x 4 pixels hold any of an image; all rows count that are no patches."""
    mask = batch.get("pixel_attention_mask", torch.ones(0, 1, 32, 32))
    whole = mask.unflatten(2, (8, 4)).unflatten(4, (8, 4)).sum(dim=(3, 5)).flatten() > 0
    return whole if len(whole) == rows else torch.ones(rows, dtype=torch.bool)


def cut(samples: tuple[int, ...]) -> Batch:
    """Samples of Pix2Struct: each image is cut into its own number of patches, with the row and column in front."""
    patches = []
    for sample in samples:
        count = (9, 6, 4)[sample]
        places = torch.stack([torch.arange(count) // 3 + 1, torch.arange(count) % 3 + 1], dim=1)
        patches.append(torch.cat((places, torch.randn(count, 20, generator=torch.Generator().manual_seed(sample))), 1))
    longest = max(map(len, patches))
    pixels = torch.stack([torch.cat((each, each.new_zeros(longest - len(each), 22))) for each in patches])
    mask = torch.stack([torch.arange(longest) < len(each) for each in patches]).long()
    targets = [targets_of()[sample] for sample in samples]
    return {"flattened_patches": pixels, "attention_mask": mask, "labels": padded(targets, -100)}


# Samples of each sound.
_WAVES = (400, 320, 240)


def sounds(samples: tuple[int, ...]) -> Batch:
    waves = [torch.randn(_WAVES[sample], generator=torch.Generator().manual_seed(sample)) for sample in samples]
    return {"input_values": padded(waves), "attention_mask": masked(waves).long()}


def heard(samples: tuple[int, ...]) -> Batch:
    """Samples of Qwen2-Audio with up to two clips, each with frames up to a length of its own."""
    rows, frames, masks = [], [], []
    for sample in samples:
        parts = [ids(3, sample)]
        for number in range(COUNTS[sample]):
            length = (40, 24)[number]
            seed = torch.Generator().manual_seed(10 * sample + number)
            frames.append(torch.nn.functional.pad(torch.randn(8, length, generator=seed), (0, 40 - length)))
            masks.append((torch.arange(40) < length).long())
            parts += [torch.full((((length - 1) // 2 + 1 - 2) // 2 + 1,), _IMAGE), ids(2, sample)]
        rows.append(torch.cat(parts))
    batch: Batch = {"input_ids": padded(rows), "attention_mask": masked(rows)}
    if frames:
        batch |= {"input_features": torch.stack(frames), "feature_attention_mask": torch.stack(masks)}
    return batch


def frames(batch: Batch, rows: int) -> Tensor:
    """Which frames hold any of a clip: half as many as those of the mask, or a quarter."""
    mask = batch.get("feature_attention_mask", torch.ones(0, 40))
    for length, frames in ((20, lambda n: (n - 1) // 2 + 1), (10, lambda n: ((n - 1) // 2 + 1 - 2) // 2 + 1)):
        if len(mask) and rows == len(mask) * length and rows != batch["input_ids"].numel():
            return (torch.arange(length) < frames(mask.sum(dim=1)).reshape(-1, 1)).flatten()
    return torch.ones(rows, dtype=torch.bool)


def qwen2_audio() -> nn.Module:
    import transformers

    sound = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": INNER, "d_model": HIDDEN}
    config = transformers.Qwen2AudioConfig(
        audio_config={**sound, "num_mel_bins": 8, "max_source_positions": 20},
        text_config={"model_type": "qwen2", **TEXT},
        audio_token_id=_IMAGE,
        audio_token_index=_IMAGE,
    )
    return finished(transformers.Qwen2AudioForConditionalGeneration(config))


def naflex(samples: tuple[int, ...]) -> Batch:
    """Images of SigLIP 2, each of its own height and width in patches."""
    shapes = [((3, 4), (2, 3), (4, 4))[sample] for sample in samples]
    longest = max(height * width for height, width in shapes)
    pixels = torch.zeros(len(samples), longest, 3 * 8 * 8)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, (sample, (height, width)) in enumerate(zip(samples, shapes, strict=True)):
        count = height * width
        pixels[row, :count] = torch.randn(count, 192, generator=torch.Generator().manual_seed(sample))
        mask[row, :count] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}
