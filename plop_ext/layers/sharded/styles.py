"""The forwards that transformers' tensor parallelism puts around those of modules."""

from __future__ import annotations

from typing import Any

# Styles that compute what the module would, up to the distribution of inputs and outputs over the processes.
_FAITHFUL = frozenset(
    {
        "ColwiseParallel",
        "LocalParamsParallel",
        "MlaKvAProjParallel",
        "PackedColwiseParallel",
        "ReplicatedWithGradAllReduce",
        "RowwiseParallel",
        "TensorParallelLayer",
    }
)


def without_style(forward: Any) -> Any:
    """Return the forward inside those of transformers' tensor parallelism; `forward` itself if there is none."""
    while getattr(forward, "__module__", "").startswith("transformers."):
        names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
        if "original_forward" not in names:
            break
        found = dict(zip(names, (cell.cell_contents for cell in forward.__closure__), strict=True))
        if type(found.get("self")).__name__ not in _FAITHFUL:
            break
        forward = found["original_forward"]
    return forward
