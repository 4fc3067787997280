"""Where the files of a model are: a folder, a GGUF file, an adapter with its base, or a repository on the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plop_ext import demo_assets
from plop_ext.errors import InputError, SetupError, first_line, reason
from plop_ext.hub import cached_when_offline

_ADAPTER = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Everything of a repository but its weights. `original/`, `onnx/` and the like hold the model a second time.
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
_IGNORED = ("*/*", "*consolidated*")
# What trainers write instead of weights that `from_pretrained` reads, and how to get these.
_SHARDS = {
    "global_step*": "holds the shards of DeepSpeed; run the zero_to_fp32.py in it, and give what that writes",
    "pytorch_model_fsdp_*": "holds the shards of FSDP; run `accelerate merge-weights`, and give what that writes",
}


@dataclass(frozen=True)
class Source:
    """The files of a model.

    Attributes:
        name: The model, as the user named it.
        folder: Folder with its config.json and weights, or with the GGUF file.
        gguf: Name of the GGUF file in `folder`, or None.
        adapter: Folder of an adapter for the model, or None.
    """

    name: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def gguf_option(self) -> dict[str, str]:
        """The argument with which transformers reads a GGUF file."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def find(name: str, *, weights: bool = True, code: bool = False) -> Source:
    """Find a model; download it if it is on the hub.

    Args:
        name: Folder of a model or adapter, GGUF file, name on the hub, or `"plop-tiny"`.
        weights: Whether the weights are needed.
        code: Whether the Python files of a repository are needed.

    Raises:
        InputError: If there is no such model, or its folder holds none.
        SetupError: If the hub cannot be reached.
    """
    if name == demo_assets.MODEL_NAME:
        return Source(name, demo_assets.model_path())
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no permission, no home folder, a NUL
        raise InputError(f"`name_or_path` {name[:200]!r} cannot be read ({reason(error)}); check the path") from error
    if is_file:
        if path.suffix.lower() == ".gguf":
            return Source(name, path.parent, gguf=path.name)
        raise InputError(f"`name_or_path` {name} is a file; give the folder that holds the model's config.json")
    if is_folder:
        folder = path
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1 or not name.strip():
        raise InputError(f"`name_or_path` {name!r}: no such folder; check the path")
    else:
        folder = _download(name, weights, code)
    if (folder / _ADAPTER).is_file():
        return _with_base(name, folder, weights, code)
    _check_folder(name, folder, weights)
    return Source(name, folder)


def _check_folder(name: str, folder: Path, weights: bool) -> None:
    """Raise an error that says what `folder` holds if it holds no model."""
    complete = any((folder / file).is_file() for file in _WEIGHTS)
    if weights and not complete:
        for pattern, what in _SHARDS.items():
            if any(folder.glob(pattern)):
                raise InputError(f"`name_or_path` {name} {what}")
    if (folder / "config.json").is_file():
        return
    checkpoints = sorted(folder.glob("checkpoint-*/"), key=_step)
    if checkpoints:
        raise InputError(f"`name_or_path` {name} holds the checkpoints of a trainer; give one, {checkpoints[-1]}")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise InputError(f"`name_or_path` {name} holds no config.json but GGUF files; give one, {ggufs[0]}")
    raise InputError(f"`name_or_path` {name} holds no model: it has no config.json; give a folder that has one")


def _step(checkpoint: Path) -> int:
    number = re.search(r"\d+$", checkpoint.name)
    return int(number[0]) if number else -1


def _with_base(name: str, adapter: Path, weights: bool, code: bool) -> Source:
    """Return the base model of an adapter, with the adapter."""
    if any((adapter / file).is_file() for file in _WEIGHTS):
        raise InputError(
            f"`name_or_path` {name} holds both a model and an adapter ({_ADAPTER}); move one of them elsewhere"
        )
    try:
        base: Any = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"`{adapter / _ADAPTER}` names no base model; save the adapter again with PEFT") from error
    if not isinstance(base, str) or not base:
        raise InputError(f"`{adapter / _ADAPTER}` names no base model; set its base_model_name_or_path")
    try:
        source = find(base, weights=weights, code=code)
    except (InputError, SetupError) as error:
        reason = str(error).removeprefix(f"`name_or_path` {base!r} ").removeprefix(f"`name_or_path` {base} ")
        raise type(error)(
            f"`name_or_path` {name} is an adapter for {base!r}, which cannot be loaded: {reason} (the base is named in"
            f" its {_ADAPTER})"
        ) from error
    if source.adapter is not None:
        raise InputError(f"`name_or_path` {name} is an adapter for another adapter, {base}; merge that one first")
    return replace(source, name=name, adapter=adapter)


def _download(name: str, weights: bool, code: bool) -> Path:
    """Return the local copy of a repository on the hub, with what is needed of it."""
    from huggingface_hub import snapshot_download

    wanted = [*_SMALL_FILES, *(["*.py"] if code else []), *(["*.safetensors"] if weights else [])]
    with cached_when_offline() as online:
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_IGNORED)))
            if weights and not any(folder.glob("*.safetensors")):
                snapshot_download(name, allow_patterns=["*.bin"], ignore_patterns=list(_IGNORED))
        except Exception as error:
            if online:
                raise InputError(
                    f"`name_or_path` {name!r} is no local folder, and cannot be downloaded from the hub"
                    f" ({first_line(error)}); check the name, and log in (`hf auth login`) if access is restricted"
                ) from error
            raise SetupError(
                f"`name_or_path` {name!r} is no local folder, and the hub cannot be reached; give the folder of a"
                f" model, or {demo_assets.MODEL_NAME}"
            ) from error
    return folder
