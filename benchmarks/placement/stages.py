"""The stages that need a model, each resumable: what is in the journal or on disk is not done again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement import corpus, features, full, placements, pretrain, search, selectors
from benchmarks.placement.encode import Encoded, encode
from benchmarks.placement.grid import Grid, rows_of
from benchmarks.placement.journal import Deadline, Journal, Record
from benchmarks.placement.models import TYPES, linear_modules, type_of
from benchmarks.placement.placements import Placement
from benchmarks.placement.settings import Settings
from benchmarks.placement.train import frozen_copy

_FULL_SECONDS = 15.0  # a run of full finetuning, at most
_TEXT = "text"  # what scores of ordinary text are filed under


@dataclass(frozen=True)
class Workspace:
    """Where a run keeps its files, and what it was told.

    Attributes:
        folder: Holds corpus, weights and journal.
        settings: Sizes.
        device: Where it computes.
        deadline: When to stop.
        environment: Number of the record of hardware and versions.
    """

    folder: Path
    settings: Settings
    device: torch.device
    deadline: Deadline
    environment: int

    @property
    def journal(self) -> Journal:
        """What has been done."""
        return Journal(self.folder / "journal.jsonl")

    @property
    def corpus(self) -> Path:
        """Folder of tokens and tokenizer."""
        return self.folder / "corpus"

    def weights(self, name: str) -> Path:
        """Folder of a model's checkpoints."""
        return self.folder / "weights" / name

    def base(self, name: str, fraction: float = 1.0) -> nn.Module:
        """A pretrained model on the device, in float32."""
        shape = self.settings.models[name]
        return pretrain.load(shape, self.weights(name), self.settings, fraction).to(self.device)

    def data(self, tasks: Sequence[str]) -> dict[str, dict[str, Encoded]]:
        """Task -> split -> examples, on the device."""
        tokenizer = corpus.load_tokenizer(self.corpus)
        return {
            task: {split: part.to(self.device) for split, part in encode(task, tokenizer, self.settings).items()}
            for task in tasks
        }

    def record(self, kind: str, **fields: Any) -> None:
        """Add one record to the journal."""
        self.journal.append([{"kind": kind, **fields, "environment": self.environment}])


def make_corpus(work: Workspace) -> bool:
    """Read, deduplicate and tokenize the text."""
    if not work.journal.read("corpus"):
        work.record("corpus", **corpus.build(work.corpus, work.settings))
    print(work.journal.read("corpus")[-1])
    return True


def make_models(work: Workspace, models: Sequence[str]) -> bool:
    """Pretrain the models that have no final weights."""
    train, validation = (corpus.load(work.corpus, split) for split in ("train", "validation"))
    for name in models:
        if (work.weights(name) / "1.pt").exists():
            continue
        shape = work.settings.models[name]
        found = pretrain.pretrain(
            shape, train, validation, work.weights(name), work.settings, work.device, work.deadline
        )
        if found is None:
            return False
        work.record("pretraining", model=name, shape=asdict(shape), **found)
        print(f"{name}: {found}")
    return True


def make_scores(work: Workspace, models: Sequence[str], tasks: Sequence[str]) -> bool:
    """Take every candidate score, and ask PEFT's selectors."""
    data = work.data(tasks)
    text = torch.from_numpy(corpus.load(work.corpus, "validation").astype("int64")).to(work.device)
    for name in models:
        missing = [task for task in tasks if not work.journal.read("features", model=name, data=task)]
        if not missing:
            continue
        if not work.deadline.allows(60):
            return False
        started = time.monotonic()
        base = work.base(name)
        put = partial(_put, work, name, list(linear_modules(base)))
        examples = {task: _scored(data[task]["train"], work.settings) for task in missing}
        if not work.journal.read("features", model=name, data=_TEXT, checkpoint=1.0):
            examples[_TEXT] = features.text_examples(text, work.settings)
            put("weights", features.weight_features(base))
            work.record("selection", model=name, placement="modules:kappatune", modules=selectors.kappatune(base))
            for fraction in work.settings.checkpoints:
                if fraction < 1:
                    nfn = features.nfn_features(work.base(name, fraction), examples[_TEXT])["nfn"]
                    put(_TEXT, {"nfn": nfn}, fraction)
        early = features.early_features(base, {task: data[task] for task in missing}, work.settings, work.device)
        for data_name, part in examples.items():
            put(
                data_name,
                {
                    **features.nfn_features(base, part),
                    **features.input_features(base, part),
                    **features.gradient_features(base, part),
                    **early.get(data_name, {}),
                },
            )
        for task in missing:
            ranks, starts = selectors.eva(base, examples[task].batches(16), work.settings.rank, work.settings.scale)
            torch.save(starts, work.weights(name) / f"eva-{task}.pt")
            work.record("selection", model=name, task=task, placement="modules:eva", ranks=ranks)
        print(f"{name}: scores of {', '.join(examples)} in {time.monotonic() - started:.1f} s")
    return True


