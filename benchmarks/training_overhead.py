"""What scoring adds to a step of LoRA training that scores; the steps between have no hooks.

python -m benchmarks.training_overhead --output benchmarks/results/training_overhead.json

The model has the shape of a published one and random weights, with LoRA on three types, gradient checkpointing and
AdamW: a step is forward, backward and update. The losses of all candidates have to be equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import overhead, results
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import Candidate, measure, ratios, summarize
from plop_ext.integrations.watch import TrainingWatch
from plop_ext.scoring.collected import settings_of

PLAIN = "plain step"
_TYPES = ["v_proj", "up_proj", "gate_proj"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="per sequence")
    parser.add_argument("--rounds", type=int, default=12)
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.batch, args.tokens, args.rounds = "tiny", 2, 32, 3
    cuda = args.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    model = adapted(build(args.shape, device=args.device, dtype=dtype, head=True))
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.tokens), device=args.device)
    step = training_step(model, ids)
    step()
    candidates = [
        Candidate(PLAIN, lambda _: step()),
        watched("PlopCallback, every 8th token", model, step, token_step=8),
        watched("PlopCallback, every token", model, step, token_step=1),
    ]
    check_losses(model, candidates, step)
    memory = {candidate.name: overhead.peak_memory(candidate, args.device) for candidate in candidates}
    seconds = dict(measure(candidates, args.device, rounds=args.rounds, lead=True))
    rows: list[results.Row] = []
    for name, values in seconds.items():
        row = {"candidate": name, "rounds": args.rounds}
        row |= summarize([1e3 * value for value in values]).row("ms", 3)
        row |= ratios(values, seconds[PLAIN]).row("ratio", 4)
        base, own = memory[PLAIN], memory[name]
        row["extra_peak_mib"] = None if base is None or own is None else round((own - base) / overhead.MIB, 1)
        rows.append(row)
        print(f"{name}: {row['ms']:.2f} ms, x {row['ratio']:.4f}", flush=True)
    results.save(
        args,
        "training_overhead",
        rows,
        shape=args.shape,
        batch=args.batch,
        tokens=args.tokens,
        dtype="bf16" if cuda else "fp32",
        types=_TYPES,
    )


def adapted(model: nn.Module) -> nn.Module:
    """Return the model with LoRA of rank 16, in training mode with gradient checkpointing."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped: Any = get_peft_model(model, LoraConfig(r=16, target_modules=_TYPES, task_type="CAUSAL_LM"))
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return wrapped.train()


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Return a function that takes a step and returns its loss; it leaves the values of the adapter unchanged."""
    # At a learning rate of 0 every step is the same one.
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=0.0)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # As Trainer does after each step.
        return loss.detach() if torch.isfinite(loss.detach()) else loss.new_zeros(())

    return step


def watched(name: str, model: nn.Module, step: Callable[[], Tensor], *, token_step: int) -> Candidate:
    """Return the step with the hooks of `PlopCallback`."""
    watch = TrainingWatch(model, settings_of("attention", token_step), 128)

    @contextmanager
    def attach() -> Iterator[TrainingWatch]:
        with watch:
            watch.due = True
            yield watch

    return Candidate(name, lambda _: step(), attach)


def check_losses(model: nn.Module, candidates: Sequence[Candidate], step: Callable[[], Tensor]) -> None:
    """Exit if a loss differs by a bit."""
    plain = step()
    for candidate in candidates:
        with candidate.attach():
            if not torch.equal(step(), plain):
                raise SystemExit(f"{candidate.name} changed the loss")


if __name__ == "__main__":
    main()
