"""Every public function, called with every kind of wrong value in every place, says what is wrong in one line."""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import plop_ext
from plop_ext.data import batches, encode, load_rows
from plop_ext.errors import InputError, SetupError
from plop_ext.experiment import trial
from plop_ext.experiment.result import Comparison
from plop_ext.finetuning import finetune as finetuning
from plop_ext.layers import discover
from plop_ext.models import load_model
from plop_ext.placement import Placement
from plop_ext.runs import run as runs
from plop_ext.scores import Scores
from plop_ext.statistics import StopRule
from tests.support import tiny_models
from tests.support.made_comparison import made_comparison
from tests.support.saved_scores import ranked

WRONG = (
    *(None, True, False, -1, 0, 1.5, math.nan, math.inf, 10**30, "x", "", "6GiB", "a\0b", b"x"),
    *([], [None], {}, {"x": 1}, (), set(), object(), int, print, np.arange(2), torch.zeros(2), Path("x")),
)
# The placement is of another model than the toy that these are called with.
FOR_OTHER_MODELS = {"Placement.verify", "Placement.check_model"}
# Public names that are no functions of a user's values.
NO_ARGUMENTS = {"Collector", "FinetuneResult", "InputError", "SetupError", "__version__", "build_info"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, its tokenizer, data, scores and a placement, all tiny."""
    model, tokenizer = load_model("plop-tiny", device="cpu")
    encoded = encode(load_rows("prose", max_samples=4), tokenizer, max_length=16)
    measured = plop_ext.score(model, batches(encoded, pad_token_id=0), stop=None, progress=False)
    found = ranked()
    folder = tmp_path_factory.mktemp("made")
    found.save(folder / "s.json")
    found.place().save(folder / "p.json")
    made_comparison().save(folder / "c.json")
    toy = tiny_models.Plain()
    data = [torch.randn(2, 4, 16)]
    with torch.no_grad(), plop_ext.Collector(toy, discover(toy).layers) as collector:
        collector.begin(2)
        toy(data[0])
        collector.end()
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, encoded=encoded, measured=measured, scores=found,
        placement=found.place(), toy=toy, data=data, saved=folder / "s.json", placed=folder / "p.json",
        compared=folder / "c.json", folder=folder, collector=collector,
    )  # fmt: skip


def calls(made: SimpleNamespace) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public function, and arguments with which it works."""
    scores, placement = made.scores, made.placement
    trained = {"model": made.model, "tokenizer": made.tokenizer, "train": made.encoded[:3], "eval": made.encoded[3:]}
    trained |= {"progress": False}
    toy = {"model": made.toy, "dataloader": made.data, "progress": False}
    return {
        "score": (plop_ext.score, toy),
        "find_plop_target_modules": (plop_ext.find_plop_target_modules, toy | {"types": 1}),
        "auto_lora": (plop_ext.auto_lora, {"model": made.toy, "data": made.data, "types": 1}),
        "scores_from": (plop_ext.scores_from, {"collector": made.collector}),
        "score_streaming": (
            plop_ext.score_streaming,
            {"name_or_path": "plop-tiny", "dataloader": batches(made.encoded, pad_token_id=0), "progress": False},
        ),
        "finetune": (plop_ext.finetune, trained | {"placement": made.measured.place(types=2)}),
        "compare": (plop_ext.compare, trained | {"scores": made.measured}),
        "run_experiment": (plop_ext.run_experiment, trained | {"folder": "run"}),
        "StopRule": (StopRule, {}),
        "Comparison.load": (Comparison.load, {"path": made.compared}),
        "Comparison.row": (Comparison.load(made.compared).row, {"label": "all-linear"}),
        "Comparison.save": (Comparison.load(made.compared).save, {"path": made.folder / "comparison.json"}),
        "Scores.place": (scores.place, {}),
        "Scores.metrics": (scores.metrics, {}),
        "Scores.merge": (Scores.merge, {"parts": [scores]}),
        "Scores.statistics": (scores.statistics, {}),
        "Scores.save": (scores.save, {"path": made.folder / "scores.json"}),
        "Scores.load": (Scores.load, {"path": made.saved}),
        "Placement.cost": (placement.cost, {"model": "float32", "batch": 1, "seq": 8}),
        "Placement.lora_config": (placement.lora_config, {}),
        "Placement.export": (placement.export, {"stack": "peft"}),
        "Placement.servable": (placement.servable, {"engine": "vllm"}),
        "Placement.verify": (placement.verify, {"peft_model": made.toy}),
        "Placement.check_model": (placement.check_model, {"model": made.toy}),
        "Placement.num_parameters": (placement.num_parameters, {}),
        "Placement.rank_for": (placement.rank_for, {"max_params": 10**6}),
        "Placement.ranks_at": (placement.ranks_at, {}),
        "Placement.save": (placement.save, {"path": made.folder / "placement.json"}),
        "Placement.load": (Placement.load, {"path": made.placed}),
        "load_rows": (load_rows, {"source": "prose", "max_samples": 1}),
        "encode": (encode, {"rows": [{"text": "a"}], "tokenizer": made.tokenizer}),
        "batches": (batches, {"encoded": made.encoded, "pad_token_id": 0}),
        "load_model": (load_model, {"name_or_path": "plop-tiny", "device": "cpu"}),
    }


NAMES = (
    *("auto_lora", "scores_from", "Scores.metrics"),
    *("score", "find_plop_target_modules", "score_streaming", "finetune", "compare", "run_experiment", "StopRule"),
    *(f"Comparison.{name}" for name in ("load", "row", "save")),
    *(f"Scores.{name}" for name in ("place", "merge", "statistics", "save", "load")),
    *(f"Placement.{name}" for name in ("cost", "lora_config", "export", "servable", "verify", "check_model")),
    *(f"Placement.{name}" for name in ("num_parameters", "rank_for", "ranks_at", "save", "load")),
    *("load_rows", "encode", "batches", "load_model"),
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, item in inspect.signature(function).parameters.items() if item.kind in kinds]


def test_every_public_name_is_tried() -> None:
    public = set(plop_ext.__all__) - NO_ARGUMENTS
    tried = {name.partition(".")[0] for name in NAMES}
    assert public <= tried
    for owner in (Scores, Placement, Comparison):
        methods = {
            name
            for name, value in vars(owner).items()
            if not name.startswith("_")
            and callable(getattr(owner, name))
            and set(parameters(getattr(owner, name))) - {"self"}
        }
        assert {f"{owner.__name__}.{name}" for name in methods} <= set(NAMES), owner


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_is_one_line(name: str, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Accepted arguments would train a model; a run would score it first.
    monkeypatch.setattr(finetuning, "train_adapter", _refuse_to_train)
    monkeypatch.setattr(trial, "held_out_losses", _refuse_to_train)
    monkeypatch.setattr(runs, "score", _refuse_to_train)
    function, good = calls(made)[name]
    with suppress(_Trained):  # the other arguments are right, so that the wrong one is what is refused
        if name not in FOR_OTHER_MODELS:
            function(**good)
    failures = []
    for parameter in parameters(function):
        for value in WRONG:
            if parameter == "forward" and callable(value):
                continue  # a function of the user, which may raise anything
            try:
                function(**{**good, parameter: value})
            except (InputError, SetupError) as error:
                if "\n" in str(error) or not str(error):
                    failures.append(f"{parameter}={value!r}: not one line: {error}")
            except _Trained:
                pass
            except Exception as error:
                failures.append(f"{parameter}={value!r}: {type(error).__name__}: {str(error)[:100]}")
            shutil.rmtree("run", ignore_errors=True)
    assert not failures, f"{len(failures)} of {name}:\n" + "\n".join(failures)
    assert not [path for path in os.listdir() if path not in ("x", "6GiB")]


class _Trained(Exception):
    """The arguments were accepted."""


def _refuse_to_train(*_: object, **__: object) -> None:
    raise _Trained
