"""A random Llama of 20 thousand weights and a tokenizer with one token for each byte."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement

PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer(
    *, bos: bool = True, sequence_end: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose id for an ASCII character is `char_id` of it.

    Args:
        bos: Start sequences with <s>.
        sequence_end: End sequences with </s>, as some tokenizers do.
        template: Chat template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos or sequence_end:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if sequence_end else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Look up the id of each character, without the tokenizer's own encoding."""
    space, newline = "\u0120", "\u010a"  # how byte-level vocabularies write them
    vocab = tokenizer.get_vocab()
    return [vocab[{" ": space, "\n": newline}.get(char, char)] for char in text]


def tiny_llama(dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    """Build the model from seed 0, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings: dict[str, object] = {
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        return LlamaForCausalLM(LlamaConfig(**(settings | config))).to(dtype).eval()


def placement(model: LlamaForCausalLM, *types: str, strategy: str = "types") -> Placement:
    """Place LoRA on all modules of the named types, or on all linear ones inside the blocks."""
    targets = tuple(
        LoraTarget.of_module(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name and (not types or name.endswith(types))
    )
    return Placement(
        modules=tuple(target.name for target in targets),
        types=types,
        strategy=strategy,
        label="+".join(types) or "all-linear",
        model="LlamaForCausalLM",
        lora_targets=targets,
    )
