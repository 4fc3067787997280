"""PEFT: the export is run, and its `config` wraps a model."""

from __future__ import annotations

import runpy

from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import by_config


def adapted(path: str) -> Adapted:
    return by_config(runpy.run_path(path)["config"], path)
