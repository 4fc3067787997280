"""PLoP (arXiv 2506.20629): where in this model should LoRA go for this task?

`score` measures a model on task data, `Scores.statistics` how certain the ranking is. `Scores.place` puts LoRA on the
module types with the lowest normalized feature norm, and `Placement.lora_config` is the result for PEFT. The import
needs torch and numpy; transformers and PEFT are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plop_ext._version import __version__

if TYPE_CHECKING:
    from plop_ext.collecting.collector import Collector
    from plop_ext.errors import InputError, SetupError
    from plop_ext.experiment.compare import compare
    from plop_ext.experiment.result import Comparison
    from plop_ext.finetuning.finetune import FinetuneResult, finetune
    from plop_ext.integrations.one_call import auto_lora
    from plop_ext.ops.native import build_info
    from plop_ext.placement import Placement
    from plop_ext.runs.run import run_experiment
    from plop_ext.scores import Scores
    from plop_ext.scoring.collected import scores_from
    from plop_ext.scoring.score import score
    from plop_ext.scoring.targets import find_plop_target_modules
    from plop_ext.statistics import StopRule
    from plop_ext.streaming.score import score_streaming

_HOMES = {
    "Collector": "collecting.collector",
    "Comparison": "experiment.result",
    "FinetuneResult": "finetuning.finetune",
    "InputError": "errors",
    "Placement": "placement",
    "Scores": "scores",
    "SetupError": "errors",
    "StopRule": "statistics",
    "auto_lora": "integrations.one_call",
    "build_info": "ops.native",
    "compare": "experiment.compare",
    "find_plop_target_modules": "scoring.targets",
    "finetune": "finetuning.finetune",
    "run_experiment": "runs.run",
    "score": "scoring.score",
    "score_streaming": "streaming.score",
    "scores_from": "scoring.collected",
}

__all__ = [
    "Collector",
    "Comparison",
    "FinetuneResult",
    "InputError",
    "Placement",
    "Scores",
    "SetupError",
    "StopRule",
    "__version__",
    "auto_lora",
    "build_info",
    "compare",
    "find_plop_target_modules",
    "finetune",
    "run_experiment",
    "score",
    "score_streaming",
    "scores_from",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
