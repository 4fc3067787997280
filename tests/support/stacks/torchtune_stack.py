"""torchtune: its builder of Llama 3 models with LoRA."""

from __future__ import annotations

import yaml

from tests.support.stacks import Adapted
from tests.support.stacks.stand_ins import stand_in

stand_in("torchao", "sentencepiece", "tiktoken", "blobfile")

from torchtune.models.llama3 import lora_llama3  # noqa: E402
from torchtune.modules.peft import LoRALinear  # noqa: E402

# Its names to those of a model of transformers.
NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def adapted(path: str) -> Adapted:
    with open(path, encoding="utf-8") as stream:
        keys = yaml.safe_load(stream)["model"]
    shape = {"num_layers": 11, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "intermediate_dim": 12}
    model = lora_llama3(vocab_size=32, max_seq_len=16, **shape, **keys)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            _, index, own = name.split(".", 2)
            found[f"model.layers.{index}.{NAMES[own]}"] = (layer.rank, layer.alpha)
    return found
