"""The modules that get LoRA, as PEFT takes them. PEFT is imported only when it is asked for."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_text_atomic

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn

    from plop_ext.placement.cost import Cost

FORMAT = "plop_ext.placement"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Placement:
    """The modules that get LoRA, with all it takes to configure and check them.

    Attributes:
        modules: Full module names, in the model's order.
        types: Labels of the types they belong to, lowest NFN first.
        strategy: How they were chosen.
        label: Short name for tables, for instance `lowest-3`.
        shapes: Name to (in_features, out_features) of the chosen modules.
        model: Class of the model that was scored.
        r: LoRA rank, where no other is asked for.
        ranks: Name to rank of every module, where they differ; empty for one rank.
        reason: Why so many types, where that was not asked for by number.
    """

    modules: tuple[str, ...]
    types: tuple[str, ...]
    strategy: str
    label: str
    shapes: dict[str, tuple[int, int]]
    model: str
    r: int = 16
    ranks: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    def rank_of(self, name: str, r: int | None = None) -> int:
        """Rank of a module: `r`, or the placement's own."""
        return self.ranks.get(name, self.r) if r is None else r

    def num_parameters(self, r: int | None = None) -> int:
        """Trainable LoRA parameters: r * (in_features + out_features), summed over the modules.

        Args:
            r: One rank for all; default the placement's own.
        """
        return sum(self.rank_of(name, r) * sum(shape) for name, shape in self.shapes.items())

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
        per value. The activations of the model itself, a dropout's masks and workspaces are not part of it.

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
        from plop_ext.placement.cost import cost

        return cost(self, model, batch, seq, r=r, adapter_dtype=adapter_dtype)

    def rank_for(self, max_params: int) -> int:
        """The largest rank, the same for all modules, whose parameters fit into `max_params`.

        Raises:
            InputError: If even rank 1 does not fit.
        """
        rank = max_params // self.num_parameters(1)
        if rank < 1:
            raise InputError(
                f"`max_params`={max_params} is too small for `{self.label}`: rank 1 has {self.num_parameters(1)} "
                "parameters; allow more or place fewer modules"
            )
        return rank

    def targets(self) -> dict[str, Any]:
        """Keyword arguments for `LoraConfig(**targets)`, as PEFT's own placement helpers return them.

        Full names: PEFT matches a list entry as a suffix at a dot, so a short one could select other modules too.
        """
        return {"target_modules": list(self.modules)}

    def lora_config(self, r: int | None = None, lora_alpha: int | None = None, **kwargs: Any) -> LoraConfig:
        """A `peft.LoraConfig` that selects exactly these modules.

        Args:
            r: Rank, default the placement's own: 16, or what a budget left room for. Raise it for harder tasks.
            lora_alpha: Scale; the adapter's output is multiplied by lora_alpha / r. Default 2 * r. Where ranks differ,
                lora_alpha / r is the same for all.
            **kwargs: Any other field of `LoraConfig`, for instance `task_type="CAUSAL_LM"`.

        Raises:
            InputError: If `kwargs` names `target_modules`, which is what a placement is for, or `r` is given where
                every module has its own rank.
            SetupError: If PEFT is not installed.
        """
        if "target_modules" in kwargs:
            raise InputError("`target_modules` comes from the placement; leave it out")
        if r is not None and self.ranks:
            raise InputError("`r`: every module of this placement has its own rank; leave `r` out")
        try:
            from peft import LoraConfig
        except ImportError as error:
            from plop_ext.errors import SetupError

            raise SetupError("`lora_config` needs PEFT: pip install peft") from error
        r = self.r if r is None else r
        alpha = 2 * r if lora_alpha is None else lora_alpha
        if self.ranks:
            from plop_ext.placement.ranks import alpha_pattern, rank_pattern

            pattern = rank_pattern(self.ranks, r)
            kwargs.setdefault("rank_pattern", pattern)
            kwargs.setdefault("alpha_pattern", alpha_pattern(pattern, alpha / r))
        return LoraConfig(r=r, lora_alpha=alpha, **self.targets(), **kwargs)

    def verify(self, peft_model: nn.Module) -> None:
        """Check that exactly the chosen modules carry LoRA.

        Args:
            peft_model: What `peft.get_peft_model` returned.

        Raises:
            InputError: If a chosen module has no adapter, or another one has.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        prefix = "base_model.model."
        adapted = {
            name.removeprefix(prefix)
            for name, module in peft_model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        missing, extra = set(self.modules) - adapted, adapted - set(self.modules)
        if missing or extra:
            example = sorted(missing or extra)[0]
            raise InputError(
                f"`peft_model` does not match the placement: {len(missing)} chosen modules without LoRA and "
                f"{len(extra)} others with it (`{example}`); wrap the model that was scored with `lora_config()`"
            )

    def check_model(self, model: nn.Module) -> None:
        """Check that `model` has the chosen modules, at the shapes that were scored.

        Raises:
            InputError: If it lacks one or has another shape: the placement belongs to another model.
        """
        modules = dict(model.named_modules())
        for name, (in_features, out_features) in self.shapes.items():
            module = modules.get(name)
            found = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if module is None or found != (in_features, out_features):
                state = "has no such module" if module is None else f"has {found[0]} x {found[1]} there"
                raise InputError(
                    f"the placement was made for another model: it wants `{name}` ({in_features} x {out_features}), "
                    f"but {type(model).__name__} {state}; score this model and place again"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, whole or not at all."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **vars(self)}
        write_text_atomic(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing, is no placement, or has another version.
        """
        content = read_json(path, FORMAT, FORMAT_VERSION, "`plop place`")
        try:
            return cls(
                modules=tuple(content["modules"]),
                types=tuple(content["types"]),
                strategy=content["strategy"],
                label=content["label"],
                shapes={name: (int(shape[0]), int(shape[1])) for name, shape in content["shapes"].items()},
                model=content["model"],
                r=int(content["r"]),
                ranks={name: int(rank) for name, rank in content["ranks"].items()},
                reason=content["reason"],
            )
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged placement; write it again with `plop place`") from error
