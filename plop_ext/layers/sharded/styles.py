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
    while True:
        found = _enclosed(forward)
        if "original_forward" not in found or type(found.get("self")).__name__ not in _FAITHFUL:
            return forward
        forward = found["original_forward"]


def runs_whole_batch(forward: Any) -> bool:
    """Return whether the forward of divided experts runs them on the tokens of this process' batch, and on no others.

    In transformers, experts are divided by their columns, or between processes that share a batch (`ep_size` equal to
    `tp_size`), or the tokens travel to the processes that hold their experts.
    """
    found = _enclosed(forward)
    dispatch = found.get("implementation")
    if type(dispatch).__name__ == "AutoEP":
        return dispatch.all_reduce is not None and dispatch.megamoe is None  # type: ignore[union-attr]
    return type(dispatch).__name__ == "AllReduceEP" or type(found.get("self")).__name__ == "MoeExpertsParallel"


def _enclosed(forward: Any) -> dict[str, Any]:
    """Return the variables that a function of transformers encloses."""
    if not (getattr(forward, "__module__", None) or "").startswith("transformers."):
        return {}
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    return dict(zip(names, (cell.cell_contents for cell in forward.__closure__ or ()), strict=True))
