"""The stream of rows in which a module sits: tokens of an encoder or a decoder, image patches, sound frames."""

from __future__ import annotations

from typing import Any

from torch import nn

from plop_ext.layers.scope import parts_of
from plop_ext.layers.walk import base_model, base_modules

TEXT, ENCODER, DECODER, VISION, AUDIO = "text", "encoder", "decoder", "vision", "audio"
# A module beside encoder and decoder, such as a projection between them.
OUTSIDE = "outside"

_BY_INPUT = {
    "pixel_values": VISION,
    "pixel_values_videos": VISION,
    "flattened_patches": VISION,
    "input_features": AUDIO,
    "input_values": AUDIO,
}
_ENCODERS = ("encoder", "text_encoder", "speech_encoder", "audio_encoder", "image_encoder")
_DECODERS = ("decoder", "text_decoder")


class ModelStreams:
    """The streams of a model.

    Args:
        model: The model.

    Attributes:
        main: Stream of the model's main input: `TEXT`, `VISION` or `AUDIO`.
        pairs: Whether the model has an encoder and a decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        root = base_model(model)
        self._part = parts_of(model)
        self._prefixes: dict[str, str] = {}
        inputs, tokens = [], False
        for name, module in base_modules(model):
            encoder, decoder = _child(module, _ENCODERS), _child(module, _DECODERS)
            if encoder is None or decoder is None or not getattr(_config(module), "is_encoder_decoder", False):
                continue
            inputs.append(_input_stream(encoder[1]))
            generates = _has_vocabulary(decoder[1]) or _has_vocabulary(module)
            tokens |= generates
            self._prefixes[_joined(name, encoder[0])] = ENCODER if inputs[-1] == TEXT else inputs[-1]
            self._prefixes[_joined(name, decoder[0])] = DECODER if generates else inputs[-1]
        self.pairs = tokens
        multimodal = self._part is not None and not inputs
        self.main = inputs[0] if inputs else TEXT if multimodal else _input_stream(root)
        self._rest = OUTSIDE if inputs else self.main
        head = _output_head(root) if tokens else None
        self._heads = {name for name, module in base_modules(model) if head is not None and module is head}

    def __call__(self, name: str) -> str:
        """Return the stream in which the module `name` sits."""
        scope = "language" if self._part is None else self._part(name)
        if scope != "language":
            return scope
        for prefix, stream in self._prefixes.items():
            if name == prefix or name.startswith(prefix + "."):
                return stream
        return DECODER if name in self._heads else self._rest


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _input_stream(module: nn.Module) -> str:
    field: Any = getattr(module, "main_input_name", None)
    return _BY_INPUT.get(field, TEXT) if isinstance(field, str) else TEXT


def _child(module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    return next(((name, module._modules[name]) for name in names if module._modules.get(name) is not None), None)  # type: ignore[return-value]


def _joined(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _has_vocabulary(module: nn.Module) -> bool:
    return getattr(_config(module), "vocab_size", None) is not None


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None
