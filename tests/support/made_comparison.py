"""A comparison made by hand: one better than all-linear, one undecided, one diverged."""

from __future__ import annotations

import math

from plop_ext.experiment.intervals import Difference
from plop_ext.experiment.result import Comparison, ComparisonRow
from plop_ext.experiment.schedule import full
from plop_ext.experiment.verdict import Finding, judge

LOSSES = {"all-linear": (0.75, 1.25), "lowest-3": (0.9, 1.4), "mlp": (0.5, 1.0), "attention": ()}
DIFFERENCES = {"lowest-3": (0.15, -0.05, 0.35), "mlp": (-0.25, -0.3, -0.2)}


def made_comparison(*, edge: bool = True) -> Comparison:
    found = {label: Difference(*values, 0.975, 0.05, 0.05, 100, 2) for label, values in DIFFERENCES.items()}
    findings = [
        Finding(label, 1.0, not losses, found.get(label), 100.0 - len(label)) for label, losses in LOSSES.items()
    ]
    verdict = judge(findings, "all-linear", 0.01)
    rows = tuple(
        ComparisonRow(
            label=label,
            why="asked for",
            strategy="all" if label == "all-linear" else label.split("-")[0],
            types=("q_proj", "v_proj"),
            modules=14 - number,
            r=4 + number,
            params=1000,
            memory_bytes=None if number == 1 else 2**20,
            tuning=((10, 1e-3, 1.0 if losses else math.nan),),
            learning_rate=1e-3 if losses else None,
            lr_at_edge=edge and label == "lowest-3",
            validation_loss=1.0 if losses else math.nan,
            losses=losses,
            difference=found.get(label),
            outcome=verdict.outcomes[label],
            seconds_per_step=0.1,
        )
        for number, (label, losses) in enumerate(LOSSES.items())
    )
    return Comparison(
        rows=rows,
        verdict=verdict,
        reference="all-linear",
        loss_before=2.0,
        max_params=None,
        mismatch=0.004,
        schedule=full((1e-3,), (0, 1), 10, 4, 0).to_dict(),
        settings={"train_samples": 90, "validation_samples": 10, "test_samples": 100, "test_tokens": 1000},
        inputs={"model": {"class": "LlamaForCausalLM"}, "device": "x86_64", "versions": {"plop_ext": "0"}},
        seconds=60.0,
    )
