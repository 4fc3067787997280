"""`Placement`: the modules that get LoRA, with their export to PEFT, cost, checks, saving and loading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plop_ext.placement import file, peft, shown
from plop_ext.placement.cost import Cost, cost
from plop_ext.placement.data import PlacementData
from plop_ext.placement.exports import export
from plop_ext.placement.serving import Servable, servable
from plop_ext.tables import data_frame

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from peft import LoraConfig
    from torch import nn


@dataclass(frozen=True, repr=False)
class Placement(PlacementData):
    """The modules that get LoRA: configures PEFT, predicts the cost, checks a model, saves.

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

        With n trainable parameters of a bytes each, adapters take n a bytes, gradients n a, and Adam 2 n a. For the
        backward, each adapter keeps its input and r values per token: \(B T a (\sum_m r_m + \sum_x K_x)\) bytes. If
        the type of the adapters differs from the type of the model, PEFT casts the input of each module, and x runs
        over all modules. If the types are equal, x runs over distinct tensors: q, k and v share one. A parameter of
        stacked experts is kept once more, with its update added, for any number of tokens. The prediction does not
        include the activations of the model itself, dropout masks and workspaces.

        Args:
            model: The model, or the type of its weights.
            batch: B, samples in a step.
            seq: T, tokens in a sample.
            r: Rank of all targets; default the ranks of the placement.
            adapter_dtype: Type of the adapters. On a half-precision model PEFT makes them float32, unless you pass
                `autocast_adapter_dtype=False`.

        Raises:
            InputError: If a size is below 1 or a type is unknown.
        """
        return cost(self.lora_targets, self.ranks_at(r), model, batch, seq, adapter_dtype=adapter_dtype)

    __hash__ = PlacementData.__hash__

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the types with their modules, ranks and parameters."""
        return shown.html(self)

    def to_pandas(self) -> DataFrame:
        """Return a table with one row per target: name, whether it is a parameter, rank and LoRA parameters.

        Raises:
            SetupError: If pandas is not installed.
        """
        return data_frame(shown.rows(self))

    def targets(self) -> dict[str, Any]:
        """Return keyword arguments for `LoraConfig(**targets)`, as PEFT's own placement helpers return them.

        The names are full names, because PEFT matches a list entry as a suffix at a dot, and a short name could select
        other modules too. In a model with stacked experts, experts and dense MLPs are `target_parameters`, because
        PEFT turns such entries of `target_modules` into all experts of all layers. `target_modules` is then a list
        even if it is empty, because PEFT would add its defaults otherwise. `target_parameters` is None if there are
        none. If ranks differ, `rank_pattern` and `alpha_pattern` have the rank r of every target, and 2 * r.

        Raises:
            InputError: If PEFT can adapt none of the chosen modules.
        """
        return peft.targets(self)

    def lora_config(self, r: int | None = None, lora_alpha: int | None = None, **kwargs: Any) -> LoraConfig:
        """Make a `peft.LoraConfig` that selects exactly these modules.

        Args:
            r: Rank. Default the rank of the placement: 16, or the largest within the budget. Raise the rank for harder
                tasks.
            lora_alpha: Scale; the adapter's output is multiplied by lora_alpha / r. Default 2 * r. If ranks differ,
                lora_alpha / r is the same for all.
            **kwargs: Any other field of `LoraConfig`, for instance `task_type="CAUSAL_LM"`.

        A warning gives each of the `notes`.

        Raises:
            InputError: If `kwargs` names `target_modules` or `target_parameters`, which the placement sets, or a field
                that PEFT does not support on `target_parameters`, or if `r` is given although ranks differ.
            SetupError: If PEFT is not installed.
        """
        return peft.lora_config(self, r, lora_alpha, **kwargs)

    def export(self, stack: str, *, r: int | None = None, lora_alpha: float | None = None, lossy: bool = False) -> str:
        """Return the placement as the configuration of a training stack, with comments at its head.

        The stack adapts exactly the modules of the placement, with its ranks and one alpha / r for all, and without
        dropout. The stacks, and what each of them can say, are in docs/stacks.md.

        Args:
            stack: Name of a stack, one of `plop_ext.placement.exports.stacks()`: `"axolotl"`, `"trl"`, `"verl"`, ...
            r: Rank of all modules; default the ranks of the placement.
            lora_alpha: Alpha of the modules with the common rank; default twice that rank.
            lossy: Write also what the stack cannot say exactly. A warning and a comment name each difference.

        Raises:
            InputError: If there is no such stack, the stack cannot say the placement exactly and `lossy` is false, it
                can say nothing of it, or a number is out of range.
        """
        return export(self, stack, r=r, lora_alpha=lora_alpha, lossy=lossy)

    def servable(self, engine: str) -> Servable[Placement]:
        """Return whether an inference engine can serve adapters of this placement, and the nearest that it can.

        The rules are those of vLLM 0.33.0, SGLang 0.5.23 and llama.cpp, for adapters as PEFT saves them with
        `lora_config`. Merged into the model, an adapter can be served by every engine.

        Args:
            engine: `"vllm"`, `"sglang"` or `"llama.cpp"`.

        Returns:
            True, or false with its `reasons`, and the placement that changes least (`nearest`): both halves of a
            layer's experts, one rank where the engine applies one, no heads.

        Raises:
            InputError: If there is no such engine.
        """
        return servable(self, engine)

    def verify(self, peft_model: nn.Module, adapter_name: str | None = None) -> None:
        """Check that exactly the placement's modules and parameters carry LoRA, and that it survives a reload.

        The values of the adapters pass through PEFT's own saving and loading, in memory. Model and adapters are as
        before afterwards.

        Args:
            peft_model: The result of `peft.get_peft_model` or `PeftModel.from_pretrained`.
            adapter_name: The adapter to check. Default all adapters of the model together.

        Raises:
            InputError: If the model has no such adapter, a module or parameter of the placement has no adapter,
                another one has an adapter, or PEFT loads a value other than it saves it.
        """
        peft.verify(self, peft_model, adapter_name)

    def check_model(self, model: nn.Module) -> None:
        """Check that `model` has the targets of the placement, with the shapes and weights that were scored.

        The check reads the norms of a few weights, with a tolerance for rounding and quantization.

        Raises:
            InputError: If a target is missing, or has another shape or weight, because another model was scored.
        """
        # Imported here because it loads the kernels, which choosing from scores does not need.
        from plop_ext.placement.same_model import check_same_model

        check_same_model(model, self.lora_targets, self.fingerprints)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the placement as JSON to `path` atomically.

        Args:
            path: File to write. A symbolic link is followed; a device or a pipe is written to.
            overwrite: Replace any file. By default only an earlier file of the same kind is replaced.

        Raises:
            InputError: If `path` cannot be written, or is a file of another kind and `overwrite` is false.
        """
        file.write(self, path, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read a file that `save` wrote.

        Raises:
            InputError: If the file is missing, is no placement, or has another version.
        """
        return file.read(cls, path)
