"""Definitions that the ops share: their namespace, the types and rows that they read, and their argument checks.

The native kernels make the same checks in the same order (`csrc/checks.h`), with the same texts:
"op: arg must be <expected>, got <actual>".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NAMESPACE = "plop_ext"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FUSED_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
VECTOR = 8  # elements that the fused kernels read at once


def register_fake(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that registers the fake of an op.

    For each file that registers one, torch searches all imported modules for the file's source.
    """

    def register(fake: Callable[..., None]) -> Callable[..., None]:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        return fake

    return register


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which `row_sumsq_` sums elements of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_read(rows: int, step: int = 1, phase: int = 0) -> int:
    """Return the number of rows among `rows` that start at `phase` and lie `step` apart."""
    return max(0, -(-(rows - phase) // step))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name as libtorch prints it, so that fake and native messages are the same."""
    names = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    names |= {torch.int64: "Long", torch.int32: "Int", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte"}
    names |= {torch.bool: "Bool", torch.complex64: "ComplexFloat", torch.complex128: "ComplexDouble"}
    return names.get(dtype, str(dtype))


def check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: message)


def check_device(op: str, name: str, tensor: Tensor, other: Tensor) -> None:
    check(tensor.device == other.device, f"{op}: {name} must be on {other.device}, got {tensor.device}")


def check_dtype(op: str, name: str, tensor: Tensor, expected: torch.dtype) -> None:
    check(tensor.dtype == expected, f"{op}: {name} must be {dtype_name(expected)}, got {dtype_name(tensor.dtype)}")


def check_dim(op: str, name: str, tensor: Tensor, dim: int) -> None:
    check(tensor.dim() == dim, f"{op}: {name} must have {dim} dimensions, got {tensor.dim()}")


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    check(tensor.is_contiguous(), f"{op}: {name} must be contiguous, got a strided view")


def check_vector(op: str, name: str, tensor: Tensor) -> None:
    check_dim(op, name, tensor, 1)
    check_contiguous(op, name, tensor)


def check_shape(op: str, name: str, tensor: Tensor, shape: list[int]) -> None:
    check(list(tensor.shape) == shape, f"{op}: {name} must have shape {shape}, got {list(tensor.shape)}")


def check_elements(op: str, name: str, tensor: Tensor, elements: int) -> None:
    check(tensor.shape[0] == elements, f"{op}: {name} must have {elements} elements, got {tensor.shape[0]}")


def check_aligned(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor starts at a whole vector: the kernels read vectors, which have to be aligned."""
    offset = tensor.storage_offset()
    check(offset % VECTOR == 0, f"{op}: {name} must start at a multiple of {VECTOR} elements, got offset {offset}")


def is_aligned(x: Tensor) -> bool:
    """Return whether `x` is aligned for the kernels, within its storage and in memory that torch did not allocate."""
    return x.storage_offset() % VECTOR == 0 and x.data_ptr() % 16 == 0


def check_step(op: str, step: int, phase: int) -> None:
    check(step >= 1, f"{op}: step must be at least 1, got {step}")
    check(0 <= phase < step, f"{op}: phase must be in [0, step), got {phase}")


def check_rows(op: str, name: str, sums: Tensor, rows: int, step: int, phase: int, vectors: int = 1) -> None:
    """Check that `sums` has one element per row read, of each of `vectors` tensors."""
    expected = -((phase - rows) // step)
    if not torch.compiler.is_compiling():
        expected = max(0, expected)
    check_elements(op, name, sums, vectors * expected)


def given(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the optional arguments that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_fused(
    op: str,
    first: tuple[str, Tensor],
    tensors: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    dims: Mapping[str, int],
) -> None:
    """Check device, dtype and rank, as every fused op does first.

    Args:
        op: Name of the op.
        first: Name and value of the argument that defines device and dtype.
        tensors: The other tensors of that dtype, in the order of the schema.
        sums: The float32 sums, in the order of the schema.
        dims: Rank of each tensor that is not a vector.
    """
    name, x = first
    for other, tensor in {**tensors, **sums}.items():
        check_device(op, other, tensor, x)
    fits = x.dtype in FUSED_FLOATS
    check(fits, f"{op}: {name} must be float32, float16 or bfloat16, got {dtype_name(x.dtype)}")
    for other, tensor in tensors.items():
        check_dtype(op, other, tensor, x.dtype)
    for other, tensor in sums.items():
        check_dtype(op, other, tensor, torch.float32)
    for other, tensor in {name: x, **tensors, **sums}.items():
        check_dim(op, other, tensor, dims.get(other, 1))
