"""What PEFT's own selectors choose: KappaTune's modules, and EVA's ranks and initial adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from benchmarks.placement.models import TYPES, linear_modules
from benchmarks.placement.placements import third


def kappatune(model: nn.Module) -> list[str]:
    """The modules with the lowest condition number, as many as three types have."""
    from peft.helpers import KappaTuneSelector

    ours = linear_modules(model)
    order = [name for name in KappaTuneSelector(model, show_progress=False).get_best_targets() if name in ours]
    chosen = set(order[: third(order)])
    return [name for name in ours if name in chosen]


def eva(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], rank: int, scale: float
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """EVA on all modules, at most twice the rank for one: module -> rank, and module -> initial A [K, rank]."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    config = LoraConfig(
        r=rank,
        lora_alpha=int(scale * rank),
        target_modules=list(TYPES),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    adapted = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(adapted, list(batches), show_progress_bar=False)
    prefix = "base_model.model."
    downs = {
        name.removeprefix(prefix): module.lora_A["default"].weight.detach().t().float().contiguous()
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    starts = {name: downs[name] for name in linear_modules(model) if name in downs}
    return {name: start.shape[1] for name, start in starts.items()}, starts
