"""What plop_ext is measured against: the usual hooks, the best plain-PyTorch hooks, the published algorithm.

All are context managers that hook a model and hold their results afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

PAPER_GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


class Hooks:
    """Attaches `observe` to `modules` while the context lasts."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Any:
        for index, (name, module) in enumerate(self.modules.items()):

            def hook(module: nn.Module, args: Any, output: Any, index: int = index, name: str = name) -> None:
                self.observe(index, name, module, args[0], output)

            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def observe(self, index: int, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        raise NotImplementedError


class UsualHooks(Hooks):
    """`.float().norm(dim=-1)` of every input and output, and a running mean of their ratio per module."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self._means: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def observe(self, index: int, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        gain = (y.float().norm(dim=-1) / x.float().norm(dim=-1)).mean()
        self._calls[name] = self._calls.get(name, 0) + 1
        mean = self._means.get(name)
        self._means[name] = gain if mean is None else mean + (gain - mean) / self._calls[name]

    def gains(self) -> dict[str, float]:
        """Return the mean gain of each module."""
        return {name: float(mean) for name, mean in self._means.items()}


class BestHooks(Hooks):
    """The fastest plain PyTorch: no float32 copy, shared inputs read once, no wait, one reduction per forward.

    Args:
        modules: Name to module.
        rows: Tokens of a batch.
        device: Where the model runs.
    """

    def __init__(self, modules: Mapping[str, nn.Module], rows: int, device: torch.device) -> None:
        super().__init__(modules)
        count = len(self.modules)
        self._inputs = torch.empty(count, rows, device=device)
        self._outputs = torch.empty(count, rows, device=device)
        self._source = torch.zeros(count, dtype=torch.int64)
        self._source_on_device: Tensor | None = None
        self._totals = torch.zeros(count, dtype=torch.float64, device=device)
        self._tokens = 0
        self._last: weakref.ref[Tensor] | None = None
        self._last_index = -1

    def observe(self, index: int, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if self._last is None or self._last() is not x:
            self._last, self._last_index = weakref.ref(x), index
            self._norm(x, self._inputs[index])
        if self._source_on_device is None:
            self._source[index] = self._last_index
        self._norm(y, self._outputs[index])

    def end(self) -> None:
        """Close a forward."""
        if self._source_on_device is None:
            self._source_on_device = self._source.to(self._totals.device, non_blocking=True)
        gains = self._outputs / self._inputs[self._source_on_device]
        self._totals += gains.sum(dim=1, dtype=torch.float64)
        self._tokens += self._outputs.shape[1]
        self._last = None

    def gains(self) -> dict[str, float]:
        """Return the mean gain of each module."""
        return dict(zip(self.modules, (self._totals / self._tokens).tolist(), strict=True))

    @staticmethod
    def _norm(values: Tensor, out: Tensor) -> None:
        torch.linalg.vector_norm(values.reshape(-1, values.shape[-1]), dim=-1, dtype=torch.float32, out=out)


class PublishedScript(Hooks):
    """The algorithm of the script published with the paper (arXiv 2506.20629, soufiane001/plop), number for number.

    Both matmuls in float32, new noise per token, padding counted, one value per module and batch, the last call of a
    module called twice.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            {
                name: module
                for name, module in model.named_modules()
                if hasattr(module, "weight")
                and not isinstance(module, (nn.Embedding, nn.LayerNorm))
                and "norm" not in name
            }
        )
        self._batch: dict[str, tuple[float, float]] = {}
        self._batches: dict[str, list[tuple[float, float]]] = {}

    def observe(self, index: int, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        z, weight = x.float(), weight.float()
        if z.dim() > 2:
            z = z.reshape(-1, z.shape[-1])
        weight = weight * (1.0 / (weight.square().mean().sqrt() + 1e-8))
        noise = torch.randn_like(z)
        self._batch[name] = (self._mean_feature_norm(weight, z), self._mean_feature_norm(weight, noise))

    def end(self) -> None:
        """Close a batch."""
        for name, values in self._batch.items():
            self._batches.setdefault(name, []).append(values)
        self._batch = {}

    def metrics(self) -> dict[str, dict[str, float]]:
        """`actual` and `random` of each module: the unweighted means over the batches."""
        return {
            name: {key: sum(value[i] for value in values) / len(values) for i, key in enumerate(("actual", "random"))}
            for name, values in self._batches.items()
        }

    def type_nfn(self) -> dict[str, float]:
        """Return NFN of each group of modules: ratio of the sums of `actual` and `random`."""
        metrics = self.metrics()
        groups = {group: [metrics[name] for name in metrics if group in name] for group in PAPER_GROUPS}
        return {
            group: sum(member["actual"] for member in members) / sum(member["random"] for member in members)
            for group, members in groups.items()
            if members
        }

    @staticmethod
    def _mean_feature_norm(weight: Tensor, rows: Tensor) -> float:
        rows = rows * (1.0 / (rows.norm(dim=-1, keepdim=True) + 1e-8))
        return torch.mm(rows, weight.T).norm(dim=-1).mean().item() / weight.shape[1]
