"""Messages of the API with the option names of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Options whose names differ from the API's; all others are the API's names with dashes.
_RENAMED = {
    "name_or_path": "MODEL",
    "model": "MODEL",
    "source": "DATA",
    "rows": "DATA",
    "dataloader": "DATA",
    "train": "DATA",
    "max_samples": "--samples",
    "learning_rate": "--lr",
    "learning_rates": "--rates",
    "placements": "--strategies",
    "lora_alpha": "--alpha",
    "max_steps": "--steps",
    "output_dir": "--output",
    "batch": "--batch-size",
    "r": "--rank",
}
_OPTIONS = (
    *("baseline", "batch_size", "columns", "compat", "device", "dtype", "eval", "exclude", "fast"),
    *("finalists", "graph", "ignore_nonfinite", "include", "lossy", "margin"),
    *("mask", "max_length", "max_memory", "max_nfn", "max_params", "modules", "pad_to_multiple_of", "probes", "ranks"),
    *(
        "resume",
        "scope",
        "seed",
        "seeds",
        "seq",
        "serve",
        "split",
        "stop",
        "strategy",
        "token_step",
        "trust_remote_code",
        "types",
    ),
)
_WORDS = _RENAMED | {name: f"--{name.replace('_', '-')}" for name in _OPTIONS}


def command_words(message: str, own: Mapping[str, str] | None = None) -> str:
    """Replace argument names of the API in backticks by the options of the command line.

    Args:
        message: Message of the API.
        own: Further names, of a single command.
    """
    words = {**_WORDS, **(own or {})}
    return re.sub(r"`(\w+)`", lambda match: f"`{words.get(match[1], match[1])}`", message)
