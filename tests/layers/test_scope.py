"""Which modules are an encoder of images or sound, in models whose configuration says so in its own ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plop_ext.layers import discover
from tests.support.architecture_parts import PLAIN, TEXT, VISION, finished


def names(model: nn.Module, scope: str) -> set[str]:
    return {layer.name for layer in discover(model, scope=scope).layers}


def encoder_decoder(kind: str, encoder: Any) -> nn.Module:
    """An encoder of another kind before a text decoder, whose configuration is called just `encoder`."""
    import transformers

    decoder = transformers.BertConfig(**PLAIN, is_decoder=True, add_cross_attention=True)
    config = getattr(transformers, f"{kind}EncoderDecoderConfig").from_encoder_decoder_configs(encoder, decoder)
    return finished(getattr(transformers, f"{kind}EncoderDecoderModel")(config))


def test_the_encoder_of_images_of_an_encoder_decoder_is_vision() -> None:
    import transformers

    model = encoder_decoder("Vision", transformers.ViTConfig(**VISION))
    language, vision = names(model, "language"), names(model, "vision")
    assert language and all(name.startswith("decoder.") for name in language)
    assert vision and all(name.startswith("encoder.") for name in vision)
    assert names(model, "all") == language | vision


def test_the_encoder_of_speech_of_an_encoder_decoder_is_audio() -> None:
    import transformers

    small = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    speech = transformers.Wav2Vec2Config(**PLAIN, **small, num_conv_pos_embedding_groups=2)
    model = encoder_decoder("Speech", speech)
    assert all(name.startswith("decoder.") for name in names(model, "language"))
    assert all(name.startswith("encoder.") for name in names(model, "audio"))


def test_an_encoder_of_text_is_language() -> None:
    import transformers

    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**PLAIN),
        transformers.BertConfig(**PLAIN, is_decoder=True, add_cross_attention=True),
    )
    model = finished(transformers.EncoderDecoderModel(config))
    assert names(model, "language") == names(model, "all")
    assert any(name.startswith("encoder.") for name in names(model, "language"))


class Tower(nn.Module):
    """Blocks of a part, with the configuration it was made from."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


@pytest.mark.parametrize(
    "scope, towers", [("language", {"model"}), ("vision", {"eyes"}), ("audio", {"ears", "mouth"})]
)
def test_encoders_described_inside_another_configuration(scope: str, towers: set[str]) -> None:
    """Qwen2.5-Omni: its classes and its nesting, around towers whose names tell nothing."""
    import transformers

    config = transformers.Qwen2_5OmniConfig()
    thinker = config.thinker_config
    model = nn.Module()
    model.config = config
    model.thinker = nn.Module()
    model.thinker.config = thinker
    model.thinker.eyes, model.thinker.ears = Tower(thinker.vision_config), Tower(thinker.audio_config)
    model.thinker.model = Tower(thinker.text_config)
    model.mouth = Tower(config.talker_config)
    found = {name.split(".blocks")[0].rsplit(".", 1)[-1] for name in names(model, scope)}
    assert found == towers


def test_an_encoder_beside_a_text_model_and_one_alone() -> None:
    import transformers

    model = nn.Module()
    model.config = transformers.GraniteSpeechConfig()
    model.tower, model.text = Tower(model.config.encoder_config), Tower(model.config.text_config)
    assert names(model, "language") == {"text.blocks.0", "text.blocks.1"}
    assert names(model, "audio") == {"tower.blocks.0", "tower.blocks.1"}
    model = nn.Module()
    model.config = transformers.ParakeetCTCConfig()
    model.tower = Tower(model.config.encoder_config)
    assert names(model, "language") == {"tower.blocks.0", "tower.blocks.1"}


def test_the_vision_tower_inside_a_retriever_is_vision() -> None:
    import transformers

    vision = {**VISION, "vision_use_head": False}
    text = {**TEXT, "head_dim": 8}
    vlm = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**vision, projection_dim=32),
        projection_dim=32,
    )
    with torch.device("meta"):
        model = transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=vlm))
    model.to_empty(device="cpu")
    assert not any("vision" in name for name in names(model, "language"))
    assert all("vision" in name for name in names(model, "vision"))
