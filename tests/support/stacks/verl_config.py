"""The configuration of verl's PPO trainer with an export on top, as its command composes it."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir


def composed(path: str) -> Any:
    found = importlib.util.find_spec("verl")
    assert found is not None and found.submodule_search_locations
    own = Path(found.submodule_search_locations[0], "trainer", "config")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder, "plop.yaml"))
        with initialize_config_dir(config_dir=folder, version_base=None):
            return compose("plop", overrides=[f"hydra.searchpath=[file://{own}]"])
