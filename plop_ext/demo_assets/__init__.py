"""What ships inside the package: a tiny pretrained decoder and two small datasets, so that nothing needs a network."""

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
_REPAIR = "reinstall plop_ext, or train the model anew with scripts/train_embedded_model.py"


def model_path() -> Path:
    """Return the folder of the embedded model, a byte-level Llama pretrained on Python code and its documentation.

    The folder is an ordinary one for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Returns:
        The folder, checked to hold every file whole.

    Raises:
        SetupError: If a file is missing or the weights are cut short.
    """
    folder = _FOLDER / "model"
    for name in _MODEL_FILES:
        if not (folder / name).is_file():
            raise SetupError(f"the embedded model lacks `{folder / name}`; {_REPAIR}")
    weights = folder / "model.safetensors"
    if weights.stat().st_size != _declared_size(weights):
        raise SetupError(f"the embedded model's weights `{weights}` are incomplete; {_REPAIR}")
    return folder


def rows(name: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of an embedded dataset.

    Args:
        name: `"arithmetic"`: generated problems with the keys `prompt` and `completion`, as many as asked for;
            `"prose"`: paragraphs of plain English under the key `text`, as many as there are at most.
        n: Number of rows.
        seed: Chooses the problems, or the subset of paragraphs (whose order is kept).

    Returns:
        `n` rows, or all of them where the dataset has fewer.

    Raises:
        InputError: If there is no dataset called `name`, or `n` is negative.
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
    """Return the size that a safetensors file's own header declares, or -1 if it has no readable header."""
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
