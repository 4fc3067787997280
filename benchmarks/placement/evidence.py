"""Result files as the analysis needs them: the loss of every placement at its chosen rate, and features by module."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.placement.models import TYPES, type_means, type_of
from benchmarks.placement.rules import Values
from benchmarks.placement.search import at_edge, chosen_rate, wanted

ALL = "+".join(TYPES)


@dataclass(frozen=True)
class Cell:
    """A placement at its chosen learning rate.

    Attributes:
        losses: Test loss of each seed.
        exact: Share of exact answers of each seed.
        rate: Chosen on the validation loss.
        edge: Whether it is the smallest or largest rate tried.
        parameters: Trainable ones.
        capped: Whether a rank would have exceeded the width of its module.
    """

    losses: tuple[float, ...]
    exact: tuple[float, ...]
    rate: float
    edge: bool
    parameters: int
    capped: bool

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return sum(self.losses) / len(self.losses)


class Evidence:
    """What one result file says of one model."""

    def __init__(self, path: Path) -> None:
        self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.model: str = self.content["model"]
        self.seeds: int = self.content["settings"]["seeds"]
        self.search_seeds: int = self.content["settings"]["search_seeds"]
        self.held_out: bool = self.content["pretraining"]["shape"]["held_out"]
        self.tables = self._tables()

    def _tables(self) -> dict[tuple[str, str], dict[str, Cell]]:
        """(task, protocol) -> placement -> cell, of the rows that are complete."""
        rows = defaultdict[tuple[str, str, str], dict[tuple[float, int], dict[str, Any]]](dict)
        for values in self.content["runs"]:
            run = dict(zip(self.content["columns"], values, strict=True))
            rows[run["task"], run["protocol"], run["placement"]][run["rate"], run["seed"]] = run
        found = defaultdict[tuple[str, str], dict[str, Cell]](dict)
        for (task, protocol, placement), runs in rows.items():
            cell = self._cell(placement, runs)
            if cell is not None:
                found[task, protocol][placement] = cell
        for (task, protocol), table in found.items():
            matched = found.get((task, "matched"), {})
            if protocol == "one-rank" and ALL in matched:  # the same run: its budget is that of one rank
                table[ALL] = matched[ALL]
        return dict(found)

    def _rates(self, placement: str) -> list[float]:
        """The rates that the search of a row begins with."""
        name = "full_rates" if placement == "full" else "rates"
        return [float(rate) for rate in self.content["settings"][name]]

    def _cell(self, placement: str, runs: dict[tuple[float, int], dict[str, Any]]) -> Cell | None:
        validation = {key: run["validation_loss"] for key, run in runs.items()}
        if wanted(self._rates(placement), self.search_seeds, self.seeds, validation):
            return None
        rate = chosen_rate(validation, self.search_seeds)
        chosen = [runs[rate, seed] for seed in range(self.seeds)]
        if any(run["test_loss"] is None for run in chosen):
            return None
        return Cell(
            tuple(run["test_loss"] for run in chosen),
            tuple(run["test_exact"] for run in chosen),
            rate,
            at_edge(validation, self.search_seeds),
            chosen[0]["parameters"],
            chosen[0]["capped"],
        )

    def features(self, task: str) -> Values | None:
        """Feature -> module -> value at the end of pretraining, with those of the weights and of ordinary text."""
        found: dict[str, dict[str, float]] = {}
        for record in self.content["features"]:
            if record["checkpoint"] != 1.0 or record["data"] not in ("weights", "text", task):
                continue
            for feature, values in record["values"].items():
                by_module = dict(zip(record["modules"], values, strict=True))
                if record["data"] != "text":
                    found[feature] = by_module
                elif feature == "nfn":
                    found["nfn_text"] = by_module
        if "nfn" not in found or "weights" not in found:
            return None
        found["out_features"] = {module: self._outputs(module) for module in found["nfn"]}
        return found

    def nfn_order(self, task: str) -> list[str]:
        """Types by their mean NFN, lowest first."""
        values = self.features(task)
        if values is None:
            return []
        means = type_means(values["nfn"])
        return sorted(TYPES, key=lambda name: means[name])

    def selected(self, placement: str, cells: dict[str, Cell]) -> str:
        """The key under which a choice of modules was trained: its own, or that of the types it consists of."""
        if placement in cells:
            return placement
        for record in self.content["selections"]:
            if record["placement"] == placement and "modules" in record:
                return "+".join(name for name in TYPES if any(type_of(module) == name for module in record["modules"]))
        return placement

    def _outputs(self, module: str) -> int:
        shape = self.content["pretraining"]["shape"]
        head = shape["hidden"] // shape["heads"]
        outputs = {
            "q_proj": shape["heads"] * head,
            "k_proj": shape["kv_heads"] * head,
            "v_proj": shape["kv_heads"] * head,
            "gate_proj": shape["mlp"],
            "up_proj": shape["mlp"],
        }
        return int(outputs.get(type_of(module), shape["hidden"]))


def load(folder: Path) -> list[Evidence]:
    """The result files of all models in `folder`, in the order of their names."""
    paths: Sequence[Path] = sorted(folder.glob("*.json"))
    return [Evidence(path) for path in paths if path.name != "analysis.json"]
