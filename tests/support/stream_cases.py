"""Models with more than one stream of rows: a batch of several samples, and each sample alone without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.architecture_parts import (
    HEADS,
    HIDDEN,
    INNER,
    PLAIN,
    TEXT,
    VISION,
    VOCAB,
    clip,
    finished,
    from_config,
    llava,
    qwen2_vl,
)

Batch = dict[str, Any]
_LENGTHS = (11, 6, 3)
_DECODED = (4, 9, 7)
_IMAGE, _VIDEO = VOCAB - 1, VOCAB - 2
_VIRTUAL = 5


@dataclass(frozen=True)
class StreamCase:
    """A model with its inputs.

    Attributes:
        build: Makes the model.
        batch: Makes the batch.
        alone: Makes one batch per sample, without padding.
        kwargs: Arguments of `score`.
        counted: Which of the rows of a sample alone count, for rows that are no data; by its batch and their number.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    alone: Callable[[], list[Batch]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    counted: Callable[[Batch, int], Tensor] = lambda batch, rows: torch.ones(rows, dtype=torch.bool)


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(5, VOCAB - 8, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], value: int = 0, to: int = 0, left: bool = False) -> Tensor:
    """[B, T] of rows of different lengths."""
    length = max(to, *(len(row) for row in rows))
    out = torch.full((len(rows), length), value, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        out[index, place] = row
    return out


def masked(rows: list[Tensor], to: int = 0, left: bool = False) -> Tensor:
    return padded([torch.ones_like(row) for row in rows], to=to, left=left)


def _texts() -> list[Tensor]:
    return [ids(length, seed) for seed, length in enumerate(_LENGTHS)]


def _targets() -> list[Tensor]:
    return [ids(length, 9 + seed) for seed, length in enumerate(_DECODED)]


def translated(to: int = 0) -> Batch:
    """Encoder tokens with a mask, labels without; `to` pads both to one length, as `pad_to_multiple_of` does."""
    rows = _texts()
    labels = padded(_targets(), -100, to=to)
    return {"input_ids": padded(rows, to=to), "attention_mask": masked(rows, to=to), "labels": labels}


def translated_alone() -> list[Batch]:
    pairs = zip(_texts(), _targets(), strict=True)
    return [
        {"input_ids": text[None], "attention_mask": torch.ones_like(text[None]), "labels": target[None]}
        for text, target in pairs
    ]


def own_decoder_mask() -> Batch:
    rows, targets = _texts(), _targets()
    return {
        "input_ids": padded(rows, to=11),
        "attention_mask": masked(rows, to=11),
        "decoder_input_ids": padded(targets, to=11),
        "decoder_attention_mask": masked(targets, to=11),
    }


def own_decoder_mask_alone() -> list[Batch]:
    pairs = zip(_texts(), _targets(), strict=True)
    return [{"input_ids": text[None], "decoder_input_ids": target[None]} for text, target in pairs]


def packed(**extra: Callable[[list[Tensor]], Any]) -> Batch:
    """All samples in one row, with positions that start again at each."""
    rows = _texts()
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    batch: Batch = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    return batch | {name: make(rows) for name, make in extra.items()}


def text_alone() -> list[Batch]:
    return [{"input_ids": row[None]} for row in _texts()]


def padded_text(left: bool = False) -> Batch:
    rows = _texts()
    return {"input_ids": padded(rows, left=left), "attention_mask": masked(rows, left=left)}


def _lengths(rows: list[Tensor]) -> Tensor:
    return torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()


def _numbers(rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.full_like(row, index) for index, row in enumerate(rows)])[None]


# Heights and widths in patches of the images of each sample.
_GRIDS: tuple[tuple[tuple[int, int], ...], ...] = (((4, 4), (8, 4)), (), ((2, 4), (4, 2), (4, 4)))


def _pictured(samples: tuple[int, ...]) -> Batch:
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


def _qwen2_5_vl() -> nn.Module:
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


