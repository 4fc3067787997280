"""Scoring on several GPUs: throughput of replicas, and what scoring adds to the forwards of a sharded model.

python -m benchmarks.scaling --output scaling.json
torchrun --nproc-per-node 2 -m benchmarks.scaling --output scaling.json --append

One row per way and number of ranks. Replicas score all batches with `score` on a loaded model, without early stop; the
code is the same for one rank. Under FSDP2 and tensor parallelism, `score` is compared with the plain forwards of the
same sharded model, in alternation. The model has the shape of a published one and random weights; every time is that
of the slowest rank, with what a run does once (weight norms, handshake, gathering) included.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks import results
from benchmarks.shapes import SHAPES, build
from plop_ext.errors import InputError
from plop_ext.scoring.score import score

REPLICAS, FSDP2, TENSOR = "replicas", "FSDP2", "tensor parallel"
WAYS = {"dp": REPLICAS, "fsdp2": FSDP2, "tp": TENSOR}
_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    results.add_append(parser)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="per sequence")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="dp,fsdp2,tp", help="what to measure; one rank has dp only")
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.batch, args.tokens, args.batches, args.rounds = "tiny", 2, 32, 4, 1
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(args.device)
    if ranks > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    leads = ranks == 1 or distributed.get_rank() == 0
    earlier = results.earlier(args, parser) if leads else None
    rows = []
    for way in args.ways.split(","):
        if ranks > 1 or WAYS[way] == REPLICAS:
            rows.append({"way": WAYS[way], "ranks": ranks} | _measure(args, WAYS[way], ranks))
            if leads:
                print(rows[-1], flush=True)
    if leads:
        results.save(
            args,
            "scaling",
            rows,
            earlier=earlier,
            key=("way", "ranks"),
            order=lambda row: ([*WAYS.values()].index(row["way"]), row["ranks"]),
            shape=args.shape,
            batch=args.batch,
            tokens=args.tokens,
            batches=args.batches,
            rounds=args.rounds,
            dtype="bf16" if args.device.type == "cuda" else "fp32",
        )
    if ranks > 1:
        distributed.destroy_process_group()


def _measure(args: Any, way: str, ranks: int) -> results.Row:
    """Return the figures of one way."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = build(args.shape, device=args.device, dtype=dtype)
    if way == FSDP2:
        _shard(model)
    elif way == TENSOR:
        _divide(model, args.device.type, ranks)
    data = _batches(args)
    # Ranks that hold parts of one model run the same batches.
    mine = data if way == TENSOR else data[int(os.environ.get("RANK", "0")) :: ranks]

    def scored(batches: Sequence[dict[str, Tensor]]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score(model, batches, max_samples=None, progress=False)

    try:
        scored(data[: 2 * ranks])
    except InputError as error:
        return {"seconds": None, "samples_per_s": None, "plain_seconds": None, "overhead": None, "refused": str(error)}
    _forwards(model, mine[:2], args.device)
    scoring, plain = [], []
    for _ in range(args.rounds):
        if way != REPLICAS:
            plain.append(_slowest(lambda: _forwards(model, mine, args.device), args.device, ranks))
        scoring.append(_slowest(lambda: scored(data), args.device, ranks))
    seconds = statistics.median(scoring)
    return {
        "seconds": round(seconds, 3),
        "samples_per_s": round(args.batch * args.batches / seconds, 2),
        "plain_seconds": round(statistics.median(plain), 3) if plain else None,
        "overhead": round(statistics.median(s / p for s, p in zip(scoring, plain, strict=True)), 4) if plain else None,
        "refused": None,
    }


def _batches(args: Any) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[args.shape]["vocab_size"]
    ids = torch.randint(0, vocabulary, (args.batches, args.batch, args.tokens), generator=generator)
    numbers = torch.arange(args.batches * args.batch).view(args.batches, args.batch)
    return [{"input_ids": rows, "sample_ids": which} for rows, which in zip(ids, numbers, strict=True)]


def _forwards(model: nn.Module, batches: Sequence[dict[str, Tensor]], device: torch.device) -> None:
    """Run the plain forwards of batches; as scoring does, one batch is queued ahead."""
    with torch.no_grad():
        for batch in batches:
            model(batch["input_ids"].to(device), use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(run: Callable[[], None], device: torch.device, ranks: int) -> float:
    """Return the seconds of the slowest rank."""
    if ranks > 1:
        distributed.barrier()
    started = time.perf_counter()
    run()
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    if ranks > 1:
        distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
    return float(seconds)


def _shard(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)
    fully_shard(model)


def _divide(model: Any, device: str, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {name: ColwiseParallel() for name in _COLUMNS} | {name: RowwiseParallel() for name in _ROWS}
    mesh = init_device_mesh(device, (ranks,))
    for block in model.layers:
        parallelize_module(block, mesh, plan)


if __name__ == "__main__":
    main()
