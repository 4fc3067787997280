"""Samples of unequal lengths for a tiny model, by the arguments of its forward, and the batch that pads them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.census.shrinking import FIRST_WORD, LAST_WORD, STAGED_IMAGE

Sample = dict[str, Tensor]

TEXT_LENGTHS = (24, 15, 20)
DECODER_LENGTHS = (9, 12, 7)
QUESTION_LENGTHS = (5, 8, 6)
# Height and width in patches.
GRIDS = ((4, 4), (4, 8), (8, 4))
FRAMES = (96, 64, 80)
WAVES = (4000, 2880, 3360)
# Tensors whose rows are patches of all samples, one after another, and not samples.
FLAT = {"image_grid_thw", "image_grid_hw", "image_sizes", "target_sizes", "spatial_shapes", "image_merge_sizes"}
# Names of the number of frequencies.
BINS = (
    "num_mel_bins",
    "input_dim",
    "feature_size",
    "input_feat_per_channel",
    "input_feat_size",
    "feature_projection_input_dim",
)

# What signatures do not tell, by model type.
# Models whose sounds are all of one length: 30 seconds, padded by the feature extractor.
FIXED_LENGTH = {"whisper"}
# Models with a row of ids per codebook.
ROW_PER_CODEBOOK = {"musicgen_decoder", "musicgen_melody_decoder"}
# Models that take sounds with a dimension of channels.
WAVES_WITH_CHANNELS = {"omniasr", "omniasr_ctc"}
# Language models whose sounds are spectrograms of one length, [bins, frames], with ids that hold their place.
SPECTROGRAMS = {"audioflamingo3", "glmasr", "musicflamingo", "qwen2_audio", "voxtral"}
# Those that encode a sound only with the ids of its text.
ROTATED_BY_TIME = {"musicflamingo"}
# Models that take each patch as a square.
SQUARE_PATCHES = {"kimi_k25"}
# Models whose pictures are videos, under the name of pictures.
FRAMES_OF = {"timesformer", "videomae", "vivit", "instructblipvideo"}
# Models that take several tiles, or several pictures, per sample.
TILES = {
    "llava_next": 3,
    "llava_next_video": 3,
    "llava_onevision": 3,
    "idefics2": 2,
    "idefics3": 2,
    "smolvlm": 2,
    "modernvbert": 2,
    "ultravbert": 2,
}
# Models whose pictures or sounds are left out, and what the census does not make; the page says so.
TEXT_ONLY = {
    "chameleon": "pictures as ids of a tokenizer of pictures",
    "deepseek_vl_hybrid": "pictures at two sizes",
    "emu3": "pictures as ids of a tokenizer of pictures",
    "fun_asr_nano": "sounds that a processor lays out",
    "fuyu": "patches between the ids, by index",
    "gemma4": "pictures, which its default configuration does not describe",
    "gemma4_unified": "pictures, which its default configuration does not describe",
    "granite_docling": "pictures that a processor lays out",
    "granite_speech": "features of sounds that a processor stacks",
    "granite_speech_plus": "features of sounds that a processor stacks",
    "inkling2": "patches that a processor folds",
    "inkling2_loop": "patches that a processor folds",
    "moss_transcribe_diarize": "chunks of sounds and their mask",
    "muse_glimmer": "patches that a processor folds",
    "neomme": "patches that a processor folds",
    "omniasr": "sounds, each frame of which has an id",
    "paddleocr_vl": "pictures with a dimension of time",
    "qwen3_asr": "sounds that a processor chunks",
    "unlimited_ocr": "pictures of two encoders, one after another",
}
# Models whose pictures have no place in the text.
NO_PLACEHOLDER = {"mllama", "pp_formulanet"}


def samples_for(model: nn.Module) -> list[Sample]:
    """Three samples, each a batch of one without padding."""
    takes = set(inspect.signature(model.forward).parameters)
    samples: list[Sample] = [{} for _ in TEXT_LENGTHS]
    for number, sample in enumerate(samples):
        if "input_ids" in takes:
            sample |= text(TEXT_LENGTHS[number], 10 + number)
            if model.config.model_type in ROW_PER_CODEBOOK:
                codebooks = torch.arange(model.config.num_codebooks)[:, None]
                sample["input_ids"] = (sample["input_ids"] + codebooks) % LAST_WORD
        if "decoder_input_ids" in takes:
            words = text(DECODER_LENGTHS[number], 20 + number)
            sample["decoder_input_ids"] = words["input_ids"]
            if model.config.model_type == "dia":
                channels = model.config.decoder_config.num_channels
                sample["decoder_input_ids"] = words["input_ids"][..., None].repeat(1, 1, channels)
            if "decoder_attention_mask" in takes:
                sample["decoder_attention_mask"] = words["attention_mask"]
        if model.config.model_type in TEXT_ONLY:
            continue
        if takes & {"pixel_values", "pixel_values_videos", "flattened_patches"}:
            see(model, takes, sample, number)
        elif takes & {"input_features", "input_values"}:
            hear(model, takes, sample, number)
    return samples


def text(length: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, LAST_WORD, (1, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def see(model: nn.Module, takes: set[str], sample: Sample, number: int) -> None:
    """Add a picture, and the ids that hold its place in the text."""
    vision = config_of(model, ("vision_config", "image_config", "encoder"))
    channels = field(vision, ("num_channels", "in_channels", "in_chans"), 3)
    size = field(vision, ("image_size", "img_size"), STAGED_IMAGE)
    size = size[0] if isinstance(size, (tuple, list)) else size
    patch = field(vision, ("patch_size",), 4)
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    images: Sample = {}
    if "qformer_input_ids" in takes:
        question = text(QUESTION_LENGTHS[number], 40 + number)
        images["qformer_input_ids"] = question["input_ids"]
        images["qformer_attention_mask"] = question["attention_mask"]
    model_type = model.config.model_type
    if "image_grid_thw" in takes:
        height, width = GRIDS[number]
        temporal = field(vision, ("temporal_patch_size", "patch_temporal"), 1)
        temporal = temporal[0] if isinstance(temporal, (tuple, list)) else temporal
        shape: tuple[int, ...] = (channels * temporal * patch * patch,)
        if model_type in SQUARE_PATCHES:
            shape = (channels, patch, patch)
        images["pixel_values"] = noise(height * width, *shape, seed=number)
        images["image_grid_thw"] = torch.tensor([[1, height, width]])
        if "image_merge_sizes" in takes:
            images["image_merge_sizes"] = torch.tensor([1])
    elif "spatial_shapes" in takes:
        height, width = GRIDS[number]
        images["pixel_values"] = noise(1, height * width, channels * patch * patch, seed=number)
        images["pixel_attention_mask"] = torch.ones(1, height * width, dtype=torch.long)
        images["spatial_shapes"] = torch.tensor([[height, width]])
    elif model_type in FRAMES_OF or ("pixel_values_videos" in takes and "pixel_values" not in takes):
        name = "pixel_values" if "pixel_values" in takes else "pixel_values_videos"
        images[name] = noise(1, field(vision, ("num_frames", "frames_per_clip"), 2), channels, size, size, seed=number)
    elif "aspect_ratio_ids" in takes:  # tiles of a picture, of which a table of the model says the shape
        tiles = vision.max_num_tiles
        images["pixel_values"] = noise(1, 1, tiles, channels, size, size, seed=number)
        images["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
        images["aspect_ratio_mask"] = torch.ones(1, 1, tiles, dtype=torch.long)
        images["cross_attention_mask"] = torch.ones(1, TEXT_LENGTHS[number], 1, tiles, dtype=torch.long)
    elif model_type in TILES:
        images["pixel_values"] = noise(1, TILES[model_type], channels, size, size, seed=number)
        if "image_sizes" in takes:
            images["image_sizes"] = torch.tensor([[size, 2 * size]])
    elif "flattened_patches" in takes:  # row and column, from 1, and the patch
        height, width = GRIDS[number]
        place = torch.cartesian_prod(torch.arange(1, height + 1), torch.arange(1, width + 1)).float()
        patches = noise(height * width, vision.patch_embed_hidden_size, seed=number)
        images["flattened_patches"] = torch.cat([place, patches], dim=1)[None]
        if "input_ids" not in takes:
            images["attention_mask"] = torch.ones(1, height * width, dtype=torch.long)
    else:
        images["pixel_values"] = noise(1, channels, size, size, seed=number)
        if "image_sizes" in takes and "vision_feature_layer" not in takes:
            images["image_sizes"] = torch.tensor([[size, size]])
    if "image_attention_mask" in takes:  # pictures of a sample that each token of text may see
        images["pixel_values"] = images["pixel_values"][:, None]
        images["image_attention_mask"] = torch.ones(1, sample["input_ids"].shape[1], 1, dtype=torch.long)
    if "image_embeds_position_mask" in takes:
        images["image_embeds_position_mask"] = torch.zeros_like(sample["input_ids"])
        images["image_embeds_position_mask"][:, 1 : 1 + model.config.latent_query_num] = 1
    sample |= images
    token = placeholder(model)
    if token is None or "input_ids" not in takes or model_type in NO_PLACEHOLDER:
        return
    put(sample, token, picture_tokens(model, images))
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in takes:
            sample[name] = (sample["input_ids"] == token).long()


def hear(model: nn.Module, takes: set[str], sample: Sample, number: int) -> None:
    """Add a sound."""
    audio = config_of(model, ("audio_config", "encoder_config", "audio_encoder", "encoder"))
    model_type = model.config.model_type
    if {"input_ids", "input_features"} <= takes and "decoder_input_ids" in takes:
        del sample["input_ids"], sample["attention_mask"]
    if model_type in FIXED_LENGTH:
        frames = 2 * audio.max_source_positions
        sample["input_features"] = noise(1, audio.num_mel_bins, frames, seed=30 + number)
        return
    if model_type in SPECTROGRAMS:
        frames = 2 * field(audio, ("max_source_positions", "max_position_embeddings"), 128)
        sounds = {"input_features": noise(1, audio.num_mel_bins, frames, seed=30 + number)}
        names = ("input_features_mask", "feature_attention_mask")
        sounds |= {name: torch.ones(1, frames, dtype=torch.long) for name in names if name in takes}
        sample |= sounds
        put(sample, model.config.audio_token_id, audio_tokens(model, sounds))
        return
    if model_type == "audio-spectrogram-transformer":
        sample["input_values"] = noise(1, audio.max_length, audio.num_mel_bins, seed=30 + number)
        return
    if "input_features" in takes and "input_values" not in takes:
        bins = field(audio, BINS, 16) * (4 if model_type == "granite_speech5_ctc" else 1)
        bins = model.config.d_model if model_type == "pop2piano" else bins
        sample["input_features"] = noise(1, FRAMES[number], bins, seed=30 + number)
        length = FRAMES[number]
    else:
        channels = (1,) if model_type in WAVES_WITH_CHANNELS else ()
        sample["input_values"] = noise(1, *channels, WAVES[number], seed=30 + number)
        length = WAVES[number]
    for name in ("attention_mask", "padding_mask", "input_features_mask"):
        if name in takes and (name != "attention_mask" or "input_ids" not in sample):
            sample[name] = torch.ones(1, length, dtype=torch.long)


def config_of(model: nn.Module, names: tuple[str, ...]) -> Any:
    """The configuration inside the model's, at any depth, with the first of these names; else the model's."""
    found: dict[str, Any] = {}
    queue = [model.config]
    while queue:
        inner = {name: value for name, value in vars(queue.pop(0)).items() if hasattr(value, "to_dict")}
        found = {**inner, **found}
        queue += inner.values()
    return next((found[name] for name in names if name in found), model.config)


def field(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def placeholder(model: nn.Module) -> int | None:
    config = model.config
    return field(
        config, ("image_token_id", "image_token_index", "media_placeholder_token_id", "video_token_index"), None
    )


def picture_tokens(model: nn.Module, images: Sample) -> int:
    """How many tokens the model's own encoder makes of a picture."""
    parts = (model, getattr(model, "model", None))
    names = ["get_image_features"]
    if model.config.model_type in FRAMES_OF:
        names.insert(0, "get_video_features")
    get = next((getattr(part, name) for name in names for part in parts if hasattr(part, name)), None)
    if get is None:
        return 0
    with torch.no_grad():
        features = get(**images)
    if hasattr(features, "last_hidden_state"):
        pooled = getattr(features, "pooler_output", None)
        features = features.last_hidden_state if pooled is None else pooled
    parts = features if isinstance(features, (tuple, list)) else [features]
    return sum(part.shape[:-1].numel() for part in parts)


