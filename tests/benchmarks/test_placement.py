"""The placement experiment runs stage by stage, goes on where it stopped, and its replicas train as PEFT does."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.placement import __main__ as command
from benchmarks.placement import analyse, corpus, evidence, experts, measures, publish, report, search, tasks
from benchmarks.placement.adam import schedule
from benchmarks.placement.encode import Encoded, encode
from benchmarks.placement.features import nfn_features, text_examples
from benchmarks.placement.journal import Deadline, Journal
from benchmarks.placement.models import MODELS, SMOKE_MODELS, TYPES, build, linear_modules
from benchmarks.placement.placements import fixed, larger_subset, of_types, ranked
from benchmarks.placement.replicas import initial_down
from benchmarks.placement.settings import SMOKE, Settings
from benchmarks.placement.train import Group, Slot, example_order
from plop_ext import reference

ONLY = "q_proj+k_proj+v_proj,gate_proj+up_proj+down_proj,q_proj,modules:eva,modules:kappatune," + "+".join(TYPES)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the smoke run of every stage has finished."""
    folder = tmp_path_factory.mktemp("placement")
    run(folder, "corpus", "pretrain", "score", "grid", "full", "stability", "publish", "analyse")
    return folder


def run(folder: Path, *stages: str, status: int = 0, extra: tuple[str, ...] = ()) -> None:
    for stage in stages:
        options = ["--smoke", "--device", "cpu", "--work", str(folder), "--results", str(folder / "results")]
        chosen = ["--models", "llama-smoke", "--tasks", "inline", "--only", ONLY]
        assert command.main([stage, *options, *chosen, *extra]) == status


def test_every_stage_runs_and_the_result_says_what_it_is(work: Path) -> None:
    result = json.loads((work / "results" / "llama-smoke.json").read_text())
    assert result["quick"] is True and result["model"] == "llama-smoke"
    assert {environment["gpu"] for environment in result["environments"]} == {None}
    assert all("benchmarks.placement" in environment["command"] for environment in result["environments"])
    assert str(work) not in json.dumps(result["environments"])
    column = result["columns"].index
    runs = {tuple(row[column(name)] for name in ("protocol", "placement", "rate", "seed")) for row in result["runs"]}
    assert len(runs) == len(result["runs"])
    found = {(protocol, placement) for protocol, placement, *_ in runs}
    assert ("full", "full") in found and ("one-rank", "q_proj") in found and ("matched", "modules:eva") in found
    assert ("one-rank", "+".join(TYPES)) not in found  # the same run as in the matched protocol


def test_padding_does_not_change_scores_and_other_forms_are_compared(work: Path) -> None:
    rows = json.loads((work / "results" / "analysis.json").read_text())["stability"]
    found = {(row["data"], row["condition"]): row for row in rows}
    assert found["inline", "padded to twice the length"]["largest_change"] < 1e-4
    assert found["inline", "padded to twice the length"]["tau"] == 1
    changed = ("chat template", "end of text in front", "answers only", "finetuned model", "other samples, 1")
    assert all(found["inline", condition]["largest_change"] > 1e-4 for condition in changed)
    assert {("text", "other samples, 1"), ("text", "16 tokens"), ("text", "end of text in front")} <= set(found)


