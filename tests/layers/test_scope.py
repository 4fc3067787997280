"""Which modules are an encoder of images or sound, in models whose configuration says so in its own ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plop_ext import InputError, score
from plop_ext.layers import discover
from tests.support.architecture_parts import PLAIN, TEXT, VISION, finished, image_batch


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


def multimodal(**parts: nn.Module) -> Any:
    """A vision-language model of the classes of Llava, with further parts of any name."""
    import transformers

    model: Any = nn.Module()
    model.config = transformers.LlavaConfig()
    model.vision_tower, model.language_model = Tower(model.config.vision_config), Tower(model.config.text_config)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


class Blocks(nn.Module):
    """Repeated layers without a configuration of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


@pytest.mark.parametrize(
    "name", ["aligner", "connector", "resampler", "merger", "vqmodel", "multi_modal_projector", "x"]
)
def test_what_lies_between_a_tower_and_the_language_model_is_of_the_tower(name: str) -> None:
    model = multimodal(**{name: Blocks()})
    assert names(model, "language") == {"language_model.blocks.0", "language_model.blocks.1"}
    assert {f"{name}.layers.0", f"{name}.layers.1"} < names(model, "vision")


def test_a_projector_of_sound_is_audio_whatever_its_name() -> None:
    import transformers

    model: Any = nn.Module()
    model.config = transformers.Qwen2AudioConfig()
    model.audio_tower, model.language_model = Tower(model.config.audio_config), Tower(model.config.text_config)
    model.multi_modal_projector = Blocks()
    assert "multi_modal_projector.layers.0" in names(model, "audio")


def test_the_expert_of_actions_is_another_part() -> None:
    import transformers

    model = multimodal(dit=Tower(transformers.LlamaConfig()), action_in=Blocks())
    model.config.dit_config = transformers.LlamaConfig()
    assert names(model, "language") == {"language_model.blocks.0", "language_model.blocks.1"}
    others = {f"{part}.{n}" for part in ("action_in.layers", "dit.blocks") for n in (0, 1)}
    assert names(model, "all") - names(model, "vision") - names(model, "language") == others
    assert {layer.name for layer in discover(model, include="action_in.layers.0").layers} < others


def test_a_codec_beside_layers_that_the_model_holds_itself_is_audio() -> None:
    import transformers

    model: Any = nn.Module()
    model.config = transformers.CsmConfig()
    model.codec_model, model.backbone = Tower(model.config.codec_config), Blocks()
    assert names(model, "language") == {"backbone.layers.0", "backbone.layers.1"}
    assert names(model, "audio") == {"codec_model.blocks.0", "codec_model.blocks.1"}


def test_an_encoder_of_speech_that_only_its_name_tells_is_audio() -> None:
    import transformers

    small = {"vocab_size": 64, "hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1, "speech_encoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "speech_encoder_attention_heads": 2}
    with torch.device("meta"):
        model = transformers.SeamlessM4TForSpeechToText(transformers.SeamlessM4TConfig(**small, **heads))
    model.to_empty(device="cpu")
    assert {name.split(".")[0] for name in names(model, "audio")} == {"speech_encoder"}
    assert {name.split(".")[0] for name in names(model, "language")} == {"text_decoder"}


def clip_classifier() -> nn.Module:
    import transformers

    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT)
    return finished(transformers.CLIPForImageClassification(config))


def test_a_model_whose_language_part_is_empty_is_scored_by_the_part_that_it_has() -> None:
    model = clip_classifier()
    found = discover(model)
    assert found.scope == "vision" and names(model, "vision") == {layer.name for layer in found.layers}
    assert all(name.startswith("vision_model.encoder") for name in names(model, "vision"))
    with pytest.warns(
        UserWarning, match='the model has no language part with layers to score; scored with scope="vision"'
    ):
        scores = score(model, [image_batch()], progress=False)
    assert scores.provenance["settings"]["scope"] == "vision" and len(scores.modules) == 12


def test_a_model_of_several_parts_without_language_is_scored_as_a_whole() -> None:
    import transformers

    model: Any = nn.Module()
    model.config = transformers.Qwen2AudioConfig()
    model.config.vision_config = transformers.CLIPVisionConfig()
    model.ears, model.eyes = Tower(model.config.audio_config), Tower(model.config.vision_config)
    found = discover(model)
    assert found.scope == "all" and len(found.layers) == 4


def test_what_is_asked_for_by_name_is_in_no_other_scope() -> None:
    assert discover(clip_classifier(), include="classifier").scope == "language"
    with pytest.raises(InputError, match="it has: language, vision"):
        discover(clip_classifier(), scope="audio")
