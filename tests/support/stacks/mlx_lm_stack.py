"""MLX LM: its reader of YAML, and the function that converts layers, on a model of its own."""

from __future__ import annotations

import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.support.stacks import Adapted


def adapted(path: str) -> Adapted:
    with open(path, encoding="utf-8") as stream:
        keys = yaml.load(stream, yaml_loader)
    assert set(keys) <= set(CONFIG_DEFAULTS)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=8,
            num_hidden_layers=11,
            intermediate_size=12,
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=32,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    assert keys["num_layers"] <= len(model.layers)
    linear_to_lora_layers(model, keys["num_layers"], keys["lora_parameters"])
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    return {name: (layer.lora_a.shape[-1], layer.scale * layer.lora_a.shape[-1]) for name, layer in found.items()}
