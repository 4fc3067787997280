"""Every multimodal class of transformers, with the part in which each of its modules counts.

`multimodal_parts.json` lists, by class and scope, the outermost modules that are in one scope as a whole. To accept a
change after reading it, run this file as a script.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from plop_ext.layers.scope import parts_of
from tests.support.meta_models import class_names, config_class, models

PINNED = Path(__file__).with_name("multimodal_parts.json")


def multimodal_classes() -> Iterator[tuple[str, nn.Module]]:
    """One class of each configuration with several parts: one that generates, or else the first with a head."""
    by_config: dict[type, list[str]] = defaultdict(list)
    for name in class_names():
        config = config_class(name)
        if config is not None:
            by_config[config].append(name)
    chosen = [
        min(names, key=lambda name: ("Generation" not in name, name.endswith("Model"), name))
        for names in by_config.values()
    ]
    yield from ((name, model) for name, model in models(sorted(chosen)) if parts_of(model) is not None)


def parts(model: nn.Module) -> dict[str, list[str]]:
    """The outermost modules that are in one scope as a whole, by scope; `N` stands for the index of a block."""
    part = parts_of(model)
    assert part is not None
    weighted = [name for name, module in model.named_modules() if name and has_matrix(module)]
    found = {re.sub(r"\.\d+(?=\.|$)", ".N", name): part(name) for name in weighted}
    listed: dict[str, list[str]] = defaultdict(list)
    for name, scope in _outermost(found):
        listed[scope].append(name)
    return dict(sorted(listed.items()))


def has_matrix(module: nn.Module) -> bool:
    embedding = isinstance(module, nn.Embedding) or "embedding" in type(module).__name__.lower()
    return not embedding and any(weight.dim() >= 2 for weight in module.parameters(recurse=False))


def _outermost(found: dict[str, str], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, scope) of the modules below `above`, of which `found` has those with weights."""
    inside: dict[str, dict[str, str]] = {}
    for name, scope in found.items():
        inside.setdefault(above + name.removeprefix(above).split(".")[0], {})[name] = scope
    for name, scopes in inside.items():
        if len(set(scopes.values())) == 1:
            yield name, next(iter(scopes.values()))
        else:
            if name in scopes:
                yield f"{name} itself", scopes.pop(name)
            yield from _outermost(scopes, f"{name}.")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_part_of_a_multimodal_model_counts_where_the_table_says() -> None:
    found = {name: parts(model) for name, model in multimodal_classes()}
    assert found == json.loads(PINNED.read_text(encoding="utf-8"))


if __name__ == "__main__":
    table = {name: parts(model) for name, model in multimodal_classes()}
    PINNED.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
