"""Train the embedded model: a byte-level Llama of 1.6 M parameters, on installed Python code and documentation.

On a GPU: `python3 scripts/train_embedded_model.py --minutes 5`. A few steps on a CPU:
`python scripts/train_embedded_model.py --device cpu --steps 3 --batch-size 2 --corpus DIR`.
Writes what `from_pretrained` reads, and `training.json` with the corpus, the budget and the held-out bits per byte.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from embedded_corpus import BOS_BYTE, EOS_BYTE, Corpus, build_corpus, default_folders, find_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger("train_embedded_model")

PAD, BOS, EOS = 256, 257, 258
VOCAB_SIZE = 264
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def sample(
    corpus: Corpus, batch: int, length: int, table: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, [batch, length] int64: windows that start at a line, behind a bos, as prompts do."""
    device = corpus.data.device
    picks = torch.randint(len(corpus.starts), (batch, 1), device=device, generator=generator)
    targets = table[corpus.data[corpus.starts[picks] + torch.arange(length, device=device)].int()]
    inputs = functional.pad(targets[:, :-1], (1, 0), value=BOS)
    return inputs, targets


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer: id = byte value, then pad, bos and eos."""
    # ByteLevel shows printable bytes as themselves and the others, in order, as the code points from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    vocabulary |= {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained model; projections into the residual stream start smaller, by sqrt(2 x layers)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def make_loss(model: LlamaForCausalLM, length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean cross-entropy of (inputs, targets), in nats.

    It walks the blocks itself: without a mask argument attention takes the causal flash kernel, compiled or not.
    """
    device = next(model.parameters()).device
    rotary = model.model.rotary_emb(torch.zeros(1, device=device), torch.arange(length, device=device)[None])

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.model.embed_tokens(inputs)
            for layer in model.model.layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            logits = model.lm_head(model.model.norm(hidden))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss


def save(model: LlamaForCausalLM, record: dict[str, Any], output: Path) -> None:
    """Write model, tokenizer and record beside `output`, then rename the files into it."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        model.save_pretrained(temporary)
        build_tokenizer().save_pretrained(temporary)
        Path(temporary, "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in Path(temporary).iterdir():
            path.chmod(0o644)
            os.replace(path, output / path.name)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the corpus, train within the budget, save; return the record written to training.json."""
    device = torch.device(arguments.device)
    length, batch, seed = arguments.sequence_length, arguments.batch_size, arguments.seed
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    files = find_files([folder.resolve() for folder in arguments.corpus] or default_folders(), seed)
    seen: set[bytes] = set()
    # The training set is read first, so that no paragraph of the held-out set is in it.
    if held_out := len(files) // 100:
        text = build_corpus(files[held_out:], seen, int(arguments.max_megabytes * 1e6), length, device)
        unseen = build_corpus(files[:held_out], seen, 20_000_000, length, device)
    else:
        logger.warning("fewer than 100 files: the held-out set is the training set")
        text = unseen = build_corpus(files, seen, int(arguments.max_megabytes * 1e6), length, device)
    logger.info(
        "corpus: %.1f MB in %d documents, held out %.2f MB in %d; %.0f s",
        len(text.data) / 1e6,
        text.files,
        len(unseen.data) / 1e6,
        unseen.files,
        time.monotonic() - began,
    )

    table = torch.arange(256, device=device)
    table[BOS_BYTE], table[EOS_BYTE] = BOS, EOS
    generator = torch.Generator(device).manual_seed(seed)
    model = build_model(seed).to(device)
    eager = make_loss(model, length)
    probe = torch.Generator(device).manual_seed(seed)
    evaluation = [sample(unseen, batch, length, table, probe) for _ in range(min(16, arguments.steps or 16))]

    @torch.no_grad()
    def bits_per_byte(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        return torch.stack([loss(*pair) for pair in evaluation]).mean().item() / math.log(2)

    loss = eager
    if device.type == "cuda" and not arguments.no_compile:
        began = time.monotonic()
        try:
            compiled = torch.compile(eager, dynamic=False)
            compiled(*evaluation[0]).backward()
            bits_per_byte(compiled)
            loss = compiled
            logger.info("compiled in %.0f s", time.monotonic() - began)
        except Exception as error:
            logger.warning("torch.compile failed, running eagerly: %s", str(error).partition("\n")[0])
        model.zero_grad()

    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    first = bits_per_byte(loss)
    logger.info("step 0, held-out %.4f bits/byte", first)
    step, began = 0, time.monotonic()
    reported, reported_step = began, 0
    while True:
        now = time.monotonic()
        done = step / arguments.steps if arguments.steps else (now - began) / (60 * arguments.minutes)
        if done >= 1:
            break
        warm = min(1.0, (done + 1e-4) / 0.02)
        rate = arguments.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss(*sample(text, batch, length, table, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if now - reported >= 20:
            bits = bits_per_byte(loss)
            speed = (step - reported_step) * batch * length / (time.monotonic() - reported) / 1e6
            logger.info(
                "step %d, %.0f s, lr %.2e, held-out %.4f bits/byte, %.2f MB/s", step, now - began, rate, bits, speed
            )
            if not math.isfinite(bits):
                raise SystemExit("training diverged; lower --learning-rate")
            reported, reported_step = time.monotonic(), step
    seconds = time.monotonic() - began

    # Rounded before the last measurement: the record describes the weights that ship.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    last = bits_per_byte(loss)
    record = {
        "corpus_bytes": len(text.data),
        "corpus_documents": text.files,
        "files_found": len(files),
        "steps": step,
        "tokens": step * batch * length,
        "sequence_length": length,
        "batch_size": batch,
        "learning_rate": arguments.learning_rate,
        "seconds": round(seconds, 1),
        "held_out_bytes": len(unseen.data),
        "held_out_bits_per_byte_start": round(first, 4),
        "held_out_bits_per_byte_end": round(last, 4),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "compiled": loss is not eager,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "date": datetime.date.today().isoformat(),
    }
    save(model.to(torch.bfloat16), record, arguments.output)
    logger.info("step %d, held-out %.4f bits/byte in bf16; wrote %s", step, last, arguments.output)
    return record


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    output = Path(__file__).resolve().parent.parent / "plop_ext" / "demo_assets" / "model"
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[], help="folders (default: this Python's libraries)"
    )
    parser.add_argument("--output", type=Path, default=output, help="folder to write")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time, without reading and compiling")
    parser.add_argument("--steps", type=int, help="number of steps instead of --minutes")
    parser.add_argument("--batch-size", type=int, default=64, help="windows per step")
    parser.add_argument("--sequence-length", type=int, default=1024, help="bytes per window")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the cosine schedule")
    parser.add_argument("--max-megabytes", type=float, default=300.0, help="cap on the corpus")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run eagerly on CUDA too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.sequence_length <= 1024 or min(arguments.batch_size, arguments.steps or 1) < 1:
        parser.error("--sequence-length must be 2 to 1024; --batch-size and --steps at least 1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return train(arguments)


if __name__ == "__main__":
    main()
