"""`Placement`: where LoRA goes, and all that can be done with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plop_ext.placement import file
from plop_ext.placement.cost import Cost, cost
from plop_ext.placement.data import PlacementData
from plop_ext.placement.exports import export, peft

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn


@dataclass(frozen=True)
class Placement(PlacementData):
    """The modules that get LoRA: configure PEFT with them, predict the cost, check a model, save.

    The fields are those of `plop_ext.placement.data.PlacementData`.
    """

    def cost(
        self,
        model: nn.Module | torch.dtype | str,
        batch: int,
        seq: int,
        *,
        r: int | None = None,
        adapter_dtype: str = "float32",
    ) -> Cost:
        r"""Predict the memory that training adds to the memory of the model itself.

        With n trainable parameters of a bytes each: n a for the adapters, n a for gradients, 2 n a for Adam. Each
        adapter keeps its input and r values per token for the backward:
        \(\sum_m B T a r_m + \sum_x B T w K_x\). Where the adapters' type is not the model's, PEFT casts, and x runs
        over all modules with w = a; otherwise over distinct tensors (q, k and v share one) with w the model's bytes
        per value. A parameter of stacked experts is kept once more, with its update added, whatever the tokens. The
        activations of the model itself, a dropout's masks and workspaces are not part of it.

        Args:
            model: The model, or the type of its weights.
            batch: B, samples in a step.
            seq: T, tokens in a sample.
            r: One rank for all; default the placement's own.
            adapter_dtype: Of the adapters. PEFT makes them float32 on a half-precision model unless told
                `autocast_adapter_dtype=False`.

        Raises:
            InputError: If a size is below 1 or a type is unknown.
        """
        return cost(self.lora_targets, self.ranks_at(r), model, batch, seq, adapter_dtype=adapter_dtype)

    def targets(self) -> dict[str, Any]:
        """Return keyword arguments for `LoraConfig(**targets)`, as PEFT's own placement helpers return them.

        Full names: PEFT matches a list entry as a suffix at a dot, so a short one could select other modules too. Of
        a model with stacked experts, experts and dense MLPs are `target_parameters`, because PEFT turns such entries
        of `target_modules` into all experts of all layers; `target_modules` is then a list even if it is empty,
        because PEFT adds its defaults otherwise.

        Raises:
            InputError: If PEFT can adapt nothing of what was chosen.
        """
        return peft.targets(self)

    def lora_config(self, r: int | None = None, lora_alpha: int | None = None, **kwargs: Any) -> LoraConfig:
        """Make a `peft.LoraConfig` that selects exactly these modules.

        Args:
            r: Rank, default the placement's own: 16, or what a budget left room for. Raise it for harder tasks.
            lora_alpha: Scale; the adapter's output is multiplied by lora_alpha / r. Default 2 * r. Where ranks differ,
                lora_alpha / r is the same for all.
            **kwargs: Any other field of `LoraConfig`, for instance `task_type="CAUSAL_LM"`.

        Warns where PEFT cannot do exactly what was chosen (`notes`).

        Raises:
            InputError: If `kwargs` names `target_modules` or `target_parameters`, which is what a placement is for, or
                asks for what PEFT cannot do on `target_parameters`, or `r` is given where ranks differ.
            SetupError: If PEFT is not installed.
        """
        return peft.export(self, r, lora_alpha, **kwargs)

    def export(self, stack: str, **options: Any) -> Any:
        """Return the placement in the form that a training stack takes.

        Args:
            stack: Name of a stack, one of `plop_ext.placement.exports.stacks()`; `"peft"` gives `lora_config`.
            **options: What that stack's export takes.

        Raises:
            InputError: If there is no such stack, or it cannot take this placement.
        """
        return export(self, stack, **options)

    def verify(self, peft_model: nn.Module) -> None:
        """Check that exactly the placement's modules and parameters carry LoRA.

        Args:
            peft_model: What `peft.get_peft_model` or `PeftModel.from_pretrained` returned.

        Raises:
            InputError: If one of them has no adapter, or another one has.
        """
        peft.verify(self, peft_model)

    def check_model(self, model: nn.Module) -> None:
        """Check that `model` has what the placement adapts, at the shapes and with the weights that were scored.

        A few weights are read, and told by their norms. Rounding and quantization change these little enough to pass.

        Raises:
            InputError: If it lacks one, or has another shape or weight: the placement belongs to another model.
        """
        # Reading layers loads the kernels, which choosing from scores does without.
        from plop_ext.placement.same_model import check_same_model

        check_same_model(model, self.lora_targets, self.fingerprints)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, whole or not at all."""
        file.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing, is no placement, or has another version.
        """
        return file.read(cls, path)
