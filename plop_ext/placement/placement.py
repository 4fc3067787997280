"""The modules that get LoRA, as PEFT takes them. PEFT is imported only when it is asked for."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_text_atomic

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

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
    """

    modules: tuple[str, ...]
    types: tuple[str, ...]
    strategy: str
    label: str
    shapes: dict[str, tuple[int, int]]
    model: str

    def num_parameters(self, r: int) -> int:
        """Trainable LoRA parameters at rank `r`: r * (in_features + out_features), summed over the modules."""
        return r * sum(in_features + out_features for in_features, out_features in self.shapes.values())

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

    def lora_config(self, r: int = 16, lora_alpha: int = 32, **kwargs: Any) -> LoraConfig:
        """A `peft.LoraConfig` that selects exactly these modules.

        Args:
            r: Rank. Raise it for harder tasks.
            lora_alpha: Scale; the adapter's output is multiplied by lora_alpha / r.
            **kwargs: Any other field of `LoraConfig`, for instance `task_type="CAUSAL_LM"`.

        Raises:
            InputError: If `kwargs` names `target_modules`, which is what a placement is for.
            SetupError: If PEFT is not installed.
        """
        if "target_modules" in kwargs:
            raise InputError("`target_modules` comes from the placement; leave it out")
        try:
            from peft import LoraConfig
        except ImportError as error:
            from plop_ext.errors import SetupError

            raise SetupError("`lora_config` needs PEFT: pip install peft") from error
        return LoraConfig(r=r, lora_alpha=lora_alpha, **self.targets(), **kwargs)

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
            )
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged placement; write it again with `plop place`") from error
