"""The data of a placement: the choice, the targets that LoRA adapts, and their ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from plop_ext import quantities
from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.evidence import Evidence
from plop_ext.placement.fingerprint import Fingerprint
from plop_ext.placement.ranks import DEFAULT_RANK, check_rank


@dataclass(frozen=True, repr=False)
class PlacementData:
    """The modules that get LoRA, with the data to configure and check them.

    The chosen modules and the modules that PEFT adapts can differ: PEFT supports modules and parameters, not the parts
    of a packed weight or single experts, and PEFT refuses a few modules. `notes` lists the differences.
    `plop_ext.Placement` adds the export to PEFT, saving and loading.

    Attributes:
        modules: Full names of the chosen modules and parts, in the model's order.
        types: Labels of the types of the chosen modules, lowest NFN first.
        strategy: Strategy of the choice, as for `Scores.place`.
        label: Short name for tables, for instance `lowest-3`.
        model: Class of the model that was scored.
        lora_targets: The modules and parameters that PEFT adapts, each once.
        fingerprints: Fingerprint of the weight of each target, by the target's name; without weights that are unknown.
        notes: One line per difference between the targets and the choice, and per reason why the strategy passed over
            what it would have chosen: types that are no place for LoRA, experts without a score.
        r: Default LoRA rank.
        ranks: Rank of each target, by name, if the ranks differ; empty if all targets have the rank `r`.
        reason: Reason for the number of types, if you did not give the number.
        evidence: The scores that it was chosen from; None for a placement made without scores.
        left_out: The other scored modules and parameters of the model, which get no LoRA. Exports check against them
            that a training stack adapts nothing else.
        unscored: Names of the model's modules that have a weight and no score.
    """

    modules: tuple[str, ...]
    types: tuple[str, ...]
    strategy: str
    label: str
    model: str
    lora_targets: tuple[LoraTarget, ...]
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    r: int = DEFAULT_RANK
    ranks: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    evidence: Evidence | None = None
    left_out: tuple[LoraTarget, ...] = ()
    unscored: tuple[str, ...] = ()

    def __hash__(self) -> int:
        """Hash what does not depend on the weights; equal placements have equal hashes."""
        return hash((self.modules, self.label, self.lora_targets, self.r, tuple(sorted(self.ranks.items()))))

    def __repr__(self) -> str:
        types = ", ".join(self.types[:6]) + (f" and {len(self.types) - 6} more" if len(self.types) > 6 else "")
        ranks = f"r={self.r}"
        if self.ranks:
            ranks = f"r={min(self.ranks.values())} to {max(self.ranks.values())}"
        return f"<{type(self).__name__} {self.label} of {self.model}: {types}; {len(self.modules)} modules, {ranks}>"

    def ranks_at(self, r: int | None = None) -> dict[str, int]:
        """Return the rank of each target, by name: `r` for all targets, or by default the ranks of the placement.

        Raises:
            InputError: If `r` is below 1, or above the rank that an update of any target can have.
        """
        check_rank(r, self.lora_targets)
        return {target.name: self.ranks.get(target.name, self.r) if r is None else r for target in self.lora_targets}

    def num_parameters(self, r: int | None = None) -> int:
        """Count trainable LoRA parameters as PEFT does: r * (in + out) for a matrix, and for each expert.

        Args:
            r: Rank of all targets; default the ranks of the placement.

        Raises:
            InputError: If `r` is below 1.
        """
        ranks = self.ranks_at(r)
        return sum(ranks[target.name] * target.size for target in self.lora_targets)

    def rank_for(self, max_params: int | float | str) -> int:
        """Find the largest rank, the same for all modules, whose parameters fit into `max_params`.

        Raises:
            InputError: If even rank 1 does not fit.
        """
        self.check_not_empty()
        max_params = quantities.count(max_params, "max_params")
        rank = max_params // self.num_parameters(1)
        if rank < 1:
            raise InputError(
                f"`max_params`={max_params} is too small for `{self.label}`: rank 1 has {self.num_parameters(1)} "
                "parameters; raise `max_params`, or place fewer modules"
            )
        return rank

    def check_not_empty(self) -> None:
        """Check that PEFT can adapt at least one module.

        Raises:
            InputError: If PEFT can adapt none of the chosen modules.
        """
        if not self.lora_targets:
            raise InputError(f"PEFT can adapt nothing of `{self.label}`: {'; '.join(self.notes)}; place other modules")
