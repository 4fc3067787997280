"""The plugin of Axolotl sets the keys of the export; `tests/stacks` runs it inside Axolotl."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from plop_ext.errors import InputError
from plop_ext.placement.exports import stack_named
from plop_ext.placement.exports._plan import make_plan
from plop_ext.placement.exports.axolotl import keys
from tests.support.placed_models import llama, placed_on, tiny_mixture
from tests.support.tiny_lm import tiny_llama


class Cfg(dict[str, Any]):
    """A configuration as Axolotl has it: a missing key is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    monkeypatch.delitem(sys.modules, "plop_ext.integrations.axolotl", raising=False)
    return importlib.import_module("plop_ext.integrations.axolotl").PlopPlugin()


def test_the_keys_are_those_of_the_export(plugin: Any, tmp_path: Path) -> None:
    model, path = llama(), str(tmp_path / "p.json")
    placement = placed_on(model, lambda name: name.endswith("v_proj"))
    placement.save(path)
    cfg = Cfg(plop_placement=path, lora_target_linear=True, lora_dropout=0.1)
    plugin.pre_lora_load(cfg, model)
    expected = keys(make_plan(placement, stack_named("axolotl"), None, None))
    assert cfg == {"plop_placement": path, **expected, "lora_dropout": 0.1}
    cfg = Cfg(plop_placement=path, lora_r=3, lora_alpha=9)
    plugin.pre_lora_load(cfg, model)
    assert (cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout) == (3, 9, 0.0)


def test_another_model_is_refused(plugin: Any, tmp_path: Path) -> None:
    placed_on(llama(), lambda name: name.endswith("v_proj")).save(tmp_path / "p.json")
    cfg = Cfg(plop_placement=str(tmp_path / "p.json"))
    with pytest.raises(InputError):
        plugin.pre_lora_load(cfg, tiny_llama())
    assert set(cfg) == {"plop_placement"}


def test_a_dropout_does_not_reach_parameters(plugin: Any, tmp_path: Path) -> None:
    model = tiny_mixture()
    placed_on(model, lambda name: "experts.down" in name, parameters=True).save(tmp_path / "p.json")
    cfg = Cfg(plop_placement=str(tmp_path / "p.json"), lora_dropout=0.1)
    plugin.pre_lora_load(cfg, model)
    assert cfg.lora_dropout == 0.0 and len(cfg.lora_target_parameters) == 2