def _qwen3_vl() -> nn.Module:
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
_COUNTS = (2, 0, 1)


def _images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def _illustrated(samples: tuple[int, ...], tokens: int = 4) -> Batch:
    """Samples of a LLaVA-like model: each image has `tokens` placeholders."""
    rows = []
    for sample in samples:
        placeholders = torch.full((tokens,), _IMAGE)
        parts = [part for _ in range(_COUNTS[sample]) for part in (placeholders, ids(2, sample))]
        rows.append(torch.cat([ids(3, sample), *parts, ids(4, 5 + sample)]))
    pixels = torch.cat([_images(_COUNTS[sample], sample) for sample in samples])
    batch: Batch = {"input_ids": padded(rows), "attention_mask": masked(rows)}
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def _idefics3() -> nn.Module:
    import transformers

    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config={**VISION, "image_size": 32, "patch_size": 4},
        image_token_id=_IMAGE,
        scale_factor=2,
    )
    return finished(transformers.Idefics3ForConditionalGeneration(config))


def _tiles(samples: tuple[int, ...], most: int) -> Batch:
    """Samples of an Idefics-like model: images are filled up to `most` per sample, and pixels are padded."""
    batch = _illustrated(samples, tokens=16)
    pixels = torch.zeros(len(samples), most, 3, 32, 32)
    mask = torch.zeros(len(samples), most, 32, 32, dtype=torch.long)
    for row, sample in enumerate(samples):
        for number in range(_COUNTS[sample]):
            height = 32 if number == 0 else 24
            seed = torch.Generator().manual_seed(10 * sample + number)
            pixels[row, number, :, :height] = torch.randn(3, height, 32, generator=seed)
            mask[row, number, :height] = 1
    batch.pop("pixel_values", None)
    return batch | ({"pixel_values": pixels, "pixel_attention_mask": mask} if most else {})


def _whisper_batch(samples: tuple[int, ...]) -> Batch:
    features = [torch.randn(8, 40, generator=torch.Generator().manual_seed(sample)) for sample in samples]
    targets = [_targets()[sample] for sample in samples]
    return {"input_features": torch.stack(features), "labels": padded(targets, -100)}


def _patches(batch: Batch, rows: int) -> Tensor:
    """Which patches of 4 x 4 pixels hold any of an image; all rows count that are no patches."""
    mask = batch.get("pixel_attention_mask", torch.ones(0, 1, 32, 32))
    whole = mask.unflatten(2, (8, 4)).unflatten(4, (8, 4)).sum(dim=(3, 5)).flatten() > 0
    return whole if len(whole) == rows else torch.ones(rows, dtype=torch.bool)


