"""How long do the commands that read scores take on models with very many modules?

python -m benchmarks.large_files --output benchmarks/results/large_files.json

The scores are made up: every type has its own NFN, and modules and samples scatter around it. Each command is a
process of its own, so that starting Python counts. `processor_seconds` is the time of all its cores together,
which other work on the machine changes little.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from plop_ext.lora_target import LoraTarget
from plop_ext.score_data import ScoredModule
from plop_ext.scores import Scores
from plop_ext.totals import TOTALS_FIELDS, Totals

SAMPLES, TOKENS, WIDTH = 8, 100.0, 64


def made(types: int, layers: int, each: int) -> Scores:
    """Return scores of `each` modules of each of `types` types in each of `layers` layers."""
    places = [(t, layer, i) for layer in range(layers) for t in range(types) for i in range(each)]
    modules = []
    for t, layer, i in places:
        name, label = f"model.layers.{layer}.experts.{i}.type_{t:04}", f"type_{t:04}"
        target = LoraTarget.of_module(name, WIDTH, WIDTH)
        modules.append(ScoredModule(name, label, layer, WIDTH, WIDTH, 1.0, 8.0, target))
    rng = np.random.default_rng(0)
    level = np.array([0.5 + 2.5 * t / types for t, _, _ in places])
    gain = level[:, None] * (1 + 0.05 * rng.standard_normal((len(places), SAMPLES)))
    tokens = np.full(gain.shape, TOKENS)
    fields = dict.fromkeys(TOTALS_FIELDS, np.zeros(gain.shape))
    fields |= {"sum_gain": gain * TOKENS, "sum_gain_sq": gain**2 * TOKENS, "tokens": tokens}
    provenance = {
        "settings": {"compat": None},
        "model": {"class": "Made", "parameters": len(places) * WIDTH**2, "dtype": "bfloat16"},
        "data": {"name": "made", "samples": SAMPLES},
    }
    ids = np.arange(SAMPLES)
    return Scores(tuple(modules), Totals.from_fields(fields), ids, ids.copy(), (), provenance)


def timed(command: Sequence[str]) -> dict[str, float]:
    """Run a command and return its seconds."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "plop_ext", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    taken = {"seconds": time.monotonic() - began, "processor_seconds": usage.ru_utime + usage.ru_stime}
    return {name: round(value, 2) for name, value in taken.items()}


def measure(command: str, shape: tuple[int, int, int], rounds: int, folder: Path) -> dict[str, Any]:
    """Return the row of one command on scores of one shape."""
    scores, output = folder / "scores.json", folder / ("report.html" if command == "report" else "placement.json")
    made(*shape).save(scores, overwrite=True)
    runs = [timed([command, str(scores), "-o", str(output), "--force", "-qq"]) for _ in range(rounds)]
    return {
        "command": command,
        "modules": shape[0] * shape[1] * shape[2],
        "types": shape[0],
        "megabytes": round(scores.stat().st_size / 1e6, 1),
        "output_megabytes": round(output.stat().st_size / 1e6, 2),
        **{name: float(np.median([run[name] for run in runs])) for name in runs[0]},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__, device="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = results.parse(parser, argv)
    cases = [("place", (20, 100, 50)), ("place", (2000, 10, 1)), ("report", (20, 50, 50))]
    if args.quick:
        args.rounds, cases = 1, [("place", (4, 3, 2))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for command, shape in cases:
            rows.append(measure(command, shape, args.rounds, Path(folder)))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    results.save(args, "large_files", rows, samples=SAMPLES, rounds=args.rounds)


if __name__ == "__main__":
    main()
