"""The ops behind every score, one file each: schema, typed wrapper, fake with all checks, and PyTorch kernel.

The native kernels live in `csrc/` and register for CPU and CUDA when this package is imported; the PyTorch kernels
serve every other device and installations without a native build. No op is differentiable: all read detached
activations and return nothing. `row_sumsq_`, `row_sumsq_pair_` and `gain_totals_` serve every model. The fused ops
compute the norms, the activation and the rotary embedding of a block in the pass that also accumulates the sums;
`gated_projection_` adds the matrix products before the activation.
"""

from __future__ import annotations

from plop_ext.ops import native
from plop_ext.ops._schema import FLOATS, FUSED_FLOATS, NAMESPACE, is_aligned, rows_read, sum_dtype
from plop_ext.ops.add_rms_norm import MAX_NORM_FEATURES, add_rms_norm_, add_rms_norm_fake, add_rms_norm_pytorch
from plop_ext.ops.gain_totals import gain_totals_, gain_totals_fake, gain_totals_pytorch
from plop_ext.ops.gated_activation import (
    ACTIVATIONS,
    gated_activation_,
    gated_activation_fake,
    gated_activation_pytorch,
)
from plop_ext.ops.gated_projection import (
    PROJECTION_FLOATS,
    gated_projection_,
    gated_projection_fake,
    gated_projection_pytorch,
    has_gated_projection,
)
from plop_ext.ops.rotary import MAX_HEAD_DIM, NORMED_HEAD_DIMS, rotary_, rotary_fake, rotary_pytorch
from plop_ext.ops.row_sumsq import row_sumsq_, row_sumsq_fake, row_sumsq_pytorch
from plop_ext.ops.row_sumsq_pair import row_sumsq_pair_, row_sumsq_pair_fake, row_sumsq_pair_pytorch

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "FUSED_FLOATS",
    "MAX_HEAD_DIM",
    "MAX_NORM_FEATURES",
    "NAMESPACE",
    "NORMED_HEAD_DIMS",
    "PROJECTION_FLOATS",
    "STATUS",
    "add_rms_norm_",
    "add_rms_norm_fake",
    "add_rms_norm_pytorch",
    "gain_totals_",
    "gain_totals_fake",
    "gain_totals_pytorch",
    "gated_activation_",
    "gated_activation_fake",
    "gated_activation_pytorch",
    "gated_projection_",
    "gated_projection_fake",
    "gated_projection_pytorch",
    "has_gated_projection",
    "is_aligned",
    "rotary_",
    "rotary_fake",
    "rotary_pytorch",
    "row_sumsq_",
    "row_sumsq_fake",
    "row_sumsq_pair_",
    "row_sumsq_pair_fake",
    "row_sumsq_pair_pytorch",
    "row_sumsq_pytorch",
    "rows_read",
    "sum_dtype",
]

STATUS = native.load()
