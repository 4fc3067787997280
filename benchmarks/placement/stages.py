"""The stages that need a model, each resumable: what is in the journal or on disk is not done again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement import corpus, features, full, placements, pretrain, search, selectors, stability
from benchmarks.placement.encode import Encoded, encode
from benchmarks.placement.grid import Grid, rows_of
from benchmarks.placement.journal import Deadline, Journal, Record
from benchmarks.placement.models import type_means
from benchmarks.placement.placements import Placement
from benchmarks.placement.settings import Settings
from benchmarks.placement.train import frozen_copy

_SCORE_SECONDS = 60.0  # the scores of a model, at most
_STABILITY_SECONDS = 90.0  # of a model, at most
_EVA_BATCH = 16
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
    examples = {task: data[task]["train"].first(work.settings.scored).trimmed() for task in tasks}
    for name in models:
        read = partial(work.journal.read, model=name)
        scored = [task for task in tasks if not read("features", data=task)]
        asked = [task for task in tasks if not read("selection", task=task)]
        general = not read("features", data=_TEXT, checkpoint=1.0)
        if not (scored or asked or general):
            continue
        if not work.deadline.allows(_SCORE_SECONDS):
            return False
        started = time.monotonic()
        base = work.base(name)
        if general:
            _score_model(work, name, base)
        if scored:
            early = features.early_features(base, {task: data[task] for task in scored}, work.settings, work.device)
            for task in scored:
                _put(work, name, task, {**_forward_features(base, examples[task]), **early[task]})
        for task in asked:
            batches = examples[task].batches(_EVA_BATCH)
            ranks, starts = selectors.eva(base, batches, work.settings.rank, work.settings.scale)
            torch.save(starts, work.weights(name) / f"eva-{task}.pt")
            work.record("selection", model=name, task=task, placement="modules:eva", ranks=ranks)
        print(f"{name}: scores in {time.monotonic() - started:.1f} s")
    return True


def make_grid(
    work: Workspace, models: Sequence[str], tasks: Sequence[str], protocols: Sequence[str], only: Sequence[str]
) -> bool:
    """Finetune every placement, one task after the other: programs are as long as the task."""
    for name in models:
        model = frozen_copy(work.base(name), work.device)
        for task in tasks:
            chosen = placements_of(work, name, model, task, only)
            rows = rows_of(model, task, chosen, protocols, work.settings)
            starts = dict[tuple[str, str], Mapping[str, Tensor]]()
            if any(placement.ranks for placement in chosen):
                stored = torch.load(work.weights(name) / f"eva-{task}.pt", map_location=work.device)
                starts[task, "modules:eva"] = stored
            grid = Grid(name, model, work.data([task]), rows, starts, work.settings, work.journal)
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


def make_stability(work: Workspace, models: Sequence[str], tasks: Sequence[str]) -> bool:
    """Score the models under other samples, lengths, forms and after finetuning."""
    tokens = torch.from_numpy(corpus.load(work.corpus, "validation").astype("int64")).to(work.device)
    tokenizer, data = corpus.load_tokenizer(work.corpus), work.data(tasks)
    for name in models:
        if work.journal.read("stability", model=name):
            continue
        if not work.deadline.allows(_STABILITY_SECONDS):
            return False
        started = time.monotonic()
        base = work.base(name)
        parts = [stability.of_text(base, tokens, work.settings)]
        parts += [stability.of_task(base, task, tokenizer, data[task], work.settings) for task in tasks]
        parts += [stability.of_finetuned(base, data, work.settings, work.device)]
        work.journal.append(
            [
                {
                    "kind": "stability",
                    "model": name,
                    "data": of,
                    "condition": condition,
                    "nfn": {each: float(f"{value:.6g}") for each, value in nfn.items()},
                    "environment": work.environment,
                }
                for of, condition, nfn in itertools.chain.from_iterable(parts)
            ]
        )
        print(f"{name}: stability in {time.monotonic() - started:.1f} s")
    return True


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
            settings = work.settings
            while runs := search.wanted(settings.full_rates, settings.search_seeds, settings.seeds, done):
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


def _score_model(work: Workspace, name: str, base: nn.Module) -> None:
    """What does not depend on the task: weights, KappaTune, and ordinary text at every checkpoint."""
    tokens = torch.from_numpy(corpus.load(work.corpus, "validation").astype("int64")).to(work.device)
    text = features.text_examples(tokens, work.settings)
    _put(work, name, "weights", features.weight_features(base))
    work.record("selection", model=name, placement="modules:kappatune", modules=selectors.kappatune(base))
    for fraction in work.settings.checkpoints:
        if fraction < 1:
            _put(work, name, _TEXT, features.nfn_features(work.base(name, fraction), text), fraction)
    _put(work, name, _TEXT, _forward_features(base, text))


def _forward_features(base: nn.Module, examples: Encoded) -> features.Features:
    return {
        **features.nfn_features(base, examples),
        **features.input_features(base, examples),
        **features.gradient_features(base, examples),
    }


def _put(work: Workspace, name: str, data: str, found: features.Features, fraction: float = 1.0) -> None:
    """Add features to the journal, each as a list in the order of the modules."""
    modules = list(next(iter(found.values())))
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
