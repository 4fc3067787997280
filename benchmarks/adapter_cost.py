"""What LoRA on fewer module types saves: step time, memory and size of the adapter, with unmodified PEFT.

python -m benchmarks.adapter_cost --output benchmarks/results/adapter_cost.json

The model has the shape of a published one and random weights; a step is forward, backward and an update by AdamW. The
cost depends on shapes alone, so the types are those that PLoP chose on the small trained models of
`benchmarks/placement`, and the placements in common use. A placement has rank 16 (one rank), or the rank that gives it
the parameters of all-linear at rank 16, as nearly as a whole rank can (equal parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import overhead, results
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import Candidate, measure, ratios, summarize

RANK = 16
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLACEMENTS = {
    "all-linear": ALL,
    "PLoP k = 3": ("v_proj", "up_proj", "down_proj"),
    "MLP": ALL[4:],
    "attention": ALL[:4],
}


@dataclass(frozen=True)
class Adapter:
    """A placement with its rank.

    Attributes:
        name: Its name in the result.
        types: Module types that get LoRA.
        rank: The same for all modules.
        parameters: Trainable parameters.
    """

    name: str
    types: tuple[str, ...]
    rank: int
    parameters: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="per sequence")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in the backward")
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.batch, args.tokens, args.rounds = "tiny", 2, 32, 2
    cuda = args.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build(args.shape, device=args.device, dtype=dtype, head=True)
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.tokens), device=args.device)
    adapters = adapters_of(model)
    candidates = [candidate(model, adapter, ids, args.checkpointing) for adapter in adapters]
    peaks = [overhead.peak_memory(each, args.device) for each in candidates]
    seconds = measure(candidates, args.device, rounds=args.rounds, lead=True)
    base = seconds[adapters[0].name]
    rows: list[results.Row] = []
    for adapter, peak in zip(adapters, peaks, strict=True):
        values = seconds[adapter.name]
        row: results.Row = {"placement": adapter.name, "types": list(adapter.types), "rank": adapter.rank}
        row |= {"parameters": adapter.parameters, "rounds": args.rounds}
        row |= summarize([1e3 * value for value in values]).row("ms", 3)
        row |= ratios(values, base).row("ratio", 4)
        row["peak_gib"] = None if peak is None else round(peak / 2**30, 3)
        rows.append(row)
        print(f"{adapter.name}: {row['ms']:.2f} ms, x {row['ratio']:.4f}", flush=True)
    results.save(
        args,
        "adapter_cost",
        rows,
        shape=args.shape,
        batch=args.batch,
        tokens=args.tokens,
        dtype="bf16" if cuda else "fp32",
        checkpointing=args.checkpointing,
    )


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Return every placement at one rank and at equal parameters, all-linear first."""
    per_rank = dict.fromkeys(ALL, 0)
    for name, module in model.named_modules():
        if (leaf := name.rpartition(".")[2]) in per_rank and isinstance(module, nn.Linear):
            per_rank[leaf] += module.in_features + module.out_features
    budget = RANK * sum(per_rank.values())
    found = []
    for name, types in PLACEMENTS.items():
        width = sum(per_rank[each] for each in types)
        found.append(Adapter(f"{name}, one rank", types, RANK, RANK * width))
        if types != ALL:
            rank = round(budget / width)
            found.append(Adapter(f"{name}, equal parameters", types, rank, rank * width))
    return found


def candidate(model: nn.Module, adapter: Adapter, ids: Tensor, checkpointing: bool) -> Candidate:
    """Return a step with the adapter, which is there during the timing only."""
    from peft import LoraConfig, get_peft_model

    @contextmanager
    def attach() -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
        config = LoraConfig(r=adapter.rank, target_modules=list(adapter.types), task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config).train()
        if checkpointing:
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW((each for each in wrapped.parameters() if each.requires_grad), lr=1e-4)
        try:
            yield wrapped, optimizer
        finally:
            if checkpointing:
                wrapped.gradient_checkpointing_disable()
                wrapped.disable_input_require_grads()
            wrapped.unload()

    def step(attached: tuple[nn.Module, torch.optim.Optimizer]) -> None:
        wrapped, optimizer = attached
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(adapter.name, step, attach)


if __name__ == "__main__":
    main()
