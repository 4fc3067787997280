"""Failures of transformers in one line, and its own output silenced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plop_ext.errors import InputError, SetupError, first_line

_PARTS = {
    "config": "config.json cannot be used",
    "tokenizer": "the tokenizer cannot be loaded",
    "weights": "the weights cannot be loaded",
    "adapter": "the adapter cannot be loaded",
}


@contextmanager
def explained(name: str, part: str) -> Iterator[None]:
    """Turn any failure to load within the block into a one-line error.

    Args:
        name: The model, as the user named it.
        part: What is loaded: `config`, `tokenizer`, `weights` or `adapter`.
    """
    try:
        yield
    except (torch.OutOfMemoryError, InputError, SetupError):
        raise
    except ImportError as error:
        fix = "pip install gguf" if "gguf" in str(error) else "install it"
        raise SetupError(f"`name_or_path` {name!r} needs a package: {first_line(error)}; {fix}") from error
    except Exception as error:
        if "attn_implementation" in str(error):
            raise InputError(f"`attn_implementation` does not suit {name!r}: {first_line(error)}") from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"`name_or_path` {name!r}: {_PARTS[part]} without code that the checkpoint brings; read the code, then"
                " allow it to run with `trust_remote_code`"
            ) from error
        fix = "check the name, or download or save it again"
        if part == "tokenizer":
            fix = "save the tokenizer that the model was trained with into its folder"
        raise InputError(f"`name_or_path` {name!r}: {_PARTS[part]} ({first_line(error)}); {fix}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers; this package raises errors for their contents."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