def make_grid(
    work: Workspace, models: Sequence[str], tasks: Sequence[str], protocols: Sequence[str], only: Sequence[str]
) -> bool:
    """Finetune every placement."""
    data = work.data(tasks)
    for name in models:
        model = frozen_copy(work.base(name), work.device)
        rows, starts = [], dict[tuple[str, str], Mapping[str, Tensor]]()
        for task in tasks:
            chosen = placements_of(work, name, model, task, only)
            rows += rows_of(model, task, chosen, protocols, work.settings)
            if any(placement.ranks for placement in chosen):
                stored = torch.load(work.weights(name) / f"eva-{task}.pt", map_location=work.device)
                starts[task, "modules:eva"] = stored
        grid = Grid(name, model, data, rows, starts, work.settings, work.journal)
        if not grid.run(work.deadline, work.environment):
            return False
    return True


def placements_of(
    work: Workspace, name: str, model: nn.Module, task: str, only: Sequence[str] = ()
) -> list[Placement]:
    """The placements of a model on a task, each set of modules once; `only` names some of them, `triples` all 35."""
    found = placements.fixed(model)
    if work.settings.models[name].tokens > work.settings.small_tokens:
        kept = {*placements.larger_subset(model), *(key for key in found if key.count("+") != 2)}
        found = {key: placement for key, placement in found.items() if key in kept}
    scores = work.journal.read("features", model=name, data=task)
    if scores:
        nfn = dict(zip(scores[-1]["modules"], scores[-1]["values"]["nfn"], strict=True))
        for placement in placements.of_scores(model, nfn, type_means(nfn)).values():
            found.setdefault(placement.key, placement)
        for placement in _selected(work, name, model, task):
            found.setdefault(placement.key, placement)
    if only:
        found = {
            key: each for key, each in found.items() if key in only or ("triples" in only and key.count("+") == 2)
        }
    return list(found.values())


def type_means(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of a module's score over the modules of each type."""
    groups: dict[str, list[float]] = {each: [] for each in TYPES}
    for module, value in values.items():
        groups[type_of(module)].append(value)
    return {each: sum(group) / len(group) for each, group in groups.items()}


def make_full(work: Workspace, models: Sequence[str], tasks: Sequence[str]) -> bool:
    """Finetune all parameters, at rates and seeds chosen as for the placements."""
    data = work.data(tasks)
    for name in models:
        base = work.base(name)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        for task in tasks:
            fields: Record = {"model": name, "task": task, "protocol": "full", "placement": "full"}
            done = {
                (record["rate"], record["seed"]): record["validation_loss"]
                for record in work.journal.read("run", **fields)
            }
            while runs := search.wanted(work.settings.full_rates, work.settings.seeds, done):
                if not work.deadline.allows(_FULL_SECONDS):
                    return False
                rate, seed = runs[0]
                started = time.monotonic()
                outcome = full.finetune(base, data[task], rate, seed, work.settings, work.device)
                done[rate, seed] = outcome.validation_loss
                work.record(
                    "run", **fields, rate=rate, seed=seed, **asdict(outcome), parameters=parameters, capped=False
                )
                print(f"{name}: full finetuning on {task} in {time.monotonic() - started:.1f} s")
    return True


def _put(
    work: Workspace, name: str, modules: list[str], data: str, found: features.Features, fraction: float = 1.0
) -> None:
    values = features.rounded(found, modules)
    work.record("features", model=name, data=data, checkpoint=fraction, modules=modules, values=values)


def _selected(work: Workspace, name: str, model: nn.Module, task: str) -> list[Placement]:
    """What PEFT's selectors chose, where they were asked."""
    found = []
    for record in work.journal.read("selection", model=name):
        if "ranks" not in record:
            found.append(placements.of_modules(model, record["placement"], record["modules"]))
        elif record["task"] == task:
            ranks = {module: rank for module, rank in record["ranks"].items() if rank}
            found.append(Placement(record["placement"], tuple(ranks), ranks))
    return found


def _scored(examples: Encoded, settings: Settings) -> Encoded:
    """The first training examples, which the scores read."""
    return examples.first(settings.scored).trimmed()
