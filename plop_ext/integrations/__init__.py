"""Scores inside the stacks that people train with: one file per stack, imported when it is used.

`score_trainer` scores on a trainer's own data before the optimizer exists, `auto_lora` makes an adapted model in one
call, and `PlopCallback` scores while a `Trainer` trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plop_ext.integrations.before_training import score_trainer
    from plop_ext.integrations.callback import PlopCallback
    from plop_ext.integrations.one_call import auto_lora

_HOMES = {"PlopCallback": "callback", "auto_lora": "one_call", "score_trainer": "before_training"}

__all__ = ["PlopCallback", "auto_lora", "score_trainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
