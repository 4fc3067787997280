"""Code that comes with a checkpoint: never run unless the user has allowed it, and always said."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plop_ext.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trust:
    """Whether the code of a checkpoint may run.

    Attributes:
        given: The user's `trust_remote_code`.
        asked: Names of the Python modules that the checkpoint brings, none if it brings no code.
    """

    given: bool
    asked: tuple[str, ...] = ()


NO_CODE = Trust(False)


def ask_for_trust(name: str, folder: Path, given: bool) -> Trust:
    """Return whether a checkpoint's code runs, and say in one line if it brings any.

    Args:
        name: The model, as the user named it.
        folder: Its folder.
        given: Whether the user allows its code to run.

    Raises:
        InputError: If the model cannot be loaded without its code, and the user has not allowed it.
    """
    maps = {file: _auto_map(folder / file) for file in ("config.json", "tokenizer_config.json")}
    asked = tuple(sorted({module for auto_map in maps.values() for module in _modules(auto_map)}))
    if not asked:
        return Trust(given)
    files = ", ".join(f"{module}.py" for module in asked)
    if given:
        logger.warning("%s brings code of its own, which runs as you asked: %s", name, files)
        return Trust(given, asked)
    if _needs(folder, maps["config.json"]):
        raise InputError(
            f"`name_or_path` {name!r} brings code of its own ({files}), without which it cannot be loaded; read the"
            " code, then allow it to run with `trust_remote_code`"
        )
    logger.warning(
        "%s brings code of its own (%s), which does not run: transformers has this model; `trust_remote_code` would"
        " run it",
        name,
        files,
    )
    return Trust(given, asked)


def _needs(folder: Path, auto_map: dict[str, Any]) -> bool:
    """Return whether transformers has no model of the checkpoint's type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return "AutoConfig" in auto_map and _read(folder / "config.json").get("model_type") not in CONFIG_MAPPING


def _auto_map(path: Path) -> dict[str, Any]:
    found = _read(path).get("auto_map")
    if isinstance(found, (list, tuple)):  # of tokenizers saved long ago
        return {"AutoTokenizer": found}
    return found if isinstance(found, dict) else {}


def _modules(auto_map: dict[str, Any]) -> list[str]:
    """Return the modules of an auto_map's references, such as `modeling_x` of `owner/name--modeling_x.Class`."""
    entries = (entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value]))
    return [entry.rpartition(".")[0] for entry in entries if isinstance(entry, str) and "." in entry]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the loader says what is wrong
        return {}
    return found if isinstance(found, dict) else {}
