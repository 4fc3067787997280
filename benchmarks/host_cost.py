"""What the host does once per run for each module, at numbers of modules that large mixtures of experts have.

python -m benchmarks.host_cost --output benchmarks/results/host_cost.json

The modules are tiny, so that hardly any arithmetic is left: the figures are the cost of the Python code around a run,
per module. A part of a run that is linear in the number of modules has the same figure in every row.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import results
from benchmarks.shapes import build
from plop_ext.collecting.collector import Collector
from plop_ext.layers import Discovery, discover
from plop_ext.provenance import describe_model
from plop_ext.score_data.settings import Settings
from plop_ext.scores import Scores
from plop_ext.scoring.assemble import assemble
from plop_ext.scoring.baseline import WeightNorms, frobenius_baselines, frobenius_norms
from plop_ext.scoring.describe import describe_run
from plop_ext.scoring.outcome import Outcome
from plop_ext.scoring.warn_about import warn_about
from plop_ext.totals import TOTALS_FIELDS, Totals

SAMPLES = 4
# Modules in one layer of each model.
_PER_LAYER = {"linear layers": 7, "experts": 3 * 128 + 4}
_TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
_TINY_MOE = {**_TINY, "moe_intermediate_size": 8, "head_dim": 8, "num_experts": 128, "num_experts_per_tok": 2}


@dataclass
class Run:
    """What the parts of a run hand on to each other."""

    model: nn.Module
    found: Discovery
    norms: WeightNorms
    outcome: Outcome
    provenance: dict[str, Any]
    scores: Scores


def make(kind: str, modules: int) -> nn.Module:
    """Build a model with about `modules` matrices to score: `"linear layers"`, or `"experts"` of 128 per layer."""
    layers = max(1, round(modules / _PER_LAYER[kind]))
    shape, sizes = ("tiny", _TINY) if kind == "linear layers" else ("tiny-moe", _TINY_MOE)
    return build(shape, {**sizes, "num_hidden_layers": layers})


def parts(model: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the parts of a run on `model` in their order, each to be called at least once before the next is taken."""
    run = Run(model, Discovery((), ()), WeightNorms([], {}), *[None] * 3)  # type: ignore[arg-type]

    def discovered() -> None:
        run.found = discover(model)

    def read_norms() -> None:
        run.norms = frobenius_norms(run.found.layers)

    def hooked() -> None:
        with Collector(model, run.found.layers):
            pass

    def assembled() -> None:
        run.scores = assemble(run.found, run.outcome, run.provenance)

    def written() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run.scores.save(Path(folder) / "scores.json")
            Scores.load(Path(folder) / "scores.json")

    yield "discovery", discovered
    yield "weight norms", read_norms
    yield "baselines", lambda: frobenius_baselines(run.found.layers, run.norms.values)
    yield "hooks", hooked
    run.outcome = _outcome(run)
    run.provenance = _provenance(run)
    yield "assembly", assembled
    yield "warnings", lambda: _warned(run)
    yield "statistics", lambda: replace(run.scores).statistics()  # a copy, because scores keep their statistics
    yield "placement", lambda: run.scores.place(types=3)
    yield "save and load", written


def _outcome(run: Run) -> Outcome:
    """Return totals as of a run in which every second expert saw too few tokens."""
    layers = run.found.layers
    generator = np.random.default_rng(0)
    values = np.zeros((len(layers), SAMPLES, len(TOTALS_FIELDS)))
    values[..., TOTALS_FIELDS.index("tokens")] = 64
    values[..., TOTALS_FIELDS.index("sum_gain")] = 64 * generator.uniform(0.5, 2, (len(layers), SAMPLES))
    values[..., TOTALS_FIELDS.index("sum_gain_sq")] = values[..., TOTALS_FIELDS.index("sum_gain")] ** 2 / 64
    thin = [index for index, layer in enumerate(layers) if layer.adapter.routed and index % 2]
    values[thin] /= 64
    baselines = frobenius_baselines(layers, run.norms.values)
    return Outcome(Totals(values), run.norms, baselines, list(range(SAMPLES)), [0] * SAMPLES, {}, None)


def _provenance(run: Run) -> dict[str, Any]:
    settings = Settings("attention", "frobenius", 256, None, (), "language", None, 1, 0)
    described, device = describe_model(run.model), torch.device("cpu")
    return describe_run(described, {"name": None}, settings, run.outcome, device, time.perf_counter())


def _warned(run: Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_about(run.scores, run.outcome)


def measure(kind: str, modules: int, rounds: int) -> dict[str, Any]:
    """Return the CPU time of each part in microseconds per module, the least of `rounds`."""
    model = make(kind, modules)
    seconds: dict[str, float] = {}
    matrices = 0
    for name, part in parts(model):
        taken = []
        for _ in range(rounds):
            began = time.process_time()
            part()
            taken.append(time.process_time() - began)
        seconds[name] = min(taken)
        matrices = matrices or len(discover(model).layers)
        print(f"{kind}, {matrices} matrices: {name} {seconds[name]:.2f} s")
    row: dict[str, Any] = {"kind": kind, "modules": matrices}
    return row | {name: round(value / matrices * 1e6, 2) for name, value in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__, device="cpu")
    parser.add_argument("--modules", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--rounds", type=int, default=3)
    args = results.parse(parser, argv)
    if args.quick:
        args.modules, args.rounds = [30, 60], 1
    torch.set_num_threads(1)
    rows = [measure(kind, modules, args.rounds) for kind in _PER_LAYER for modules in args.modules]
    results.save(args, "host_cost", rows, samples=SAMPLES)


if __name__ == "__main__":
    main()