def test_a_second_call_does_nothing_and_one_without_time_says_so(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Journal(work / "journal.jsonl")
    kinds = ("corpus", "pretraining", "features", "selection", "stability", "run")
    counts = [len(before.read(kind)) for kind in kinds]
    run(work, "corpus", "pretrain", "score", "grid", "full", "stability")
    assert [len(before.read(kind)) for kind in kinds] == counts
    run(
        work,
        "grid",
        status=command.OUT_OF_TIME,
        extra=("--budget-seconds", "0", "--tasks", "total", "--only", "q_proj"),
    )
    assert "out of time" in capsys.readouterr().out


def test_pretraining_that_was_stopped_ends_with_the_same_weights(work: Path, tmp_path: Path) -> None:
    from benchmarks.placement import pretrain

    shape = dataclasses.replace(SMOKE_MODELS["llama-smoke"], tokens=60 * SMOKE.context * SMOKE.pretrain_batch)
    train, validation = (corpus.load(work / "corpus", split) for split in ("train", "validation"))

    def go(folder: Path, deadline: Deadline) -> Any:
        return pretrain.pretrain(shape, train, validation, folder, SMOKE, torch.device("cpu"), deadline)

    class Once(Deadline):
        """Time for the first 50 steps."""

        asked = 0

        def allows(self, seconds: float) -> bool:
            self.asked += 1
            return self.asked == 1

    whole = go(tmp_path / "whole", Deadline(None))
    assert go(tmp_path / "parts", Once(None)) is None
    parts = go(tmp_path / "parts", Deadline(None))
    assert whole["weights_sha256"] == parts["weights_sha256"] and whole["losses"] == parts["losses"]


@pytest.mark.parametrize("name", ["llama-smoke", "qwen2-smoke", "qwen3-smoke", "moe-smoke"])
def test_replicas_train_as_peft_does(work: Path, name: str) -> None:
    settings = dataclasses.replace(SMOKE, steps=8, slots=3)
    data = encode("inline", corpus.load_tokenizer(work / "corpus"), settings)
    model = build(SMOKE_MODELS[name], settings.vocabulary).eval()
    attention = {name: 3 for name in of_types(model, TYPES[:3]).modules}
    everything = {name: 1 + index % 4 for index, name in enumerate(linear_modules(model))}
    slots = [
        Slot("inline", attention, 1e-2, 0),
        Slot("inline", everything, 3e-2, 1),
        Slot("inline", attention, 1e-3, 0),
    ]
    outcomes = Group(model, {"inline": data}, settings, slots=3, width=4, steps=settings.steps).run(slots)
    for slot, outcome in zip(slots, outcomes, strict=True):
        assert outcome.test_loss == pytest.approx(peft_loss(model, data, slot, settings), rel=2e-5)
    assert not any("base" in name for name, _ in model.named_modules())  # the model is restored


def peft_loss(model: nn.Module, data: dict[str, Encoded], slot: Slot, settings: Settings) -> float:
    """The test loss of PEFT's own LoRA after the same steps of torch's Adam."""
    import copy

    from peft import LoraConfig, get_peft_model

    ranks = {f"^{name}$".replace(".", r"\."): rank for name, rank in slot.ranks.items()}
    config = LoraConfig(
        r=1,
        target_modules=list(slot.ranks),
        rank_pattern=ranks,
        alpha_pattern={name: settings.scale * rank for name, rank in ranks.items()},
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    start = initial_down(model, 4, slot.seed)
    with torch.no_grad():
        for name, rank in slot.ranks.items():
            down = adapted.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
            assert down.shape[0] == rank
            down.copy_(start[name][:, :rank].t())
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=slot.rate)
    factors = schedule(settings.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(factors[min(step, len(factors) - 1)]))

    def loss(examples: Encoded, rows: torch.Tensor) -> torch.Tensor:
        batch = {name: value[rows] for name, value in examples.batches(len(examples.tokens))[0].items()}
        logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    for rows in example_order(len(data["train"].tokens), settings.steps, settings.batch, slot.seed):
        optimizer.zero_grad()
        loss(data["train"], rows).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return float(loss(data["test"], torch.arange(len(data["test"].tokens))))


def test_experts_of_their_own_compute_what_the_fused_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(64, (2, 9))
    unfused = build(SMOKE_MODELS["moe-smoke"], 64).eval()
    monkeypatch.setattr(experts, "unfuse", lambda model: None)
    fused = build(SMOKE_MODELS["moe-smoke"], 64).eval()
    assert len(linear_modules(unfused)) == 2 * (4 + 4 * 3) and len(linear_modules(fused)) == 2 * 4
    with torch.no_grad():
        torch.testing.assert_close(unfused(input_ids=tokens).logits, fused(input_ids=tokens).logits)


def test_an_expert_is_scored_on_the_tokens_routed_to_it() -> None:
    model = build(SMOKE_MODELS["moe-smoke"], 64).eval()
    tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    rows = text_examples(tokens.flatten(), dataclasses.replace(SMOKE, length=9, scored=3))
    name, seen = "model.layers.1.mlp.parts.2.down_proj", []
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    found = nfn_features(model, rows)["nfn"][name]
    routed = seen[0][(seen[0] != 0).any(1)].double()
    weight = linear.weight.detach().double()
    gains = (routed @ weight.t()).norm(dim=1) / routed.norm(dim=1)
    assert 0 < len(routed) < tokens.numel()
    assert found == pytest.approx(float(gains.mean()) / reference.mean_gain(weight), rel=1e-4)


@pytest.mark.parametrize("name", ["llama-base", "llama-gqa", "qwen2-bias", "qwen3-moe"])
def test_matched_ranks_have_the_parameters_of_all_linear_within_two_percent(name: str) -> None:
    with torch.device("meta"):
        model = build(dataclasses.replace(MODELS[name], layers=4), 64)
    settings = Settings()
    budget = ranked(model, of_types(model, TYPES), "one-rank", settings.rank).parameters
    capped = []
    for key, placement in fixed(model).items():
        found = ranked(model, placement, "matched", settings.rank)
        assert max(found.ranks.values()) <= settings.rank_bins[-1]
        if found.capped:
            capped.append(key)
        else:
            assert found.parameters == pytest.approx(budget, rel=0.02), key
        assert len(set(ranked(model, placement, "one-rank", settings.rank).ranks.values())) == 1
    assert set(capped) <= {"k_proj", "v_proj"}
    assert len([key for key in fixed(model) if key.count("+") == 2]) == 35
    assert len(set(larger_subset(model))) == 14


def test_the_search_widens_until_the_best_rate_is_inside_and_then_repeats_it() -> None:
    rates = (1.0, 2.0, 4.0)

    def steps(loss: Any, search_seeds: int = 1) -> dict[tuple[float, int], Any]:
        done: dict[tuple[float, int], Any] = {}
        while runs := search.wanted(rates, search_seeds, 3, done):
            done.update({(rate, seed): loss(rate, seed) for rate, seed in runs})
        return done

    inside = steps(lambda rate, seed: abs(math.log(rate / 2)))
    assert sorted(inside) == [(1.0, 0), (2.0, 0), (2.0, 1), (2.0, 2), (4.0, 0)] and not search.at_edge(inside, 1)
    low = steps(lambda rate, seed: abs(math.log(rate * 4)))
    assert search.chosen_rate(low, 1) == 0.25 and not search.at_edge(low, 1) and (0.125, 0) in low
    diverged = steps(lambda rate, seed: None if rate >= 1 else rate)
    assert search.chosen_rate(diverged, 1) < 1 and search.at_edge(diverged, 1)  # it gives up in the end
    lucky = steps(lambda rate, seed: 0.0 if (rate, seed) == (1.0, 0) else abs(math.log(rate / 2)), search_seeds=3)
    assert search.chosen_rate(lucky, 1) == 1.0 and search.chosen_rate(lucky, 3) == 2.0 and len(lucky) == 9


def test_tasks_are_the_same_everywhere_and_their_splits_share_nothing(work: Path) -> None:
    tokenizer = corpus.load_tokenizer(work / "corpus")
    for task in tasks.TASKS:
        first, again = (list(islice(tasks.examples(task), 50)) for _ in range(2))
        assert first == again and len({prompt for prompt, _ in first}) == 50
        splits = encode(task, tokenizer, SMOKE)
        rows = [tuple(row) for part in splits.values() for row in part.tokens.tolist()]
        assert len(rows) == len(set(rows))
        part = splits["test"]
        for row, labels, places in zip(part.tokens, part.labels, part.positions, strict=True):
            there = labels >= 0
            assert row[places[there] + 1].equal(labels[there])


def test_a_line_that_was_not_written_whole_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([{"kind": "run", "n": 1}])
    with journal.path.open("a") as file:
        file.write('{"kind": "run", "n"')
    journal.append([{"kind": "run", "n": 2}])
    assert [record["n"] for record in journal.read("run")] == [1, 2]


def test_ranks_share_ties_and_correlations_are_those_of_ranks() -> None:
    assert measures.ranks(np.array([3.0, 1.0, 0.1 + 0.2, 0.3])).tolist() == [3.0, 2.0, 0.5, 0.5]
    assert measures.spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0])) == pytest.approx(1)
    assert measures.spearman(np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0])) == 0
    assert measures.kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(1 / 3)


