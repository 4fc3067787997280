"""The modules that get LoRA, as PEFT takes them. PEFT is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plop_ext._warnings import warn
from plop_ext.errors import InputError
from plop_ext.files import read_json, write_text_atomic
from plop_ext.placement.fingerprint import check_weights
from plop_ext.placement.targets import Target, adapted_names, check_targets

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

    What was chosen and what PEFT adapts can differ: PEFT knows modules and parameters, not the parts of a packed
    weight or single experts, and it refuses a few modules. `notes` says where.

    Attributes:
        modules: Full names of the chosen modules and parts, in the model's order.
        types: Labels of the types they belong to, lowest NFN first.
        strategy: How they were chosen.
        label: Short name for tables, for instance `lowest-3`.
        shapes: Name to (in_features, out_features) of the chosen modules.
        model: Class of the model that was scored.
        emitted: What PEFT adapts; None: exactly `modules`.
        notes: One line for each way in which that differs from what was chosen.
        r: LoRA rank, where no other is asked for.
        ranks: Name of each target of PEFT to its rank, where they differ; empty for one rank.
        reason: Why so many types, where that was not asked for by number.
    """

    modules: tuple[str, ...]
    types: tuple[str, ...]
    strategy: str
    label: str
    shapes: dict[str, tuple[int, int]]
    model: str
    emitted: tuple[Target, ...] | None = None
    notes: tuple[str, ...] = ()
    r: int = 16
    ranks: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def lora_targets(self) -> tuple[Target, ...]:
        """The modules and parameters that PEFT adapts."""
        if self.emitted is not None:
            return self.emitted
        return tuple(Target(name, False, sum(shape), shape) for name, shape in self.shapes.items())

    def rank_of(self, name: str, r: int | None = None) -> int:
        """Rank of a target of PEFT: `r`, or the placement's own."""
        return self.ranks.get(name, self.r) if r is None else r

    def num_parameters(self, r: int | None = None) -> int:
        """Trainable LoRA parameters as PEFT counts them: r * (in + out) for a matrix, and for each expert.

        Args:
            r: One rank for all; default the placement's own.

        Raises:
            InputError: If `r` is below 1.
        """
        if r is not None and r < 1:
            raise InputError(f"`r` must be at least 1, got {r}")
        return sum(self.rank_of(target.name, r) * target.size for target in self.lora_targets)

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
        from plop_ext.placement.cost import cost

        return cost(self, model, batch, seq, r=r, adapter_dtype=adapter_dtype)

    def rank_for(self, max_params: int) -> int:
        """The largest rank, the same for all modules, whose parameters fit into `max_params`.

        Raises:
            InputError: If even rank 1 does not fit.
        """
        self._check_not_empty()
        rank = max_params // self.num_parameters(1)
        if rank < 1:
            raise InputError(
                f"`max_params`={max_params} is too small for `{self.label}`: rank 1 has {self.num_parameters(1)} "
                "parameters; allow more or place fewer modules"
            )
        return rank

    def targets(self) -> dict[str, Any]:
        """Keyword arguments for `LoraConfig(**targets)`, as PEFT's own placement helpers return them.

        Full names: PEFT matches a list entry as a suffix at a dot, so a short one could select other modules too. Of
        a model with stacked experts, experts and dense MLPs are `target_parameters`, because PEFT turns such entries
        of `target_modules` into all experts of all layers; `target_modules` is then a list even if it is empty,
        because PEFT adds its defaults otherwise.

        Raises:
            InputError: If PEFT can adapt nothing of what was chosen.
        """
        self._check_not_empty()
        parameters = [target.name for target in self.lora_targets if target.parameter]
        modules = [target.name for target in self.lora_targets if not target.parameter]
        return {"target_modules": modules, **({"target_parameters": parameters} if parameters else {})}

    def lora_config(self, r: int | None = None, lora_alpha: int | None = None, **kwargs: Any) -> LoraConfig:
        """A `peft.LoraConfig` that selects exactly these modules.

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
        for name in ("target_modules", "target_parameters"):
            if name in kwargs:
                raise InputError(f"`{name}` comes from the placement; leave it out")
        if r is not None and self.ranks:
            raise InputError("`r`: every module of this placement has its own rank; leave `r` out")
        targets = self.targets()
        for name in ("lora_dropout", "use_dora", "lora_bias"):
            if "target_parameters" in targets and kwargs.get(name):
                raise InputError(
                    f"`{name}`={kwargs[name]!r}: PEFT cannot do that on parameters, which this placement has "
                    f"(`{targets['target_parameters'][0]}`); leave it out"
                )
        for note in self.notes:
            warn(note)
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
        return LoraConfig(r=r, lora_alpha=alpha, **targets, **kwargs)

    def verify(self, peft_model: nn.Module) -> None:
        """Check that exactly the placement's modules and parameters carry LoRA.

        Args:
            peft_model: What `peft.get_peft_model` or `PeftModel.from_pretrained` returned.

        Raises:
            InputError: If one of them has no adapter, or another one has.
        """
        adapted, wanted = adapted_names(peft_model), {target.name for target in self.lora_targets}
        missing, extra = wanted - adapted, adapted - wanted
        if missing or extra:
            example = sorted(missing or extra)[0]
            raise InputError(
                f"`peft_model` does not match the placement: {len(missing)} chosen modules without LoRA and "
                f"{len(extra)} others with it (`{example}`); wrap the model that was scored with `lora_config()`"
            )

    def check_model(self, model: nn.Module) -> None:
        """Check that `model` has what the placement adapts, at the shapes and with the weights that were scored.

        A few weights are read, and told by their norms. Rounding and quantization change these little enough to pass.

        Raises:
            InputError: If it lacks one, or has another shape or weight: the placement belongs to another model.
        """
        check_targets(model, self.lora_targets)
        check_weights(model, self.lora_targets)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, whole or not at all."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_text_atomic(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing, is no placement, or has another version.
        """
        content = read_json(path, FORMAT, FORMAT_VERSION, "`plop place`")
        try:
            emitted = content.get("emitted")
            return cls(
                modules=tuple(content["modules"]),
                types=tuple(content["types"]),
                strategy=content["strategy"],
                label=content["label"],
                shapes={name: (int(shape[0]), int(shape[1])) for name, shape in content["shapes"].items()},
                model=content["model"],
                emitted=None if emitted is None else tuple(_target(item) for item in emitted),
                notes=tuple(content.get("notes", ())),
                r=int(content["r"]),
                ranks={name: int(rank) for name, rank in content["ranks"].items()},
                reason=content["reason"],
            )
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged placement; write it again with `plop place`") from error

    def _check_not_empty(self) -> None:
        if not self.lora_targets:
            raise InputError(f"PEFT can adapt nothing of `{self.label}`: {'; '.join(self.notes)}; place other modules")


def _target(item: dict[str, Any]) -> Target:
    target = Target(**{**item, "shape": tuple(item["shape"])})
    if target.weight_norm is not None and not math.isfinite(target.weight_norm):
        raise ValueError
    return target
