"""Choosing modules from scores, and PEFT wrapping exactly these."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import plop_ext
from plop_ext import InputError, Placement, Scores
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import STRATEGIES
from plop_ext.placement.evidence import Evidence
from plop_ext.placement.fingerprint import Fingerprint
from tests.support import gain_tables, tiny_models
from tests.support.architectures import ARCHITECTURES
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

# Each type's NFN in layers 0 and 1; the means are 1.0, 0.65, 1.1 and 1.6.
NFN = {"q_proj": (0.4, 1.6), "v_proj": (0.6, 0.7), "up_proj": (1.2, 1.0), "down_proj": (3.0, 0.2)}
RANKED = ("v_proj", "q_proj", "up_proj", "down_proj")
MODULES_RANKED = ("1.down", "0.q", "0.v", "1.v", "1.up", "0.up", "1.q", "0.down")


def scores() -> Scores:
    """One token per module, whose gain is the NFN above."""
    modules, gains = [], []
    for layer in range(2):
        for name, values in NFN.items():
            part = "self_attn" if name in ("q_proj", "v_proj") else "mlp"
            shape = (8, 4) if name == "v_proj" else (8, 8)
            modules.append(scored_module(f"layers.{layer}.{part}.{name}", name, layer, *shape, 1.0, 1.0))
            gains.append([values[layer]])
    provenance = {"settings": {"compat": None}, "model": {"class": "Made"}}
    totals = make_totals(len(modules), 1, sum_gain=gains, sum_gain_sq=np.square(gains), tokens=1)
    return Scores(tuple(modules), totals, np.array([0]), np.array([0]), (), provenance)


def short(placement: Placement) -> set[str]:
    """The chosen modules as in `MODULES_RANKED`."""
    parts = [name.split(".") for name in placement.modules]
    return {f"{layer}.{leaf.removesuffix('_proj')}" for _, layer, _, leaf in parts}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["lowest", "inverse"])
def test_lowest_and_highest_types(strategy: str, count: int) -> None:
    placement = scores().place(types=count, strategy=strategy)
    ranked = RANKED if strategy == "lowest" else RANKED[::-1]
    assert placement.types == ranked[:count]
    assert placement.modules == tuple(m.name for m in scores().modules if m.type in ranked[:count])
    assert placement.label == f"{strategy}-{count}" and placement.strategy == strategy and placement.model == "Made"


def test_the_default_is_the_three_lowest_types() -> None:
    assert scores().place() == scores().place(types=3) == scores().place(types=np.int64(3))


@pytest.mark.parametrize(
    "strategy, types",
    [("attention", {"q_proj", "v_proj"}), ("mlp", {"up_proj", "down_proj"}), ("all", set(NFN))],
)
def test_by_kind(strategy: str, types: set[str]) -> None:
    placement = scores().place(strategy=strategy)
    assert set(placement.types) == types and len(placement.modules) == 2 * len(types)
    assert placement.label == ("all-linear" if strategy == "all" else strategy)
    assert placement.strategy == strategy and placement.types == tuple(t for t in RANKED if t in types)


@pytest.mark.parametrize("what", [{"types": 2}, {"modules": 3}], ids=str)
def test_random_is_seeded_and_differs_between_seeds(what: dict[str, int]) -> None:
    drawn = [scores().place(strategy="random", seed=seed, **what) for seed in range(30)]
    assert drawn == [scores().place(strategy="random", seed=seed, **what) for seed in range(30)]
    assert len({placement.modules for placement in drawn}) > 4
    assert {name for placement in drawn for name in placement.modules} == set(scores().module_names)


@pytest.mark.parametrize("types", ["q_proj", ["down_proj", "q_proj"], ("v_proj",)])
def test_types_by_label(types: Any) -> None:
    placement = scores().place(types=types)
    labels = [types] if isinstance(types, str) else types
    assert set(placement.types) == set(labels) and placement.strategy == "types"
    assert placement.label == "+".join(labels)


@pytest.mark.parametrize("count, modules", [(1, 1), (3, 3), (8, 8), (np.int64(2), 2), (0.5, 4), (1.0, 8), (0.01, 1)])
def test_single_modules_by_count_and_fraction(count: Any, modules: int) -> None:
    placement, inverse = (scores().place(modules=count, strategy=strategy) for strategy in ("lowest", "inverse"))
    assert short(placement) == set(MODULES_RANKED[:modules])
    assert short(inverse) == set(MODULES_RANKED[-modules:])
    label = f"{count:.0%} of modules" if isinstance(count, float) else f"{modules} modules"
    assert (placement.label, inverse.label) == (label, f"inverse {label}")
    assert (placement.strategy, inverse.strategy) == ("lowest", "inverse")
    assert list(placement.modules) == [name for name in scores().module_names if name in placement.modules]


@pytest.mark.filterwarnings("ignore")
def test_of_single_modules_with_equal_scores_the_first_are_taken() -> None:
    halves = {(kind, layer): 0.5 for kind in range(4) for layer in range(0, 20, 2)}
    tied = gain_tables.scores(gain_tables.table([1.0] * 4, layers=20, sample_sd=0.0, changes=halves))
    assert set(tied.nfn) == {0.5, 1.0}
    assert tied.place(modules=15).modules == tied.module_names[:30:2]


def test_single_modules_by_threshold() -> None:
    placement = scores().place(max_nfn=0.7)
    assert short(placement) == set(MODULES_RANKED[:4])
    assert placement.label == "nfn<=0.7" and placement.strategy == "modules"
    assert scores().place(max_nfn=0.123456789 + 1).label == "nfn<=1.12346"
    assert placement.types == ("v_proj", "q_proj", "down_proj")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "best"}, "`strategy` must be one of lowest, inverse, attention, mlp, all, random, got 'best'"),
        ({"types": 2, "modules": 2}, "`types` and `modules` exclude each other; give one"),
        ({"modules": 2, "max_nfn": 1.0}, "`modules` and `max_nfn` exclude each other; give one"),
        ({"types": 2, "strategy": "all"}, '`types` has no meaning with strategy="all"; leave one of the two out'),
        ({"types": 5}, "`types` must be between 1 and 4, the number of module types, got 5"),
        ({"types": 0}, "`types` must be between 1 and 4, the number of module types, got 0"),
        ({"types": 2.5}, "`types` must be a number, 'auto' or names of types, got 2.5"),
        ({"types": True}, "`types` must be between 1 and 4, the number of module types, got True"),
        ({"types": []}, "`types` is empty; name some of down_proj, q_proj, up_proj, v_proj"),
        ({"types": ["k_proj"]}, "`types`: there is no type `k_proj`; there are down_proj, q_proj, up_proj, v_proj"),
        (
            {"types": ["q_proj"], "strategy": "inverse"},
            '`types` names the types, so strategy="inverse" has no effect; leave `strategy` out',
        ),
        ({"modules": 9}, "`modules` must be between 1 and 8, the number of scored modules, got 9"),
        ({"modules": 0}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got 0"),
        ({"modules": 1.5}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got 1.5"),
        ({"modules": 0.0}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got 0.0"),
        ({"modules": True}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got True"),
        ({"modules": "x3"}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got 'x3'"),
        ({"ranks": "equal"}, "`ranks` must be one of None, inverse-nfn, got 'equal'"),
        ({"max_nfn": 0.1}, "`max_nfn`=0.1 selects no module; the lowest NFN is 0.2"),
        (
            {"max_nfn": 1.0, "strategy": "inverse"},
            '`max_nfn` is a threshold, so strategy="inverse" has no effect; leave `strategy` out',
        ),
        (
            {"types": "auto", "strategy": "random"},
            '`types`="auto" looks for the lowest types; strategy="random" needs a number',
        ),
    ],
    ids=str,
)
def test_what_cannot_be_chosen(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        scores().place(**arguments)
    assert str(caught.value) == message


def test_a_kind_that_the_model_does_not_have() -> None:
    plain = plop_ext.score(tiny_models.Plain(), [torch.randn(2, 20, 16)], progress=False)
    with pytest.raises(InputError) as caught:
        plain.place(strategy="attention")
    assert str(caught.value) == (
        'strategy="attention" selects nothing: no module type is recognized as attention; name the types '
        f"({', '.join(sorted(plain.types))})"
    )
    assert len(plain.types) > 1


def test_parameters_and_the_rank_that_fits_them() -> None:
    placement = scores().place(types=["q_proj", "v_proj"])
    assert placement.num_parameters(1) == 2 * (8 + 8) + 2 * (8 + 4) == 56
    assert [placement.rank_for(allowed) for allowed in (56, 111, 112, 1000)] == [1, 1, 2, 17]
    message = r"`max_params`=55 is too small for `q_proj\+v_proj`: rank 1 has 56 parameters; raise `max_params`"
    with pytest.raises(InputError, match=message):
        placement.rank_for(55)
    with pytest.raises(InputError, match="`r` must be at least 1, got 0"):
        placement.num_parameters(0)


MODELS = {name: tiny_models.TEXT_MODELS[name] for name in ("llama", "bert", "gemma3", "qwen2")}


@pytest.fixture(scope="module")
def scored() -> dict[str, Scores]:
    batch = tiny_models.token_batch([20, 31])
    return {name: plop_ext.score(make(), [batch], progress=False) for name, make in MODELS.items()}


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


CHOICES: list[dict[str, Any]] = [
    *({"types": count} for count in (1, 2, 3)),
    *({"strategy": strategy} for strategy in STRATEGIES if strategy not in ("lowest", "inverse")),
    {"strategy": "inverse", "types": 3},
    {"modules": 1},
    {"modules": 0.4},
]


@pytest.mark.filterwarnings("ignore:no signal")
@pytest.mark.parametrize("name", MODELS)
def test_peft_wraps_exactly_the_chosen_modules(name: str, scored: dict[str, Scores]) -> None:
    for choice in CHOICES:
        placement = scored[name].place(**choice)
        model = peft.get_peft_model(MODELS[name](), placement.lora_config(r=2, lora_alpha=4))
        assert adapted(model) == [f"base_model.model.{module}" for module in placement.modules], choice
        placement.verify(model)
        trainable = sum(p.numel() for key, p in model.named_parameters() if p.requires_grad and "lora_" in key)
        assert trainable == placement.num_parameters(2)


@pytest.mark.parametrize("label", ["output.dense", "attention.output.dense", "intermediate.dense"])
def test_bert_types_that_are_suffixes_of_each_other(label: str, scored: dict[str, Scores]) -> None:
    placement = scored["bert"].place(types=[label])
    model = peft.get_peft_model(tiny_models.bert(), placement.lora_config())
    assert adapted(model) == [f"base_model.model.bert.encoder.layer.{layer}.{label}" for layer in range(2)]


def test_verify_catches_another_wrap(scored: dict[str, Scores]) -> None:
    placement = scored["bert"].place(types=["output.dense"])
    by_suffix = peft.get_peft_model(tiny_models.bert(), peft.LoraConfig(target_modules=["output.dense"]))
    with pytest.raises(InputError, match=r"0 chosen modules without LoRA and 2 others .*attention\.output\.dense"):
        placement.verify(by_suffix)
    other = peft.get_peft_model(tiny_models.bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(InputError, match="2 chosen modules without LoRA and 2 others with it"):
        placement.verify(other)
    with pytest.raises(InputError, match="2 chosen modules without LoRA and 0 others with it"):
        placement.verify(tiny_models.bert())


@pytest.mark.filterwarnings("ignore:no signal")
def test_check_model(scored: dict[str, Scores]) -> None:
    placement = scored["llama"].place(types=3)
    placement.check_model(tiny_models.llama())
    with pytest.raises(InputError, match=r"wants `model.* but BertForSequenceClassification has no such module"):
        placement.check_model(tiny_models.bert())
    with pytest.raises(InputError, match=r"\(32 x 48\), but LlamaForCausalLM has 32 x 64 there; score this model"):
        scored["llama"].place(types="up_proj").check_model(tiny_models.llama(intermediate_size=64))


@pytest.mark.filterwarnings("ignore:no signal")
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, ARCHITECTURES["phi3"].build])
def test_check_model_tells_checkpoints_of_one_shape_apart(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    everything = plop_ext.score(build(), [tiny_models.token_batch([20, 31])], progress=False)
    everything.place(strategy="all").save(tmp_path / "placement.json")
    placement = Placement.load(tmp_path / "placement.json")
    assert set(placement.fingerprints) == {target.name for target in placement.lora_targets}
    placement.check_model(build())
    placement.check_model(build().bfloat16())
    other = build()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(7))
    with pytest.raises(InputError, match=r"was made for other weights: .* score this model and place again"):
        placement.check_model(other)


@pytest.mark.filterwarnings("ignore:no signal")
def test_lora_config_takes_pefts_fields_but_no_other_target(scored: dict[str, Scores]) -> None:
    placement = scored["llama"].place(types=1)
    config = placement.lora_config(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 8, 0.1, "CAUSAL_LM")
    with pytest.raises(InputError, match="`target_modules` comes from the placement; leave it out"):
        placement.lora_config(target_modules=["q_proj"])


@pytest.mark.filterwarnings("ignore:no signal")
def test_find_plop_target_modules_are_keywords_of_lora_config(scored: dict[str, Scores]) -> None:
    model = tiny_models.llama()
    batch = tiny_models.token_batch([20, 31])
    targets = plop_ext.find_plop_target_modules(model, [batch], types=2, progress=False)
    assert targets == {"target_modules": list(scored["llama"].place(types=2).modules), "target_parameters": None}
    scored["llama"].place(types=2).verify(peft.get_peft_model(model, peft.LoraConfig(r=2, **targets)))


@pytest.mark.parametrize(
    ("types", "most", "kwargs"),
    [(8, 7, {}), (3, 1, {"include": "q_proj"}), (7, 6, {"exclude": "o_proj"})],
)
def test_more_types_than_there_are_is_one_error_before_any_forward(types: int, most: int, kwargs: Any) -> None:
    """The message is that of `place`: with the call, the scores of a long run would be lost."""

    def never(*args: Any) -> None:
        raise AssertionError("a forward")

    batches = [tiny_models.token_batch([9])]
    with pytest.raises(InputError, match=f"`types` must be between 1 and {most}, .* got {types}"):
        plop_ext.find_plop_target_modules(tiny_models.llama(), batches, types=types, forward=never, **kwargs)


def test_every_field_is_kept_in_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    target = LoraTarget("a", True, 12, (8, 4), "odd")
    given = (
        "types",
        "a label",
        "Model",
        (target,),
        {"a": Fingerprint("linear", 1.5)},
        ("a note",),
        4,
        {"a": 2},
        "why",
        Evidence("a hash", None, "of data", 8, 100, {"t": 0.5}, ("a doubt",)),
        (LoraTarget.of_module("c", 8, 4),),
        ("lm_head",),
    )
    placement = Placement(("a", "b"), ("t",), *given)
    placement.save(path)
    assert Placement.load(path) == placement
    content = {"format": "plop_ext.placement", "version": 4, **dataclasses.asdict(placement)}
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    lines = path.read_text().splitlines()
    assert lines[:3] == ["{", ' "format": "plop_ext.placement",', ' "version": 4,'] and lines[-1] == "}"
    assert lines.index(' "lora_targets": [') + 2 == lines.index(" ],")  # a target on each line


EVIDENCE: list[dict[str, Any]] = [
    {"surplus": 1},
    *({name: 1.5} for name in ("scores_hash", "data", "data_hash", "samples", "tokens", "nfn", "doubts")),
    *({"nfn": {"q_proj": value}} for value in (None, "1", float("nan"))),
    {"doubts": [1]},
    {"samples": 0},
]


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    scores().place(types=2).save(path)
    content = json.loads(path.read_text())
    for version in (2, 99):  # of before evidence was kept, and of a later package
        path.write_text(json.dumps({**content, "version": version}))
        match = rf"has version {version} of plop_ext.placement, .* write it again with `plop place`"
        with pytest.raises(InputError, match=match):
            Placement.load(path)
    scores().save(path, overwrite=True)
    with pytest.raises(InputError, match=r"is not a plop_ext.placement file but plop_ext.scores; .*`plop place`"):
        Placement.load(path)
    target, fingerprint = content["lora_targets"][0], {"kind": "linear", "norm": 1.0}
    for changes in (
        *({"fingerprints": {"a": {**fingerprint, "norm": norm}}} for norm in ("x", float("nan"), None)),
        {"fingerprints": {"a": 1.0}},
        {"fingerprints": [fingerprint]},
        *({"lora_targets": [{**target, "shape": shape}]} for shape in ([8], "88", [8, 0], None)),
        {"lora_targets": [{**target, "size": "8"}]},
        {"lora_targets": [3]},
        {"lora_targets": None},
        {"left_out": [{**target, "size": 0}]},
        {"unscored": 3},
        {"modules": 3},
        {"types": None},
        *({"r": rank} for rank in ("x", 0, -1, False, 1.5, None)),
        {"ranks": [1]},
        {"ranks": {"a": "x"}},
        {"evidence": 3},
        *({"evidence": {**content["evidence"], **change}} for change in EVIDENCE),
    ):
        refuse_damaged(path, {**content, **changes})
    for missing in set(content) - {"format", "version"}:
        refuse_damaged(path, {name: value for name, value in content.items() if name != missing})
    no_number = {"fingerprints": {"a": {**fingerprint, "norm": float("nan")}}}
    assert str(refuse_damaged(path, {**content, **no_number}).__cause__) == "no weight norm: nan"


def refuse_damaged(path: Path, content: dict[str, Any]) -> InputError:
    """The error of a placement that says it is damaged."""
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        Placement.load(path)
    assert str(caught.value) == f"`{path}` is a damaged placement; write it again with `plop place`"
    return caught.value
