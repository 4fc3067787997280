"""Models of two layers with random weights, and batches for them: built from configurations, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 64
HIDDEN = 32
INNER = 48
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _finished(LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **changes})))


def qwen2() -> nn.Module:
    """Biases of q, k and v are ten times larger than the features they are added to."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = _finished(Qwen2ForCausalLM(Qwen2Config(**_LLAMA)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=5.0)
    return model


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**{**_LLAMA, "tie_word_embeddings": True}, head_dim=8, sliding_window=16)
    return _finished(Gemma3ForCausalLM(config))


def bert(labels: int = 2) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=labels,
    )
    return _finished(BertForSequenceClassification(config))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=INNER,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _finished(OPTForCausalLM(config))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=INNER, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return _finished(T5ForConditionalGeneration(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return _finished(GPT2LMHeadModel(config))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return _finished(MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=2, num_experts_per_tok=1)))


DECODERS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "qwen2": qwen2, "gemma3": gemma3, "opt": opt}
TEXT_MODELS: dict[str, Callable[[], nn.Module]] = {**DECODERS, "bert": bert}


class Block(nn.Module):
    """Two linear layers with a residual connection."""

    def __init__(self, width: int = 16, inner: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    """A model of plain torch: a list of blocks and a head. Ignores any other item of a batch."""

    def __init__(self, width: int = 16, depth: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width, bias=bias) for _ in range(depth)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, *unused: Any, **ignored: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def token_batch(lengths: list[int], *, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """A batch of random token sequences padded to one length, with `attention_mask` and `labels`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    batch = {
        "input_ids": torch.zeros(len(lengths), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(lengths), longest, dtype=torch.long),
        "labels": torch.full((len(lengths), longest), -100),
    }
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        batch["input_ids"][row, place] = tokens
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = tokens
    return batch


def unpadded(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each sample of `batch` as a batch of its own, without padding."""
    keep = batch["attention_mask"].bool()
    return [{key: value[row : row + 1, keep[row]] for key, value in batch.items()} for row in range(len(keep))]


def _finished(model: nn.Module) -> nn.Module:
    """Seeded weights, larger than a fresh model's, so that layers are far from the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.float().eval()
