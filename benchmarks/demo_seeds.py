"""Does `plop demo` say the same whatever its seed? The verdict, the difference and the time of each seed.

With --parallel, several seeds run at the same time. Where there are enough cores, each has two of its own, as many as
the demo promises to need less than three minutes on. `processor_seconds` is the time of all cores together, which
other work on the machine changes little.

python -m benchmarks.demo_seeds --output benchmarks/results/demo_seeds.json

The seed draws the rows to train on, to score, to validate and to test, the initial weights of the adapters and the
order of the rows. Each seed is a process of its own, as a visitor's demo is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks import results

SEEDS = 10
CORES = 2


def all_cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def places(parallel: int) -> SimpleQueue[set[int] | None]:
    """Return the cores of each seed that runs at the same time, or None for each if there are too few."""
    found: SimpleQueue[set[int] | None] = SimpleQueue()
    cores = all_cores()
    enough = len(cores) >= CORES * parallel
    for number in range(parallel):
        found.put(set(cores[CORES * number : CORES * (number + 1)]) if enough else None)
    return found


def demo(seed: int, root: Path, cores: set[int] | None) -> dict[str, Any]:
    """Run the demo with a seed on some cores; None: on any."""
    folder = root / str(seed)
    command = [sys.executable, "-m", "plop_ext", "demo", "-o", str(folder), "--seed", str(seed), "--quiet"]
    began = time.monotonic()
    with (root / f"{seed}.log").open("w+") as log:
        # With a thread for each core. The cores are those of the calling thread, which the process inherits.
        threads = {} if cores is None else {"OMP_NUM_THREADS": str(len(cores))}
        if cores is not None:
            os.sched_setaffinity(0, cores)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **threads})
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code:
            log.seek(0)
            raise SystemExit(f"seed {seed} ended with {code}: {log.read()}")
    content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    [compared] = [row for row in content["rows"] if row["difference"]]
    return {
        "seed": seed,
        "decision": content["verdict"]["decision"],
        "winner": content["verdict"]["winner"],
        "compared": compared["label"],
        **{name: compared["difference"][name] for name in ("mean", "low", "high")},
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the result here as JSON; without it only print")
    parser.add_argument("--parallel", type=int, default=1, help="seeds at the same time")
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.quick, args.device = False, torch.device("cpu")
    free = places(args.parallel)
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.parallel) as pool:

        def run(seed: int) -> dict[str, Any]:
            cores = free.get()
            try:
                row = demo(seed, Path(root), cores)
            finally:
                free.put(cores)
            print(json.dumps(row), flush=True)
            return row

        rows = list(pool.map(run, range(SEEDS)))
    facts = {"parallel": args.parallel, "cores_each": CORES if len(all_cores()) >= CORES * args.parallel else "any"}
    results.save(args, "demo_seeds", rows, model="plop-tiny", data="arithmetic", **facts)


if __name__ == "__main__":
    main()
