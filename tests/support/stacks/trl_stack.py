"""TRL: its parser of `--config`, its `ModelConfig`, and its `get_peft_config`."""

from __future__ import annotations

from trl import ModelConfig, TrlParser, get_peft_config

from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import by_config


def adapted(path: str) -> Adapted:
    (arguments,) = TrlParser((ModelConfig,)).parse_args_and_config(["--config", path])
    return by_config(get_peft_config(arguments), path)
