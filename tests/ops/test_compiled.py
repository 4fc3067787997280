"""`row_sumsq_` inside torch.compile: plain PyTorch in one graph, the sums of eager, and no float32 copy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from plop_ext import ops

ROWS = 2 * 9


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Cases share their code objects, and a compiler gives up on the ninth variant of one."""
    torch.compiler.reset()


class Block(nn.Module):
    """A norm, two projections and a residual: what a compiler fuses the sums of a hook into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def hooked(
    device: torch.device, dtype: torch.dtype, step: int = 1, phase: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two blocks whose projections write the sums of their input and output into a buffer each."""
    model = nn.Sequential(Block(), Block()).to(device, dtype)
    rows, buffers = ops.rows_read(ROWS, step, phase), {}

    def hook(module: Any, args: tuple[Tensor], y: Tensor) -> None:
        ops.row_sumsq_(module.sums[0], args[0], None, step, phase)
        ops.row_sumsq_(module.sums[1], y, module.bias, step, phase)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_buffer("sums", torch.full((2, rows), torch.nan, device=device), persistent=False)
            module.register_forward_hook(hook)
            buffers[name] = module.sums
    return model, buffers


def graph_targets(graphs: list[torch.fx.GraphModule]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes}


def capture(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("step, phase", [(1, 0), (4, 3)])
@torch.no_grad()
def test_hooks_of_a_compiled_model_write_what_eager_hooks_write(
    device: torch.device, backend: str, step: int, phase: int
) -> None:
    model, buffers = hooked(device, torch.float32, step, phase)
    x = torch.randn(2, 9, 64, device=device)
    logits = model(x)
    eager = {name: sums.clone() for name, sums in buffers.items()}
    for sums in buffers.values():
        sums.fill_(torch.nan)
    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), logits)
    for name, sums in buffers.items():
        torch.testing.assert_close(sums, eager[name], rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_traced_graph_is_plain_pytorch(device: torch.device) -> None:
    model, _ = hooked(device, torch.float32)
    graphs: list[torch.fx.GraphModule] = []
    torch.compile(model, backend=capture(graphs), fullgraph=True)(torch.randn(2, 9, 64, device=device))
    assert len(graphs) == 1 and not any("plop_ext" in target for target in graph_targets(graphs))


def test_a_direct_call_stays_one_kernel(device: torch.device) -> None:
    graphs: list[torch.fx.GraphModule] = []
    out, x = torch.full((3,), torch.nan, device=device), torch.randn(3, 8, device=device)
    torch.compile(torch.ops.plop_ext.row_sumsq_.default, backend=capture(graphs), fullgraph=True)(out, x)
    assert any("plop_ext.row_sumsq_" in target for target in graph_targets(graphs))
    torch.testing.assert_close(out, x.square().sum(1))


@torch.no_grad()
def test_inductor_keeps_no_float32_copy(device: torch.device) -> None:
    model, _ = hooked(device, torch.bfloat16)
    x = torch.randn(2, 9, 64, device=device, dtype=torch.bfloat16)
    _, sources = run_and_get_code(torch.compile(model, fullgraph=True), x)
    buffers = re.findall(r"empty_strided\w*\(\((.*?)\), \(.*?\), torch\.(\w+)\)", "".join(sources))
    sizes: dict[str, list[int]] = {"bfloat16": [], "float32": [0]}
    for shape, kind in buffers:
        sizes[kind].append(math.prod(int(size) for size in shape.split(",") if size.strip()))
    assert max(sizes["bfloat16"]) == ROWS * 96
    assert max(sizes["float32"]) <= ROWS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(12, 40), (3, 4, 40), (4, 3, 40)], ids=str)
@pytest.mark.parametrize("bias", [None, "vector", "float32", "per head"])
def test_every_argument(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], bias: str | None) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    x = x.transpose(0, 1) if shape == (4, 3, 40) else x
    sum_dtype = ops.sum_dtype(dtype)
    shift = None
    if bias is not None:
        size = x.shape[1:] if bias == "per head" and x.dim() == 3 else (40,)
        shift = torch.randn(size, device=device).to(sum_dtype if bias == "float32" else dtype)
    compiled = torch.compile(ops.row_sumsq_, backend="aot_eager", fullgraph=True)
    for step, phase in ((1, 0), (5, 4)):
        rows = ops.rows_read(12, step, phase)
        expected, actual = (torch.full((rows,), torch.nan, dtype=sum_dtype, device=device) for _ in range(2))
        ops.row_sumsq_(expected, x, shift, step, phase)
        assert compiled(actual, x, shift, step, phase) is None
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_nothing_is_differentiated(device: torch.device) -> None:
    out, x = torch.zeros(3, device=device), torch.randn(3, 8, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    torch.compile(ops.row_sumsq_, backend="aot_eager", fullgraph=True)(out, x * 2, bias)
    assert not out.requires_grad and out.grad_fn is None
    torch.testing.assert_close(out, (x * 2 - bias).detach().square().sum(1))


@pytest.mark.parametrize("out, bias", [(4, None), (2, None), (3, 1), (3, 7)])
def test_sizes_that_would_broadcast_are_refused(device: torch.device, out: int, bias: int | None) -> None:
    sums, x = torch.zeros(out, device=device), torch.randn(3, 8, device=device)
    shift = None if bias is None else torch.zeros(bias, device=device)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        torch.compile(ops.row_sumsq_, backend="aot_eager", fullgraph=True)(sums, x, shift)
    with pytest.raises(RuntimeError, match="elements, got"):
        ops.row_sumsq_(sums, x, shift)
