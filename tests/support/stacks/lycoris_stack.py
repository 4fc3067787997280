"""LyCORIS: its reader of presets, and its network around a model."""

from __future__ import annotations

from lycoris import LycorisNetwork, create_lycoris
from lycoris.utils.preset import read_preset

from tests.support.placed_models import linear_names, llama
from tests.support.stacks import Adapted


def adapted(path: str) -> Adapted:
    assert read_preset(path) is not None
    model = llama()
    network = create_lycoris(model, 1.0, linear_dim=1, linear_alpha=1, algo="lora", preset=path)
    names = {f"{LycorisNetwork.LORA_PREFIX}_{name.replace('.', '_')}": name for name in linear_names(model)}
    return {names[layer.lora_name]: (layer.lora_dim, float(layer.alpha)) for layer in network.loras}
