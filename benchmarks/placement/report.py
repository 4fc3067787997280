"""Tables and plot of the page from the committed results: nothing on it is written by hand."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.placement.evidence import ALL, Evidence, load
from benchmarks.placement.models import TYPES
from benchmarks.placement.rules import BASELINE

PAGE = Path(__file__).parent / "README.md"
PLOT = "triples.svg"
_PLOTTED = ("size", "nfn")
_ALWAYS = ("nfn", "nfn by probes", "nfn width-corrected")
_SHOWN = ("all-linear", "MLP", "attention", "PLoP k = 3", "inverse k = 3")


def main(results: Path, page: Path) -> None:
    """Bring the page up to date, and draw the plot beside the results."""
    page.write_text(updated(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    plot(results)
    print(f"wrote {page.name} and {PLOT}")


def updated(text: str, results: Path) -> str:
    """`text` with its tables made anew from the files in `results`."""
    found = load(results)
    analysis = json.loads((results / "analysis.json").read_text(encoding="utf-8"))
    makers = {
        "models": lambda: models(found),
        "placements": lambda: named(analysis["tables"]),
        "rules": lambda: rules(analysis),
        "stability": lambda: stability(analysis["stability"]),
        "origin": lambda: origin(found),
    }
    for name, make in makers.items():
        pattern = rf"(<!-- placement: {name} -->\n).*?(<!-- /placement: {name} -->)"
        text, count = re.subn(pattern, lambda match, make=make: match[1] + make() + match[2], text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the page must have the mark `<!-- placement: {name} -->` once, has it {count} times")
    return text


def models(found: Sequence[Evidence]) -> str:
    """What was pretrained, and on how much."""
    rows = []
    for evidence in found:
        training = evidence.content["pretraining"]
        rows.append(
            [
                evidence.model,
                "held out" if evidence.held_out else "fitting",
                f"{training['parameters'] / 1e6:.1f} M",
                f"{training['tokens'] / 1e6:.0f} M",
                f"{training['epochs']:.2f}",
                f"{training['validation_loss']:.2f}",
                ", ".join(f"{task} ({protocol})" for task, protocol in sorted(evidence.tables) if protocol != "full"),
            ]
        )
    return _table(["model", "role", "parameters", "tokens", "epochs", "validation loss", "tables"], rows)


def named(tables: Sequence[dict[str, Any]]) -> str:
    """Where the placements that people use come, by task and protocol."""
    parts = []
    for table in tables:
        if not table["rules"]:
            continue
        rows = []
        cells, triples = table["placements"], [key for key in table["placements"] if _is_triple(key)]
        for name, key in sorted(table["named"].items(), key=lambda item: cells[item[1]]["loss"]):
            cell = cells[key]
            place = f"{triples.index(key) + 1} of {len(triples)}" if key in triples else ""
            marks = (" (edge)" if cell["edge"] else "") + (" (capped)" if cell["capped"] else "")
            row = [name, key if not key.startswith("modules:") and key != ALL else ""]
            rows.append([*row, *_figures(cell, place, marks)])
        best = triples[0]
        rows.insert(0, ["mean of the triples", "", f"{table['mean_triple']:.4g}", "", "", "", ""])
        rows.insert(0, ["best triple", best, *_figures(cells[best], f"1 of {len(triples)}", "")])
        if table["full_finetuning"]:
            rows.insert(0, ["full finetuning", "", *_figures(table["full_finetuning"], "", "")])
        head = (
            f"{table['model']}, `{table['task']}`, {table['protocol']}; two seeds agree on the order of the triples "
        )
        head += f"with a correlation of {table['reliability']:.2f}:\n\n"
        columns = ["placement", "types", "test loss", "exact", "parameters", "among triples", "rate"]
        parts.append(head + _table(columns, rows))
    return "\n".join(parts)


def rules(analysis: dict[str, Any]) -> str:
    """How well each rule orders the triples, and what it would have chosen; those below size in one line."""
    tables = [table for table in analysis["tables"] if table["rules"]]
    if not tables:
        return "No table with every triple yet.\n"
    heads = [f"{table['model']}, {table['task']}, {table['protocol']}" for table in tables]
    means = {
        name: sum(table["rules"][name]["spearman"] for table in tables) / len(tables) for name in tables[0]["rules"]
    }
    names = sorted(means, key=lambda name: -means[name])
    shown = [name for name in names if means[name] >= means[BASELINE] or name in _ALWAYS]
    rows = [
        [name, tables[0]["rules"][name]["family"], *(_judged(table["rules"][name]) for table in tables)]
        for name in shown
    ]
    rest = ", ".join(f"{name} {means[name]:.2f}" for name in names if name not in shown)
    below = textwrap.fill(f"Below size, mean Spearman of the tables: {rest}.", 120)
    return _table(["rule", "needs", *heads], rows) + f"\n{below}\n"


def stability(rows: Sequence[dict[str, Any]]) -> str:
    """The NFN of every type on each data and under each condition."""
    types = [name.removesuffix("_proj") for name in TYPES]
    columns = ["model", "data", "condition", *types, "tau", "largest change", "same k = 3"]
    lines = [
        [
            row["model"],
            row["data"],
            row["condition"],
            *(f"{value:.3g}" for value in row["nfn"]),
            f"{row['tau']:.2f}",
            f"{100 * row['largest_change']:.0f} %",
            "yes" if row["same_three"] else "no",
        ]
        for row in rows
    ]
    return _table(columns, lines)


def origin(found: Sequence[Evidence]) -> str:
    """Hardware, versions and commits that the figures come from."""
    lines = []
    for evidence in found:
        environments = evidence.content["environments"]
        measured = {
            (each["gpu"] or each["cpu"], each["torch"], each["transformers"], (each["commit"] or "")[:10])
            for each in environments
        }
        for hardware, torch, transformers, commit in sorted(measured):
            lines.append(f"- {evidence.model}: {hardware}, torch {torch}, transformers {transformers}; {commit}\n")
    return "".join(lines)


def plot(results: Path) -> None:
    """Each triple as a point: what a rule said of it against its test loss."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    analysis = json.loads((results / "analysis.json").read_text(encoding="utf-8"))
    tables = [table for table in analysis["tables"] if table["rules"]]
    if not tables:
        return
    pyplot.rcParams.update({"svg.hashsalt": "placement", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(
        len(tables), len(_PLOTTED), figsize=(4.2 * len(_PLOTTED), 3.2 * len(tables)), squeeze=False
    )
    for table, line in zip(tables, axes, strict=True):
        for rule, axis in zip(_PLOTTED, line, strict=True):
            _draw(axis, table, rule)
    figure.tight_layout()
    figure.savefig(results / PLOT, metadata={"Date": None})
    pyplot.close(figure)


def _draw(axis: Any, table: dict[str, Any], rule: str) -> None:
    from matplotlib import ticker

    from benchmarks.placement.analyse import KEYS
    from benchmarks.placement.measures import INCIDENCE

    scores = INCIDENCE @ table["rules"][rule]["types"]
    losses = [table["placements"][key]["loss"] for key in KEYS]
    axis.scatter(scores, losses, s=14, color="0.6")
    for name in _SHOWN:
        key = table["named"].get(name)
        if key in KEYS:
            index = KEYS.index(key)
            axis.scatter(scores[index], losses[index], s=30, label=name)
        elif key:
            loss = table["placements"][key]["loss"]
            axis.axhline(loss, lw=0.8, ls="--", color="0.3")
            axis.text(1, loss, name, fontsize=6, ha="right", va="bottom", transform=axis.get_yaxis_transform())
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(ticker.FormatStrFormatter("%.3g"))
    axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
    axis.set_title(f"{table['model']}, {table['task']}, {table['protocol']}", fontsize=8)
    axis.set_xlabel(f"{rule}: higher is thought better", fontsize=7)
    axis.set_ylabel("test loss", fontsize=7)
    axis.tick_params(labelsize=6, which="both")
    axis.legend(fontsize=6)


def _judged(rule: dict[str, Any]) -> str:
    low, high = rule["interval"]
    return f"{rule['spearman']:.2f} ({low:.2f} to {high:.2f}), {rule['p_corrected']:.2f}, {rule['choice_place']}"


def _is_triple(key: str) -> bool:
    return key.count("+") == 2


def _figures(cell: dict[str, Any], place: str, marks: str) -> list[str]:
    return [
        f"{cell['loss']:.4g}",
        f"{100 * cell['exact']:.1f} %",
        f"{cell['parameters'] / 1e3:.0f} k",
        place,
        f"{cell['rate']:g}{marks}",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
