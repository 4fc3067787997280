"""The roofline of a forward counts the bytes and operations that scoring needs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.overhead import make_case, read_bytes
from benchmarks.shapes import SHAPES, build


@pytest.mark.parametrize("shape", ["tiny", "qwen3-0.6b"])
def test_the_roofline_counts_what_scoring_reads(shape: str) -> None:
    overrides = {"num_hidden_layers": 2, "vocab_size": 256}
    case = make_case(build(shape, overrides), 256, 2, 8, torch.device("cpu"))
    counted = roofline.scoring_bytes({**SHAPES[shape], **overrides}, 16, 4)
    assert {name: counted[name] for name in ("shared", "per_module")} == read_bytes(case)
    assert 0 < counted["fast"] < counted["shared"] / 4


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_the_roofline_counts_the_operations_of_the_matrix_products(shape: str) -> None:
    case = make_case(build(shape), 256, 2, 8, torch.device("cpu"))
    if shape == "tiny-moe":
        case.model.set_experts_implementation("eager")  # the counter knows no grouped product
    with FlopCounterMode(display=False) as counter:
        case.forward()
    counts = counter.get_flop_counts()["Global"]
    measured = sum(value for op, value in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    parts = roofline.forward_parts(SHAPES[shape], 2, 8, 4)
    assert sum(part.flops for part in parts if part.name != "attention") == measured


def test_a_part_takes_the_longer_of_its_bytes_and_its_operations() -> None:
    rates = roofline.Rates(bytes_per_s=10.0, flops_per_s=100.0)
    assert roofline.Stage("a", 20.0, 100.0).seconds(rates) == 2.0
    assert roofline.Stage("b", 20.0, 400.0).seconds(rates) == 4.0
