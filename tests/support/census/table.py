"""The table of classes in docs/models.md, which the census checks.

`python -m tests.support.census.table` writes it, or the rows of the classes that it is given.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from tests.support.census.check import Examination, examine
from tests.support.census.inputs import TEXT_ONLY
from tests.support.census.models import classes
from tests.support.census.refusals import NOT_BUILT, OPEN, UPSTREAM
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
TITLES = {
    "causal": "Causal language models",
    "multimodal": "Language models with pictures or sounds",
    "encoder-decoder": "Encoder-decoder models",
    "speech": "Speech to text",
    "encoder": "Encoders of text",
    "image": "Pictures and videos",
    "image and text": "Pictures compared with texts",
    "sound": "Sounds",
}
_NUMBERS = re.compile(r"(?P<scored>\d+) of \d+")
_ROW = re.compile(r"^\| `(?P<name>\w+)` \|")


@dataclass(frozen=True)
class Outcome:
    """What came of one class: its row in the page, and what is wrong with it.

    Attributes:
        row: The row.
        faults: Faults of this package; empty for a refusal that the table lists.
    """

    row: str
    faults: tuple[str, ...] = ()


def outcome(class_name: str, model_type: str, folder: Path) -> Outcome:
    """Examine a class, and compare what happens with the list of refusals."""
    listed = UPSTREAM.get(class_name) or OPEN.get(class_name)
    try:
        found = examine(class_name, model_type, folder)
        seen = "; ".join(found.faults)
    except Exception as error:  # a refusal is one line of the table, whatever raises it
        found, seen = None, f"{type(error).__name__}: {error}"
    remark = _left_out(class_name)
    if listed is None:
        faults = (seen,) if seen else ()
        return Outcome(row_of(class_name, found, remark), faults)
    if not seen:
        return Outcome("", ("passes: take it off the list of refusals",))
    if not re.search(listed.message, seen):
        return Outcome("", (f"another refusal than the listed one: {seen}",))
    return Outcome(row_of(class_name, found, "; ".join(part for part in (listed.reason, remark) if part)))


def _left_out(class_name: str) -> str:
    """Return why the pictures or sounds of a class are not examined; empty if they are, or if it has none."""
    import transformers

    reason = TEXT_ONLY.get(getattr(transformers, class_name).config_class.model_type)
    return "" if reason is None else f"only its text, without {reason}"


def row_of(class_name: str, found: Examination | None, reason: str) -> str:
    if found is None or not found.scored:
        return f"| `{class_name}` | | | {reason} |"
    scored = f"{found.scored} of {found.scored + len(found.unscored)}"
    compared = "in the padded batch" if found.by_batch else "alone"
    return f"| `{class_name}` | {scored} | {compared} | {reason} |"


def scored_in(row: str) -> int:
    """The number of scored matrices in a row of the page; 0 for a refusal."""
    numbers = _NUMBERS.search(row)
    return int(numbers["scored"]) if numbers else 0


def rows() -> dict[str, str]:
    """Class name to row of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {match["name"]: line for line in lines if (match := _ROW.match(line))}


def named(causal: bool) -> list[str]:
    """The classes of the page that are causal language models, or all others."""
    of_section: dict[str, list[str]] = {}
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif match := _ROW.match(line):
            of_section.setdefault(section, []).append(match["name"])
    return [name for title, names in of_section.items() if (title == TITLES["causal"]) == causal for name in names]


def check(class_name: str, folder: Path) -> None:
    """Examine a class, and assert that nothing is wrong, and that no fewer matrices are scored than the page says."""
    import transformers

    came = outcome(class_name, classes()[class_name][1], folder)
    assert not came.faults, came.faults
    if f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8"):  # later classes differ
        listed = rows()[class_name]
        same = _NUMBERS.sub("", came.row) == _NUMBERS.sub("", listed) and scored_in(came.row) >= scored_in(listed)
        assert same, f"{came.row} is not what docs/models.md says: {listed}"


def write(found: dict[str, str]) -> None:
    """Write the tables of the page below its introduction."""
    head = PAGE.read_text(encoding="utf-8").split("\n## ", 1)[0].rstrip()
    kinds = {name: kind for name, (kind, _) in classes().items()}
    parts = [head]
    for kind, title in TITLES.items():
        names = sorted((name for name in found if kinds[name] == kind), key=str.lower)
        parts.append(f"\n## {title}\n\n| class | scored | compared | remarks |\n| --- | ---: | --- | --- |")
        parts += [found[name] for name in names]
    parts.append("\n## Not examined\n\nThe rule makes no configuration or no inputs for these classes.\n")
    parts.append("| class | reason |\n| --- | --- |")
    parts += [f"| {name} | {reason} |" for name, reason in sorted(NOT_BUILT.items())]
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")


def main(chosen: list[str]) -> None:
    """Examine the chosen classes, or all, and write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    known = classes()
    found = {name: row for name, row in rows().items() if name in known and name not in NOT_BUILT}
    for name in chosen or [name for name in known if name not in NOT_BUILT]:
        with tempfile.TemporaryDirectory() as folder:
            came = outcome(name, known[name][1], Path(folder))
        for fault in came.faults:
            print(f"{name}: {fault[:400]}", flush=True)
        found[name] = came.row or row_of(name, None, "")
    write(found)


if __name__ == "__main__":
    main(sys.argv[1:])
