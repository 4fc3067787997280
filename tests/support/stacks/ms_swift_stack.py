"""ms-swift: its reader of YAML, its arguments of tuners, and its choice of target modules."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import model_for, of_trained
from tests.support.stacks.stand_ins import skip_init, stand_in

stand_in("modelscope", "torchao", "json_repair", "swift.trainers", "swift.tuner_plugin")
_log = logging.getLogger("modelscope")
_log.addHandler(logging.NullHandler())
importlib.import_module("modelscope.utils.logger").get_logger = lambda *args, **kwargs: _log
_package = importlib.util.find_spec("swift")
assert _package is not None and _package.submodule_search_locations
for _name in ("arguments", "pipelines", "pipelines.train"):
    skip_init(f"swift.{_name}", str(Path(_package.submodule_search_locations[0], *_name.split("."))))

from swift.arguments.tuner_args import TunerArguments  # noqa: E402
from swift.cli.main import parse_yaml_args  # noqa: E402
from swift.pipelines.train.tuner import prepare_adapter  # noqa: E402


@dataclass
class Arguments(TunerArguments):
    """Its arguments of tuners, with the others that placing reads at their defaults."""

    tuner_type: str = "full"
    task_type: str = "causal_lm"
    use_swift_lora: bool = False
    tuner_backend: str = "peft"

    def _init_multimodal_full(self) -> None:
        """The model is not multimodal."""


def adapted(path: str) -> Adapted:
    words = [path]
    parse_yaml_args(words)
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(words)
    return of_trained(prepare_adapter(arguments, model_for(path)))
