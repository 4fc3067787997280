"""Axolotl: its schema, and the function that makes PEFT's configuration of it."""

from __future__ import annotations

import yaml

from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import by_config, model_for
from tests.support.stacks.stand_ins import stand_in

stand_in("bitsandbytes", "torchao", "posthog", "axolotl.telemetry")

from axolotl.loaders.adapter import _build_peft_lora_config  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from axolotl.utils.schemas.peft import LoraConfig  # noqa: E402


def adapted(path: str) -> Adapted:
    return by_plugin(path) if path.endswith(".json") else by_keys(path)


def by_keys(path: str) -> Adapted:
    """What the keys of an export give."""
    with open(path, encoding="utf-8") as stream:
        keys = yaml.safe_load(stream)
    assert set(keys) <= set(LoraConfig.model_fields)  # the schema itself ignores others
    checked = LoraConfig(**keys).model_dump(exclude_none=True)
    return by_config(_build_peft_lora_config(model_for(path), DictDefault(checked)), path)


def by_plugin(path: str) -> Adapted:
    """What the plugin gives for a placement."""
    from plop_ext.integrations.axolotl import PlopArgs, PlopPlugin

    own = PlopArgs(plop_placement=path).model_dump()
    cfg = DictDefault({**LoraConfig(adapter="lora").model_dump(exclude_none=True), **own})
    plugin = PlopPlugin()
    assert plugin.get_input_args() == "plop_ext.integrations.axolotl.PlopArgs"
    plugin.pre_lora_load(cfg, model_for(path))
    return by_config(_build_peft_lora_config(model_for(path), cfg), path)
