"""The oracle for every kind of layer: NFN by its definition, in float64, by code of its own.

Each layer's W is written out as a dense float64 matrix, each of its inputs is kept, and W z is multiplied again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import reference
from plop_ext.score_data import ScoredModule
from plop_ext.scores import Scores

Columns = dict[str, Tensor]


def dense_weight(module: nn.Module) -> Tensor:
    """[M, K] float64 of an ordinary, a transposed or a convolutional layer."""
    weight = module.weight.detach().double()
    if type(module).__name__ == "Conv1D":
        return weight.T
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups > 1:
        out, per_group = weight.shape[0] // module.groups, weight.shape[1]
        wide = torch.zeros(weight.shape[0], module.in_channels, *weight.shape[2:], dtype=torch.float64)
        for group in range(module.groups):
            rows = slice(group * out, (group + 1) * out)
            wide[rows, group * per_group : (group + 1) * per_group] = weight[rows]
        weight = wide
    return weight.flatten(1)


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """[B, positions, K] float64: the patch at each output position, cut out one by one."""
    x = x.detach().double()
    dims = len(conv.kernel_size)
    if conv.padding == "same":
        sizes = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pad = [side for size in reversed(sizes) for side in (size // 2, size - size // 2)]
    else:
        padding = conv.padding if not isinstance(conv.padding, str) else (0,) * dims
        pad = [side for size in reversed(padding) for side in (size, size)]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, pad, mode=mode)
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    counts = [(n - s) // st + 1 for n, s, st in zip(x.shape[2:], spans, conv.stride, strict=True)]
    cut = []
    for position in torch.cartesian_prod(*[torch.arange(n) for n in counts]).view(-1, dims).tolist():
        where = tuple(
            slice(p * st, p * st + s, d)
            for p, st, s, d in zip(position, conv.stride, spans, conv.dilation, strict=True)
        )
        cut.append(x[(slice(None), slice(None), *where)].flatten(1))
    return torch.stack(cut, dim=1)


def gains(weight: Tensor, z: Tensor) -> Tensor:
    """||W z|| / ||z|| of each row of `z`; NaN where z is zero."""
    z = z.detach().double().reshape(-1, z.shape[-1])
    return (z @ weight.T).norm(dim=-1) / z.norm(dim=-1)


def nfn_of(weight: Tensor, values: Tensor) -> float:
    return float(values[values.isfinite()].mean()) / reference.frobenius_baseline(weight)


def expert_matrices(module: nn.Module) -> dict[str, list[Tensor]]:
    """Projection name to the [M, K] float64 matrix of each expert."""
    down = [w.double() for w in module.down_proj.detach()]
    first = [w.double() for w in (module.gate_up_proj if module.has_gate else module.up_proj).detach()]
    if module.is_transposed:
        down, first = [w.T for w in down], [w.T for w in first]
    if not module.has_gate:
        return {"up_proj": first, "down_proj": down}
    if getattr(module, "is_concatenated", True):
        half = first[0].shape[0] // 2
        gate, up = [w[:half] for w in first], [w[half:] for w in first]
    else:
        gate, up = [w[0::2] for w in first], [w[1::2] for w in first]
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def expert_gains(module: nn.Module, hidden: Tensor, chosen: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """`<expert>.<projection>` to the gains of the counted tokens routed to it, one expert at a time."""
    matrices = expert_matrices(module)
    found = {}
    for expert in range(module.num_experts):
        token = torch.where((chosen == expert).any(dim=-1) & counted)[0]
        z = hidden[token].detach()
        for name in matrices:
            if name != "down_proj":
                found[f"{expert}.{name}"] = gains(matrices[name][expert], z)
        with torch.no_grad():
            if module.has_gate:
                weight = module.gate_up_proj[expert]
                y = z @ (weight if module.is_transposed else weight.T)
                inner = module._apply_gate(y + module.gate_up_proj_bias[expert] if module.has_bias else y)
            else:
                inner = module.act_fn(z @ module.up_proj[expert].T)
        found[f"{expert}.down_proj"] = gains(matrices["down_proj"][expert], inner)
    return found


def oracle(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    scores: Scores,
    *,
    packed: Mapping[str, Callable[[int], Columns]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    run: Callable[[nn.Module, Mapping[str, Tensor]], Any] | None = None,
) -> dict[str, float]:
    """NFN of every scored entry.

    Args:
        model: Run once on `batch`.
        batch: Its inputs; `attention_mask` says which tokens count, where a layer's rows are the mask's tokens.
        scores: Names the entries.
        packed: Columns of the parts of packed weights, by leaf name.
        weights: [M, K] by module name, where they cannot be written out here (quantized).
        run: How to run the model.
    """
    modules = dict(model.named_modules())
    owners = {module.name: owner_of(module, modules) for module in scores.modules}
    calls: dict[str, list[tuple[Any, ...]]] = {owner: [] for owner in owners.values()}
    handles = [
        modules[owner].register_forward_hook(
            lambda module, args, kwargs, output, calls=calls[owner]: calls.append((*args, *kwargs.values())),
            with_kwargs=True,
        )
        for owner in calls
    ]
    try:
        with torch.no_grad():
            run(model, batch) if run else model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    mask = batch.get("attention_mask")

    def counted(rows: int) -> Tensor:
        if mask is None or mask.numel() != rows:
            return torch.ones(rows, dtype=torch.bool)
        return mask.reshape(-1).bool()

    result = {}
    for entry in scores.modules:
        owner = owners[entry.name]
        module, suffix = modules[owner], entry.name[len(owner) :].removeprefix(".")
        if hasattr(module, "num_experts") and suffix:
            found = [expert_gains(module, call[0], call[1], counted(len(call[0]))) for call in calls[owner]]
            expert, projection = suffix.split(".")
            weight = expert_matrices(module)[projection][int(expert)]
            result[entry.name] = nfn_of(weight, torch.cat([values[suffix] for values in found]))
            continue
        weight = weights[owner].double() if weights else dense_weight(module)
        if suffix:
            assert packed is not None
            weight = weight[packed[owner.rsplit(".", 1)[-1]](weight.shape[0])[suffix]]
        values = []
        for call in calls[owner]:
            z = patches(module, call[0]) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else call[0]
            keep = counted(z.shape[:-1].numel())
            values.append(gains(weight, z)[keep])
        result[entry.name] = nfn_of(weight, torch.cat(values))
    return result


def owner_of(entry: ScoredModule, modules: Mapping[str, nn.Module]) -> str:
    """The longest prefix of the entry's name that is a module with parameters of its own."""
    name = entry.name
    while name not in modules:
        name = name.rpartition(".")[0]
    return name