def audio_tokens(model: nn.Module, sounds: Sample) -> int:
    """How many tokens the model's own encoder makes of a sound."""
    parts = (model, getattr(model, "model", None))
    get = next((part.get_audio_features for part in parts if hasattr(part, "get_audio_features")), None)
    if get is None or model.config.model_type in ROTATED_BY_TIME:  # every second frame, and of these every second
        return sounds["input_features"].shape[-1] // 4
    with torch.no_grad():
        return int(get(**sounds).pooler_output.shape[:-1].numel())


def put(sample: Sample, token: int, count: int) -> None:
    ids = sample["input_ids"]
    held = torch.full((1, count), token)
    sample["input_ids"] = torch.cat([ids[:, :3], held, ids[:, 3:]], dim=1)
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])


def padded(samples: list[Sample]) -> Sample:
    """One batch of all samples, padded with zeros at the end."""
    batch: Sample = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        by_patch = name in FLAT or ("image_grid_thw" in samples[0] and name == "pixel_values")
        if values[0].dim() >= 2 and not by_patch:
            axis = 2 if name == "input_values" and values[0].dim() == 3 and values[0].shape[1] == 1 else 1
            longest = max(value.shape[axis] for value in values)
            values = [_longer(value.transpose(1, axis), longest).transpose(1, axis) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _longer(value: Tensor, length: int) -> Tensor:
    more = value.new_zeros(len(value), length - value.shape[1], *value.shape[2:])
    return torch.cat([value, more], dim=1)
