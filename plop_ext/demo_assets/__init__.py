"""A tiny pretrained decoder and two small data sets that ship with the package, for use without a network."""

from __future__ import annotations

import json
import random
from pathlib import Path

from plop_ext.demo_assets import arithmetic
from plop_ext.errors import InputError, SetupError

MODEL_NAME = "plop-tiny"
DATASETS = ("arithmetic", "prose")

_FOLDER = Path(__file__).resolve().parent
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_REPAIR = "reinstall plop_ext, or retrain the model with scripts/train_embedded_model.py"


def model_path() -> Path:
    """Return the folder of the packaged model, a byte-level Llama pretrained on Python code and its documentation.

    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load from this folder.

    Returns:
        The folder, in which every file is complete.

    Raises:
        SetupError: If a file is missing or the weights are truncated.
    """
    folder = _FOLDER / "model"
    for name in _MODEL_FILES:
        if not (folder / name).is_file():
            raise SetupError(f"the packaged model lacks `{folder / name}`; {_REPAIR}")
    weights = folder / "model.safetensors"
    if weights.stat().st_size != _declared_size(weights):
        raise SetupError(f"the packaged model's weights `{weights}` are incomplete; {_REPAIR}")
    return folder


def rows(name: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of a packaged data set.

    Args:
        name: `"arithmetic"`: generated problems with the keys `prompt` and `completion`, in any number. `"prose"`: a
            fixed number of paragraphs of plain English under the key `text`.
        n: Number of rows.
        seed: Seed of the problems, or of the subset of paragraphs (whose order is kept).

    Returns:
        `n` rows, or all rows if the data set has fewer.

    Raises:
        InputError: If there is no data set called `name`, or `n` is negative.
    """
    if n < 0:
        raise InputError(f"`n` must be at least 0, got {n}")
    if name == "arithmetic":
        return arithmetic.generate(n, seed)
    if name == "prose":
        lines = (_FOLDER / "prose.txt").read_text(encoding="utf-8").splitlines()
        paragraphs = [line.strip() for line in lines if line.strip()]
        chosen = sorted(random.Random(seed).sample(range(len(paragraphs)), min(n, len(paragraphs))))
        return [{"text": paragraphs[index]} for index in chosen]
    raise InputError(f"`name` must be one of {', '.join(DATASETS)}, got {name!r}")


def _declared_size(path: Path) -> int:
    """Return the size that the header of a safetensors file declares, or -1 if the header is unreadable."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > path.stat().st_size:
                return -1
            header = json.loads(stream.read(length))
        tensors = [entry for key, entry in header.items() if key != "__metadata__"]
        return 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return -1
