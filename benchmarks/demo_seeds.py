"""Does `plop demo` say the same whatever its seed? The verdict, the difference and the time of each seed.

`processor_seconds` is the time of all cores together, which other work on the machine changes little.

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
from typing import Any

import torch

from benchmarks import results

SEEDS = 10


def demo(seed: int, root: Path) -> dict[str, Any]:
    """Run the demo with a seed."""
    folder = root / str(seed)
    command = [sys.executable, "-m", "plop_ext", "demo", "-o", str(folder), "--seed", str(seed), "--quiet"]
    began = time.monotonic()
    with (root / f"{seed}.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
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
    parser.add_argument("--parallel", type=int, default=1, help="seeds at the same time; times mean little above 1")
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.quick, args.device = False, torch.device("cpu")
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(args.parallel) as pool:
        rows = []
        for row in pool.map(lambda seed: demo(seed, Path(root)), range(SEEDS)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    results.save(args, "demo_seeds", rows, model="plop-tiny", data="arithmetic", parallel=args.parallel)


if __name__ == "__main__":
    main()