def _cut(samples: tuple[int, ...]) -> Batch:
    """Samples of Pix2Struct: each image is cut into its own number of patches, with the row and column in front."""
    patches = []
    for sample in samples:
        count = (9, 6, 4)[sample]
        places = torch.stack([torch.arange(count) // 3 + 1, torch.arange(count) % 3 + 1], dim=1)
        patches.append(torch.cat((places, torch.randn(count, 20, generator=torch.Generator().manual_seed(sample))), 1))
    longest = max(map(len, patches))
    pixels = torch.stack([torch.cat((each, each.new_zeros(longest - len(each), 22))) for each in patches])
    mask = torch.stack([torch.arange(longest) < len(each) for each in patches]).long()
    targets = [_targets()[sample] for sample in samples]
    return {"flattened_patches": pixels, "attention_mask": mask, "labels": padded(targets, -100)}


# Samples of each sound.
_WAVES = (400, 320, 240)


def _sounds(samples: tuple[int, ...]) -> Batch:
    waves = [torch.randn(_WAVES[sample], generator=torch.Generator().manual_seed(sample)) for sample in samples]
    return {"input_values": padded(waves), "attention_mask": masked(waves).long()}


def _heard(samples: tuple[int, ...]) -> Batch:
    """Samples of Qwen2-Audio with up to two clips, each with frames up to a length of its own."""
    rows, frames, masks = [], [], []
    for sample in samples:
        parts = [ids(3, sample)]
        for number in range(_COUNTS[sample]):
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


def _frames(batch: Batch, rows: int) -> Tensor:
    """Which frames hold any of a clip: half as many as those of the mask, or a quarter."""
    mask = batch.get("feature_attention_mask", torch.ones(0, 40))
    for length, frames in ((20, lambda n: (n - 1) // 2 + 1), (10, lambda n: ((n - 1) // 2 + 1 - 2) // 2 + 1)):
        if len(mask) and rows == len(mask) * length and rows != batch["input_ids"].numel():
            return (torch.arange(length) < frames(mask.sum(dim=1)).reshape(-1, 1)).flatten()
    return torch.ones(rows, dtype=torch.bool)


def _qwen2_audio() -> nn.Module:
    import transformers

    sound = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": INNER, "d_model": HIDDEN}
    config = transformers.Qwen2AudioConfig(
        audio_config={**sound, "num_mel_bins": 8, "max_source_positions": 20},
        text_config={"model_type": "qwen2", **TEXT},
        audio_token_id=_IMAGE,
        audio_token_index=_IMAGE,
    )
    return finished(transformers.Qwen2AudioForConditionalGeneration(config))


def _naflex(samples: tuple[int, ...]) -> Batch:
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


def _prompt_tuned() -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    model = from_config("LlamaForCausalLM", "LlamaConfig", **TEXT)()
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=_VIRTUAL)).eval()


_T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5_MODEL = from_config("T5ForConditionalGeneration", "T5Config", **_T5, decoder_start_token_id=0)
_BART_MODEL = from_config("BartForConditionalGeneration", "BartConfig", **_BART)
_LLAMA = from_config("LlamaForCausalLM", "LlamaConfig", **TEXT)
_WHISPER = from_config(
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    num_mel_bins=8,
    max_source_positions=20,
    max_target_positions=32,
)
_MAMBA = from_config(
    "MambaForCausalLM",
    "MambaConfig",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    state_size=8,
    time_step_rank=4,
)
_ALL = (0, 1, 2)


def _each(make: Callable[..., Batch], *args: Any) -> Callable[[], list[Batch]]:
    return lambda: [make((sample,), *args) for sample in _ALL]


def _case(
    build: Callable[[], nn.Module], batch: Callable[[], Batch], alone: Callable[[], list[Batch]], **kwargs: Any
) -> StreamCase:
    counted = kwargs.pop("counted", None)
    return StreamCase(build, batch, alone, kwargs, **({} if counted is None else {"counted": counted}))


CASES: dict[str, StreamCase] = {
    "t5": _case(_T5_MODEL, translated, translated_alone),
    "t5 of one length": _case(_T5_MODEL, lambda: translated(12), translated_alone),
    "t5 with a decoder mask": _case(_T5_MODEL, own_decoder_mask, own_decoder_mask_alone),
    "t5 completion": _case(_T5_MODEL, lambda: translated(12), translated_alone, mask="completion"),
    "mt5": _case(
        from_config("MT5ForConditionalGeneration", "MT5Config", **_T5, decoder_start_token_id=0),
        lambda: translated(12),
        translated_alone,
    ),
    "umt5": _case(
        from_config("UMT5ForConditionalGeneration", "UMT5Config", **_T5, decoder_start_token_id=0),
        lambda: translated(12),
        translated_alone,
    ),
    "bart": _case(_BART_MODEL, lambda: translated(12), translated_alone),
    "pegasus": _case(
        from_config("PegasusForConditionalGeneration", "PegasusConfig", **_BART),
        lambda: translated(12),
        translated_alone,
    ),
    "whisper": _case(_WHISPER, lambda: _whisper_batch(_ALL), _each(_whisper_batch)),
    "llama left": _case(_LLAMA, lambda: padded_text(left=True), text_alone),
    "packed": _case(_LLAMA, packed, text_alone),
    "packed with lengths": _case(_LLAMA, lambda: packed(cu_seq_lens_q=_lengths), text_alone),
    "packed with numbers": _case(_LLAMA, lambda: packed(seq_idx=_numbers), text_alone),
    "prompt tuning": _case(
        _prompt_tuned, padded_text, text_alone, counted=lambda batch, rows: torch.arange(rows) >= _VIRTUAL
    ),
    "mamba": _case(_MAMBA, padded_text, text_alone),
    "bert": _case(from_config("BertModel", "BertConfig", **PLAIN), padded_text, text_alone),
    "deberta": _case(
        from_config(
            "DebertaV2Model",
            "DebertaV2Config",
            **{**PLAIN, "max_position_embeddings": 64},
            relative_attention=True,
            share_att_key=True,
            position_buckets=12,
            pos_att_type=["p2c", "c2p"],
        ),
        # As many rows as the table of relative positions.
        lambda: {"input_ids": padded(_texts()[1:], to=12), "attention_mask": masked(_texts()[1:], to=12)},
        lambda: text_alone()[1:],
        counted=lambda batch, rows: torch.full((rows,), rows == batch["input_ids"].numel()),
    ),
    "pix2struct": _case(
        from_config(
            "Pix2StructForConditionalGeneration",
            "Pix2StructConfig",
            text_config={
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "d_kv": 8,
                "d_ff": INNER,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
            vision_config={
                "hidden_size": HIDDEN,
                "patch_embed_hidden_size": 20,
                "d_ff": INNER,
                "d_kv": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "seq_len": 16,
            },
        ),
        lambda: _cut(_ALL),
        _each(lambda samples: _cut(samples)),
        scope="all",
    ),
    "vit": _case(
        from_config("ViTModel", "ViTConfig", **VISION),
        lambda: {"pixel_values": _images(3, 0)},
        lambda: [{"pixel_values": image[None]} for image in _images(3, 0)],
    ),
    "siglip": _case(
        from_config("SiglipVisionModel", "SiglipVisionConfig", **VISION),
        lambda: {"pixel_values": _images(3, 0)},
        lambda: [{"pixel_values": image[None]} for image in _images(3, 0)],
    ),
    "siglip2": _case(
        from_config(
            "Siglip2VisionModel",
            "Siglip2VisionConfig",
            **{key: value for key, value in VISION.items() if key != "image_size"},
            num_patches=16,
            vision_use_head=False,
        ),
        lambda: _naflex(_ALL),
        _each(_naflex),
    ),
    "wav2vec2": _case(
        from_config(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            **{**PLAIN, "vocab_size": VOCAB},
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_dim=(16, 16),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        lambda: _sounds(_ALL),
        _each(_sounds),
    ),
    "qwen2_audio": _case(_qwen2_audio, lambda: _heard(_ALL), _each(_heard), scope="all", counted=_frames),
    "clip": _case(
        clip,
        lambda: padded_text() | {"pixel_values": _images(3, 0)},
        lambda: [
            batch | {"pixel_values": image[None]} for batch, image in zip(text_alone(), _images(3, 0), strict=True)
        ],
        scope="all",
    ),
    "llava": _case(llava, lambda: _illustrated(_ALL), _each(_illustrated), scope="all"),
    "qwen2_vl": _case(qwen2_vl, lambda: _pictured(_ALL), _each(_pictured), scope="all"),
    "qwen2_5_vl": _case(_qwen2_5_vl, lambda: _pictured(_ALL), _each(_pictured), scope="all"),
    "qwen3_vl": _case(_qwen3_vl, lambda: _pictured(_ALL), _each(_pictured), scope="all"),
    "idefics3": _case(
        _idefics3,
        lambda: _tiles(_ALL, 2),
        lambda: [_tiles((sample,), _COUNTS[sample]) for sample in _ALL],
        scope="all",
        counted=_patches,
    ),
}
