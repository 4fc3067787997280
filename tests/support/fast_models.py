"""One small model of each family that the fast path knows, with norms that are not all ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import ops

needs_native = pytest.mark.skipif(not ops.STATUS.loaded, reason="the fast path needs the native kernels")

# Gains of single modules; a kernel rounds like the module it stands for but adds in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}

_TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
}

# model_type to (class of the configuration, fields).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 4, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", {}),
    "phi3_partial": ("Phi3Config", {"partial_rotary_factor": 0.5, "head_dim": 32}),
}


def make(
    family: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **fields: Any
) -> nn.Module:
    """The model without a head, in evaluation mode."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**_TEXT, **own, **fields})
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1:  # norms and biases
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(device, dtype)


def batches(count: int = 2, samples: int = 3, tokens: int = 12, padded: bool = True) -> list[dict[str, Tensor]]:
    """Batches of random tokens; samples lose one token of padding each, the first none."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 97, (samples, tokens), generator=generator)
        mask = torch.ones(samples, tokens, dtype=torch.long)
        if padded:
            for sample in range(samples):
                mask[sample, tokens - sample :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def hidden_states(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """What every block returns, and the last hidden state."""
    with torch.no_grad():
        inputs = {key: value.to(device) for key, value in batch.items()}
        found = model(**inputs, use_cache=False, output_hidden_states=True)
    return (*found.hidden_states, found.last_hidden_state)