def test_a_rule_that_is_right_about_every_type_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=7)
    losses = -(measures.INCIDENCE @ truth)
    chance = rng.normal(size=(20, 7))
    alone, corrected = measures.permutation_p(np.vstack([truth, chance]), losses)
    assert alone[0] <= 2 / 5040 and corrected[0] < 0.01  # itself, and perhaps its negative
    assert (corrected >= alone).all() and 0.2 < alone[1:].mean() < 0.8


def test_the_triples_of_an_analysis_are_judged_against_size_and_all_linear(tmp_path: Path) -> None:
    """Two made-up models on which large types are better, and all of them best."""
    types = dict(zip(TYPES, range(1, 8), strict=True))
    rows = []
    for key in (*analyse.KEYS, evidence.ALL):
        size = sum(types[name] for name in key.split("+"))
        for rate, seed in ((1e-3, 0), (2e-3, 0), (4e-3, 0), (2e-3, 1), (2e-3, 2)):
            loss = 1 / size + abs(math.log(rate / 2e-3)) + 1e-4 * seed
            rows.append(["add", "matched", key, rate, seed, loss, 0.5, loss, 0.5, 100, False, 0])
    modules = [f"model.layers.{layer}.{name}" for layer in range(3) for name in TYPES]
    values = {name: [1.0 + 0.1 * index for index in range(21)] for name in feature_names()}
    values["weights"] = [float(types[name.rpartition(".")[2]]) for name in modules]
    shape = dataclasses.asdict(SMOKE_MODELS["llama-smoke"])
    content = {
        "quick": True,
        "settings": {"seeds": 3, "search_seeds": 1, "rates": [1e-3, 2e-3, 4e-3], "full_rates": [1e-3, 2e-3]},
        "pretraining": {"shape": shape},
        "features": [
            {"checkpoint": 1.0, "data": data, "modules": modules, "values": values}
            for data in ("weights", "text", "add")
        ],
        "selections": [],
        "stability": [],
        "columns": list(publish.COLUMNS),
        "runs": rows,
    }
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "model": name}))
    analyse.main(tmp_path)
    analysis = json.loads((tmp_path / "analysis.json").read_text())
    table, _ = analysis["tables"]
    assert [(left["model"], left["spearman"], left["spearman_size"]) for left in analysis["left_out"]] == [
        ("one", pytest.approx(1), pytest.approx(1)),
        ("two", pytest.approx(1), pytest.approx(1)),
    ]
    assert [each["spearman"] for each in analysis["transfer"]] == [pytest.approx(1)]
    size = table["rules"]["size"]
    assert table["triples"] == 35 and size["spearman"] == pytest.approx(1)
    assert size["choice"] == "gate_proj+up_proj+down_proj" and size["choice_place"] == 1
    assert size["above_best"] == [0, 0, 0] and size["above_all_linear"][0] == pytest.approx(1 / 18 - 1 / 28, rel=1e-3)
    assert table["placements"][evidence.ALL]["rate"] == 2e-3 and not table["placements"][evidence.ALL]["edge"]


def feature_names() -> list[str]:
    """Every feature that a rule reads, but the sizes that the analysis works out itself."""
    from benchmarks.placement.rules import RULES

    read = set()

    class Asked(dict[str, Any]):
        def __missing__(self, name: str) -> dict[str, float]:
            read.add(name)
            return {f"model.layers.{layer}.{each}": 1.0 for layer in range(3) for each in TYPES}

    for rule in RULES:
        rule.of_types(Asked())
    return sorted(read - {"out_features", "nfn_text"})


def test_a_result_with_one_protocol_only_is_read() -> None:
    found = evidence.Evidence(Path(report.__file__).parent / "results" / "calibration" / "llama-base.json")
    assert set(found.tables) == {(task, "one-rank") for task in ("inline", "record", "sort")}
    assert all(len(table) == 2 for table in found.tables.values())


def test_the_page_says_what_the_committed_results_say() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.updated(text, command.RESULTS) == text
