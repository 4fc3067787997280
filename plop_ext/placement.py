"""A placement: which modules get LoRA. Selection is a pure function of scores; PEFT is touched only at the end."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plop_ext.errors import InputError
from plop_ext.files import write_text_atomic
from plop_ext.scores import Scores, read_json

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

STRATEGIES = ("lowest", "inverse", "attention", "mlp", "all", "random")
DEFAULT_TYPES = 3
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
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged placement; write it again with `plop place`") from error


def select(
    scores: Scores,
    *,
    types: int | Sequence[str] | None = None,
    modules: int | float | None = None,
    max_nfn: float | None = None,
    strategy: str = "lowest",
    seed: int = 0,
) -> Placement:
    """Choose modules from scores; see `Scores.place`."""
    if strategy not in STRATEGIES:
        raise InputError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    given = [
        name for name, value in (("types", types), ("modules", modules), ("max_nfn", max_nfn)) if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"`{given[0]}` and `{given[1]}` exclude each other; give one")
    if strategy in ("attention", "mlp", "all"):
        if given:
            raise InputError(f'`{given[0]}` has no meaning with strategy="{strategy}"; leave one of the two out')
        return _by_family(scores, strategy)
    if modules is not None or max_nfn is not None:
        return _by_module(scores, modules, max_nfn, strategy, seed)
    return _by_type(scores, DEFAULT_TYPES if types is None else types, strategy, seed)


def _by_type(scores: Scores, types: int | Sequence[str], strategy: str, seed: int) -> Placement:
    ranked = list(scores.types)
    if not ranked:
        raise InputError("`scores` has no module type the published script knows; score without compat")
    if isinstance(types, str):
        types = [types]
    if isinstance(types, Sequence):
        if not types:
            raise InputError(f"`types` is empty; name some of {', '.join(sorted(ranked))}")
        unknown = sorted(set(types) - set(ranked))
        if unknown:
            raise InputError(f"`types`: there is no type `{unknown[0]}`; there are {', '.join(sorted(ranked))}")
        if strategy != "lowest":
            raise InputError(f'`types` names its types; strategy="{strategy}" has nothing to choose, leave it out')
        return _placement(scores, [label for label in ranked if label in set(types)], "types", "+".join(types))
    if isinstance(types, bool) or not 1 <= types <= len(ranked):
        raise InputError(f"`types` must be between 1 and {len(ranked)}, the number of module types, got {types}")
    if strategy == "inverse":
        ranked.reverse()
    elif strategy == "random":
        random.Random(seed).shuffle(ranked)
    return _placement(scores, ranked[:types], strategy, _label(strategy, types, seed))


def _by_module(
    scores: Scores, modules: int | float | None, max_nfn: float | None, strategy: str, seed: int
) -> Placement:
    nfn = scores.nfn
    total = len(nfn)
    order = np.argsort(nfn, kind="stable")
    if strategy == "inverse":
        order = order[::-1]
    elif strategy == "random":
        order = np.array(random.Random(seed).sample(range(total), total))
    if max_nfn is not None:
        if strategy != "lowest":
            raise InputError(f'`max_nfn` is a threshold; strategy="{strategy}" has nothing to choose, leave it out')
        chosen = [int(i) for i in order if nfn[i] <= max_nfn]
        if not chosen:
            raise InputError(f"`max_nfn`={max_nfn} selects nothing; the lowest module has NFN {nfn.min():.4g}")
        return _placement_of_modules(scores, chosen, "modules", f"nfn<={max_nfn:g}")
    assert modules is not None
    if isinstance(modules, float):
        if not 0 < modules <= 1:
            raise InputError(f"`modules` as a fraction must be in (0, 1], got {modules}")
        count, label = max(1, round(modules * total)), f"{modules:.0%} of modules"
    else:
        count, label = modules, f"{modules} modules"
    if isinstance(modules, bool) or not 1 <= count <= total:
        raise InputError(f"`modules` must be between 1 and {total}, the number of scored modules, got {modules}")
    prefix = "" if strategy == "lowest" else f"{strategy} "
    return _placement_of_modules(scores, [int(i) for i in order[:count]], strategy, prefix + label)


def _by_family(scores: Scores, strategy: str) -> Placement:
    labels = [score.type for score in scores.by_type() if strategy in ("all", score.family)]
    if not labels:
        raise InputError(
            f'strategy="{strategy}" selects nothing: no module type is recognised as {strategy}; '
            f"name the types ({', '.join(sorted(scores.types))})"
        )
    return _placement(scores, labels, strategy, "all-linear" if strategy == "all" else strategy)


def _placement(scores: Scores, labels: Sequence[str], strategy: str, label: str) -> Placement:
    def wanted(name: str, module_type: str) -> bool:
        return any(group in name for group in labels) if scores.paper_script else module_type in labels

    chosen = [i for i, module in enumerate(scores.modules) if wanted(module.name, module.type)]
    return _make(scores, chosen, tuple(labels), strategy, label)


def _placement_of_modules(scores: Scores, chosen: list[int], strategy: str, label: str) -> Placement:
    held = {scores.modules[i].type for i in chosen}
    return _make(scores, chosen, tuple(t for t in scores.types if t in held), strategy, label)


def _make(scores: Scores, chosen: list[int], types: tuple[str, ...], strategy: str, label: str) -> Placement:
    modules = [scores.modules[i] for i in sorted(chosen)]
    return Placement(
        modules=tuple(module.name for module in modules),
        types=types,
        strategy=strategy,
        label=label,
        shapes={module.name: (module.in_features, module.out_features) for module in modules},
        model=str(scores.provenance["model"]["class"]),
    )


def _label(strategy: str, count: int, seed: int) -> str:
    return f"random-{count} (seed {seed})" if strategy == "random" else f"{strategy}-{count}"
