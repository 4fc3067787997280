"""A GGUF file of the tiny Llama, as llama.cpp's converter writes it: its names, its order of rotary rows, Q8_0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.support.tiny_lm import byte_tokenizer, tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 260}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write the file, with the matrices of its blocks in Q8_0; return the weights before they were rounded."""
    import gguf

    model = tiny_llama(torch.float32, **SIZES)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    vocab = byte_tokenizer().get_vocab()
    writer.add_token_list([*sorted(vocab, key=lambda token: vocab[token]), "\u0120a"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["\u0120 a"])
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        stem = key.removesuffix(".weight")
        block, _, leaf = stem.removeprefix("model.layers.").partition(".") if ".layers." in stem else ("", "", stem)
        name = f"blk.{block}.{_NAMES[leaf]}" if block else _NAMES[leaf]
        values = tensor.numpy()
        if _NAMES[leaf] in heads:
            values = _interleaved(values, heads[_NAMES[leaf]])
        if block and values.ndim == 2:
            codes = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(model.state_dict())


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in the order in which llama.cpp rotates them."""
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
