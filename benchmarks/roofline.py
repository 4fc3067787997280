"""The least time that a forward and its scoring can take on a device of given rates, from shapes alone.

A forward is cut into parts that no kernel here spans: each matrix product, attention, each chain of elementwise work
between them (residual add and norm; head norms and rotary embedding; activation times up). A part reads its weights
and every activation that enters it once and writes what leaves it once; its least time is that of its bytes at the
speed of a copy or that of its operations at the speed of a matrix product, whichever is longer. The parts' times are
added. Scoring adds the bytes of the activations that have to be read once more. Time that is spent launching is no
part of it, so small batches stay far above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: bytes copied (read plus written) and operations of a matrix product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Stage:
    """What one part of a forward moves and computes."""

    name: str
    bytes: float
    flops: float = 0.0

    def seconds(self, rates: Rates) -> float:
        return max(self.bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)


@dataclass(frozen=True)
class Widths:
    """Features of the tensors of a block of a Llama-like model: `config` is an entry of `shapes.SHAPES`."""

    hidden: int
    queries: int
    keys: int
    intermediate: int
    experts: int
    chosen: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Widths:
        heads = config["num_attention_heads"]
        head = config.get("head_dim", config["hidden_size"] // heads)
        experts = config.get("num_experts", 0)
        return cls(
            hidden=config["hidden_size"],
            queries=heads * head,
            keys=config["num_key_value_heads"] * head,
            intermediate=config["moe_intermediate_size" if experts else "intermediate_size"],
            experts=experts,
            chosen=config.get("num_experts_per_tok", 1),
        )


def forward_parts(config: Mapping[str, Any], batch: int, tokens: int, itemsize: int) -> list[Stage]:
    """Return the parts of a plain forward without `lm_head`."""
    w, rows = Widths.of(config), batch * tokens

    def matrix(name: str, k: int, m: int) -> Stage:
        return Stage(name, (k * m + rows * (k + m)) * itemsize, 2.0 * rows * k * m)

    def elementwise(name: str, features: int) -> Stage:
        return Stage(name, rows * features * itemsize)

    causal = 2.0 * batch * tokens * tokens * w.queries  # half of q k^T and of its product with v
    block = [
        elementwise("add, norm", 4 * w.hidden),
        matrix("q_proj", w.hidden, w.queries),
        matrix("k_proj", w.hidden, w.keys),
        matrix("v_proj", w.hidden, w.keys),
        elementwise("rotary", 2 * (w.queries + w.keys)),
        Stage("attention", rows * 2 * (w.queries + w.keys) * itemsize, causal),
        matrix("o_proj", w.queries, w.hidden),
        elementwise("add, norm", 4 * w.hidden),
    ]
    if w.experts:
        routed = rows * w.chosen
        weights = 3 * w.hidden * w.intermediate
        moved = min(w.experts, routed) * weights + 2 * rows * w.hidden + routed * 6 * w.intermediate
        block += [
            matrix("router", w.hidden, w.experts),
            Stage("experts", moved * itemsize, 2.0 * routed * weights),
        ]
    else:
        block += [
            matrix("gate_proj", w.hidden, w.intermediate),
            matrix("up_proj", w.hidden, w.intermediate),
            elementwise("activation", 3 * w.intermediate),
            matrix("down_proj", w.intermediate, w.hidden),
        ]
    return block * config["num_hidden_layers"] + [elementwise("embedding", 2 * w.hidden)]


def scoring_bytes(config: Mapping[str, Any], rows: int, itemsize: int) -> dict[str, int]:
    """Return the bytes of the activations that scoring reads once more.

    Returns:
        `shared`: each distinct input and each output once. `per_module`: inputs once per module. `fast`: what is left
        where the forward's own kernels emit the sums, v and the attention's output.
    """
    w = Widths.of(config)
    gated = w.chosen * w.intermediate
    outputs = w.queries + 2 * w.keys + w.hidden + 2 * gated + w.chosen * w.hidden
    inputs = 2 * w.hidden + w.queries + gated
    again = 2 * w.hidden + (0 if w.experts else w.hidden)
    size = rows * itemsize * config["num_hidden_layers"]
    found = {"shared": (inputs + outputs) * size, "per_module": (inputs + again + outputs) * size}
    # Stacked experts are no part of the fast path.
    found["fast"] = found["shared"] if w.experts else (w.keys + w.queries) * size
    return found
