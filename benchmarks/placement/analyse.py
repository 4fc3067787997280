"""What predicts the order of the placements, from the result files alone: results/analysis.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.placement import measures
from benchmarks.placement.evidence import ALL, Cell, Evidence, load
from benchmarks.placement.measures import Array
from benchmarks.placement.models import ATTENTION, MLP, TYPES, type_means
from benchmarks.placement.placements import TRIPLES
from benchmarks.placement.rules import BASELINE, RULES
from benchmarks.placement.stability import REFERENCE, TEXT

KEYS = tuple("+".join(triple) for triple in TRIPLES)
NAMES = tuple(rule.name for rule in RULES)


def main(results: Path) -> None:
    """Write the analysis of all result files in `results`."""
    found = load(results)
    tables = [analyse_table(each, *key) for each in found for key in each.tables if key[1] != "full"]
    complete = [table for table in tables if table["triples"] == len(TRIPLES) and table["rules"]]
    content = {
        "benchmark": "placement analysis",
        "quick": any(each.content["quick"] for each in found),
        "rules_tried": len(RULES),
        "tables": tables,
        "transfer": transfer(found),
        "stability": [row for each in found for row in stability(each)],
        "left_out": leave_one_out(complete),
    }
    path = results / "analysis.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path.name}: {len(tables)} tables, {len(complete)} with every triple")


def analyse_table(evidence: Evidence, task: str, protocol: str) -> dict[str, Any]:
    """One model, task and protocol: where the named placements come, and how each rule does."""
    cells = evidence.tables[task, protocol]
    full = evidence.tables.get((task, "full"), {}).get("full")
    table: dict[str, Any] = {
        "model": evidence.model,
        "held_out": evidence.held_out,
        "task": task,
        "protocol": protocol,
        "triples": sum(key in cells for key in KEYS),
        "full_finetuning": _cell(full) if full else None,
        "placements": {key: _cell(cell) for key, cell in sorted(cells.items(), key=lambda item: item[1].loss)},
        "named": _named(evidence, task, cells),
        "rules": {},
    }
    if table["triples"] == len(TRIPLES):
        losses = np.array([cells[key].losses for key in KEYS])
        table["mean_triple"] = _short(losses.mean())
        table["reliability"] = _short(measures.reliability(losses))
        values = evidence.features(task)
        if values is not None:
            table["rules"] = _rules(np.array([rule.of_types(values) for rule in RULES]), losses, cells)
    return table


def _rules(type_scores: Array, losses: Array, cells: dict[str, Cell]) -> dict[str, Any]:
    """How each rule does on the triples of one table."""
    means = losses.mean(1)
    scores = type_scores @ measures.INCIDENCE.T
    correlations = measures.spearman(scores, -means)
    draws = measures.bootstrap(scores, losses)
    alone, corrected = measures.permutation_p(type_scores, means)
    against = draws - draws[:, [NAMES.index(BASELINE)]]
    place = measures.ranks(means)
    everything = np.array(cells[ALL].losses) if ALL in cells else None
    found = {}
    for index, rule in enumerate(RULES):
        choice = int(np.argmax(scores[index]))
        row = {
            "family": rule.family,
            "types": [_short(value) for value in type_scores[index]],
            "spearman": _short(correlations[index]),
            "interval": [_short(value) for value in measures.interval(draws[:, index])],
            "minus_size": [_short(value) for value in measures.interval(against[:, index])],
            "p": _short(alone[index]),
            "p_corrected": _short(corrected[index]),
            "choice": KEYS[choice],
            "choice_place": int(place[choice]) + 1,
            "above_best": [_short(value) for value in measures.regret(losses[choice], losses[np.argmin(means)])],
        }
        if everything is not None:
            row["above_all_linear"] = [_short(value) for value in measures.regret(losses[choice], everything)]
        found[rule.name] = row
    return found


def _named(evidence: Evidence, task: str, cells: dict[str, Cell]) -> dict[str, str]:
    """Name -> key of the placements that people use, those that were trained."""
    order = evidence.nfn_order(task)
    names = {"all-linear": ALL, "attention": "+".join(ATTENTION), "MLP": "+".join(MLP)}
    for name in ("random", "plop", "kappatune", "eva"):
        names[f"{name} modules"] = evidence.selected(f"modules:{name}", cells)
    for k in range(1, len(order)):
        names[f"PLoP k = {k}"] = _key(order[:k])
    if order:
        names["inverse k = 3"] = _key(order[-3:])
    return {name: key for name, key in names.items() if key in cells}


def transfer(found: Sequence[Evidence]) -> list[dict[str, Any]]:
    """How alike the orders of the triples are between two tables of one protocol."""
    orders = []
    for evidence in found:
        for (task, protocol), cells in evidence.tables.items():
            if all(key in cells for key in KEYS):
                losses = np.array([cells[key].loss for key in KEYS])
                orders.append((evidence.model, task, protocol, losses))
    return [
        {
            "protocol": protocol,
            "first": [model, task],
            "second": [other_model, other_task],
            "spearman": _short(measures.spearman(losses, other)),
        }
        for index, (model, task, protocol, losses) in enumerate(orders)
        for other_model, other_task, other_protocol, other in orders[index + 1 :]
        if protocol == other_protocol
    ]


def stability(evidence: Evidence) -> list[dict[str, Any]]:
    """Kendall's tau between the NFN of the types under a condition, and of the same data as the experiment scores it.

    Checkpoints, and the tasks themselves, are compared with ordinary text at the end of pretraining.
    """
    orders = {}
    for record in evidence.content["features"]:
        if "nfn" in record["values"]:
            nfn = dict(zip(record["modules"], record["values"]["nfn"], strict=True))
            orders[record["data"], record["checkpoint"]] = _types(type_means(nfn))
    last = orders.get((TEXT, 1.0))
    if last is None:
        return []
    rows = []
    for (data, checkpoint), means in sorted(orders.items(), key=lambda item: (item[0][1], item[0][0])):
        condition = f"{100 * checkpoint:g} % of pretraining"
        rows.append(_compared(evidence, data, condition, means, last))
    conditions = {(record["data"], record["condition"]): record["nfn"] for record in evidence.content["stability"]}
    for (data, condition), nfn in conditions.items():
        if condition != REFERENCE:
            rows.append(_compared(evidence, data, condition, _types(nfn), _types(conditions[data, REFERENCE])))
    return rows


def _types(means: Mapping[str, float]) -> Array:
    return np.array([means[name] for name in TYPES])


def _compared(evidence: Evidence, data: str, condition: str, means: Array, reference: Array) -> dict[str, Any]:
    """One row: the types' NFN, the order's tau against `reference`, the largest change, and whether k = 3 stays."""
    return {
        "model": evidence.model,
        "data": data,
        "condition": condition,
        "nfn": [_short(value) for value in means],
        "tau": _short(measures.kendall(means, reference)),
        "largest_change": _short(np.abs(means / reference - 1).max()),
        "same_three": set(np.argsort(means)[:3]) == set(np.argsort(reference)[:3]),
    }


def leave_one_out(tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rule that is best on all models but one, on that one; per protocol. Needs two models."""
    found = []
    for protocol in sorted({table["protocol"] for table in tables}):
        mine = [table for table in tables if table["protocol"] == protocol]
        models = sorted({table["model"] for table in mine})
        for model in models if len(models) > 1 else []:
            others = [table for table in mine if table["model"] != model and not table["held_out"]]
            if not others:
                continue
            best = max(NAMES, key=lambda name: _mean(others, name))
            left = [table for table in mine if table["model"] == model]
            found.append(
                {
                    "protocol": protocol,
                    "model": model,
                    "rule": best,
                    "spearman_fitted": _short(_mean(others, best)),
                    "spearman": _short(_mean(left, best)),
                    "spearman_size": _short(_mean(left, BASELINE)),
                }
            )
    return found


def _mean(tables: Sequence[dict[str, Any]], rule: str) -> float:
    return float(np.mean([table["rules"][rule]["spearman"] for table in tables]))


def _key(types: Sequence[str]) -> str:
    return "+".join(name for name in TYPES if name in types)


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "loss": _short(cell.loss),
        "losses": [_short(loss) for loss in cell.losses],
        "exact": _short(sum(cell.exact) / len(cell.exact)),
        "rate": cell.rate,
        "edge": cell.edge,
        "parameters": cell.parameters,
        "capped": cell.capped,
    }


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
