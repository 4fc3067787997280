"""Models with more than one stream of rows: a batch of several samples, and each sample alone without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.architecture_parts import (
    HIDDEN,
    INNER,
    PLAIN,
    TEXT,
    VISION,
    VOCAB,
    clip,
    from_config,
    llava,
    qwen2_vl,
)
from tests.support.stream_media import (
    COUNTS,
    cut,
    frames,
    heard,
    idefics3,
    illustrated,
    images,
    naflex,
    patches,
    pictured,
    qwen2_5_vl,
    qwen2_audio,
    qwen3_vl,
    sounds,
    tiles,
    whisper_batch,
)
from tests.support.stream_texts import (
    Batch,
    lengths,
    masked,
    numbers,
    own_decoder_mask,
    own_decoder_mask_alone,
    packed,
    padded,
    padded_text,
    text_alone,
    texts_of,
    translated,
    translated_alone,
)

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
    "whisper": _case(_WHISPER, lambda: whisper_batch(_ALL), _each(whisper_batch)),
    "llama left": _case(_LLAMA, lambda: padded_text(left=True), text_alone),
    "packed": _case(_LLAMA, packed, text_alone),
    "packed with lengths": _case(_LLAMA, lambda: packed(cu_seq_lens_q=lengths), text_alone),
    "packed with numbers": _case(_LLAMA, lambda: packed(seq_idx=numbers), text_alone),
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
        lambda: {"input_ids": padded(texts_of()[1:], to=12), "attention_mask": masked(texts_of()[1:], to=12)},
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
        lambda: cut(_ALL),
        _each(lambda samples: cut(samples)),
        scope="all",
    ),
    "vit": _case(
        from_config("ViTModel", "ViTConfig", **VISION),
        lambda: {"pixel_values": images(3, 0)},
        lambda: [{"pixel_values": image[None]} for image in images(3, 0)],
    ),
    "siglip": _case(
        from_config("SiglipVisionModel", "SiglipVisionConfig", **VISION),
        lambda: {"pixel_values": images(3, 0)},
        lambda: [{"pixel_values": image[None]} for image in images(3, 0)],
    ),
    "siglip2": _case(
        from_config(
            "Siglip2VisionModel",
            "Siglip2VisionConfig",
            **{key: value for key, value in VISION.items() if key != "image_size"},
            num_patches=16,
            vision_use_head=False,
        ),
        lambda: naflex(_ALL),
        _each(naflex),
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
        lambda: sounds(_ALL),
        _each(sounds),
    ),
    "qwen2_audio": _case(qwen2_audio, lambda: heard(_ALL), _each(heard), scope="all", counted=frames),
    "clip": _case(
        clip,
        lambda: padded_text() | {"pixel_values": images(3, 0)},
        lambda: [
            batch | {"pixel_values": image[None]} for batch, image in zip(text_alone(), images(3, 0), strict=True)
        ],
        scope="all",
    ),
    "llava": _case(llava, lambda: illustrated(_ALL), _each(illustrated), scope="all"),
    "qwen2_vl": _case(qwen2_vl, lambda: pictured(_ALL), _each(pictured), scope="all"),
    "qwen2_5_vl": _case(qwen2_5_vl, lambda: pictured(_ALL), _each(pictured), scope="all"),
    "qwen3_vl": _case(qwen3_vl, lambda: pictured(_ALL), _each(pictured), scope="all"),
    "idefics3": _case(
        idefics3,
        lambda: tiles(_ALL, 2),
        lambda: [tiles((sample,), COUNTS[sample]) for sample in _ALL],
        scope="all",
        counted=patches,
    ),
}
