"""The modules that get LoRA, as PEFT takes them. PEFT is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_text_atomic
from plop_ext.placement.targets import Target, adapted_names, check_targets

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

FORMAT = "plop_ext.placement"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Placement:
    """The modules that get LoRA, with all it takes to configure and check them.

    What was chosen and what PEFT adapts can differ: PEFT knows modules and parameters, not the parts of a fused weight
    or single experts, and it refuses a few modules. `notes` says where.

    Attributes:
        modules: Full names of the chosen modules and parts, in the model's order.
        types: Labels of the types they belong to, lowest NFN first.
        strategy: How they were chosen.
        label: Short name for tables, for instance `lowest-3`.
        shapes: Name to (in_features, out_features) of the chosen modules.
        model: Class of the model that was scored.
        emitted: What PEFT adapts; None: exactly `modules`.
        notes: One line for each way in which that differs from what was chosen.
    """

    modules: tuple[str, ...]
    types: tuple[str, ...]
    strategy: str
    label: str
    shapes: dict[str, tuple[int, int]]
    model: str
    emitted: tuple[Target, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def lora_targets(self) -> tuple[Target, ...]:
        """The modules and parameters that PEFT adapts."""
        if self.emitted is not None:
            return self.emitted
        return tuple(Target(name, False, sum(shape), shape) for name, shape in self.shapes.items())

    def num_parameters(self, r: int) -> int:
        """Trainable LoRA parameters at rank `r`, as PEFT counts them: r * (in + out) for a matrix, for each expert."""
        return r * sum(target.size for target in self.lora_targets)

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
        a model with fused experts, experts and dense MLPs are `target_parameters`, because PEFT turns such entries of
        `target_modules` into all experts of all layers; `target_modules` is then a list even if it is empty, because
        PEFT adds its defaults otherwise.

        Raises:
            InputError: If PEFT can adapt nothing of what was chosen.
        """
        self._check_not_empty()
        parameters = [target.name for target in self.lora_targets if target.parameter]
        modules = [target.name for target in self.lora_targets if not target.parameter]
        return {"target_modules": modules, **({"target_parameters": parameters} if parameters else {})}

    def lora_config(self, r: int = 16, lora_alpha: int = 32, **kwargs: Any) -> LoraConfig:
        """A `peft.LoraConfig` that selects exactly these modules.

        Args:
            r: Rank. Raise it for harder tasks.
            lora_alpha: Scale; the adapter's output is multiplied by lora_alpha / r.
            **kwargs: Any other field of `LoraConfig`, for instance `task_type="CAUSAL_LM"`.

        Warns where PEFT cannot do exactly what was chosen (`notes`).

        Raises:
            InputError: If `kwargs` names `target_modules` or `target_parameters`, which is what a placement is for, or
                asks for what PEFT cannot do on `target_parameters`.
            SetupError: If PEFT is not installed.
        """
        for name in ("target_modules", "target_parameters"):
            if name in kwargs:
                raise InputError(f"`{name}` comes from the placement; leave it out")
        targets = self.targets()
        for name in ("lora_dropout", "use_dora", "lora_bias"):
            if "target_parameters" in targets and kwargs.get(name):
                raise InputError(
                    f"`{name}`={kwargs[name]!r}: PEFT cannot do that on parameters, which this placement has "
                    f"(`{targets['target_parameters'][0]}`); leave it out"
                )
        for note in self.notes:
            warnings.warn(note, stacklevel=2)
        try:
            from peft import LoraConfig
        except ImportError as error:
            from plop_ext.errors import SetupError

            raise SetupError("`lora_config` needs PEFT: pip install peft") from error
        return LoraConfig(r=r, lora_alpha=lora_alpha, **targets, **kwargs)

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
        """Check that `model` has what the placement adapts, at the shapes that were scored.

        Raises:
            InputError: If it lacks one or has another shape: the placement belongs to another model.
        """
        check_targets(model, self.lora_targets)

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
            )
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged placement; write it again with `plop place`") from error

    def _check_not_empty(self) -> None:
        if not self.lora_targets:
            raise InputError(f"PEFT can adapt nothing of `{self.label}`: {'; '.join(self.notes)}; place other modules")


def _target(item: dict[str, Any]) -> Target:
    return Target(**{**item, "shape": tuple(item["shape"])})
