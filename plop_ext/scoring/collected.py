"""`scores_from`: the scores of forwards that ran elsewhere, under a `Collector`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from plop_ext.arguments import check_type
from plop_ext.collecting.collector import Collector
from plop_ext.errors import InputError
from plop_ext.forwards.batch import input_device
from plop_ext.layers import Discovery, base_model
from plop_ext.preserve import evaluating
from plop_ext.provenance import describe_model
from plop_ext.score_data.settings import Settings
from plop_ext.scores import Scores
from plop_ext.scoring.assemble import assemble
from plop_ext.scoring.baseline import WeightNorms, compute_baselines, frobenius_norms
from plop_ext.scoring.describe import check_data_info, describe_run
from plop_ext.scoring.outcome import Outcome
from plop_ext.scoring.warn_about import warn_about
from plop_ext.totals import Totals


@dataclass(frozen=True)
class Weights:
    """What scores need of the weights: ||W||_F and the gain on random inputs of each layer."""

    norms: WeightNorms
    baselines: list[float]

    @classmethod
    def of(cls, model: nn.Module, found: Discovery, settings: Settings) -> Weights:
        """Read the weights of `model` once; its training modes are restored."""
        with evaluating(model):
            norms = frobenius_norms(found.layers)
            return cls(norms, compute_baselines(found.layers, norms, settings))


def scores_from(
    collector: Collector,
    *,
    mask: str = "attention",
    token_step: int = 1,
    data_name: str | None = None,
    data_info: Mapping[str, Any] | None = None,
) -> Scores:
    """Make scores of the forwards that `collector` has recorded, for instance those of a training loop of your own.

    The weights are read when this is called. Samples are numbered from 0. Waits for the device. The collector may be
    inside or outside of its context, and may record further forwards afterwards.

    Args:
        collector: A collector with at least one closed batch.
        mask: Tokens that counted, for the provenance: `"attention"`, `"completion"` or `"all"`.
        token_step: The `step` of the batches, for the provenance.
        data_name: Name of the data for the provenance.
        data_info: Further facts about the data for the provenance, as plain JSON values.

    Raises:
        InputError: If no batch was closed, no token counted, or no module can be scored.

    Example:
        >>> with Collector(model, discover(model).layers) as collector:
        ...     for batch in dataloader:
        ...         collector.begin(len(batch["input_ids"]), batch["attention_mask"])
        ...         model(**batch).loss.backward()
        ...         collector.end()
        >>> placement = plop_ext.scores_from(collector).place(types=3)
    """
    check_type(Collector, "a Collector", collector=collector)
    check_type((str, type(None)), "a name, or None", data_name=data_name)
    settings = settings_of(mask, token_step)
    data = {**check_data_info(data_info), "name": data_name, "hash": None}
    tables = [Totals(table.numpy()) for table in collector.recording.queue.each()]
    if not tables:
        raise InputError("`collector` holds no batch; close at least one with `end()`")
    found = Discovery(collector.layers, ())
    weights = Weights.of(collector.model, found, settings)
    return make_scores(collector, found, tables, weights, settings, data, time.perf_counter())


def settings_of(mask: str, token_step: int, **others: Any) -> Settings:
    """Return the settings of a run without probes, whose extent someone else decides."""
    options: dict[str, Any] = {"include": None, "exclude": (), "scope": "language", "seed": 0} | others
    return Settings(mask=mask, token_step=token_step, baseline="frobenius", probes=1, max_samples=None, **options)


def make_scores(
    collector: Collector,
    found: Discovery,
    tables: Sequence[Totals],
    weights: Weights,
    settings: Settings,
    data: Mapping[str, Any],
    started: float,
    *,
    first: int = 0,
    **provenance: Any,
) -> Scores:
    """Make the scores of some batches of `collector`.

    Args:
        collector: The collector, whose layers are those of `found`.
        found: The layers, and the modules without a score.
        tables: Totals of each batch, at least one.
        weights: Norms and baselines of the layers.
        settings: Settings of the run.
        data: `name` and `hash` of the data, and further facts.
        started: Start of the run, by `time.perf_counter`.
        first: Id of the first sample.
        **provenance: Further entries of the provenance.
    """
    totals = Totals.join_samples(tables)
    outcome = Outcome(
        totals=totals,
        norms=weights.norms,
        baselines=weights.baselines,
        ids=range(first, first + totals.values.shape[1]),
        batches=[number for number, table in enumerate(tables) for _ in range(table.values.shape[1])],
        unassigned=collector.unassigned,
        experts_implementation=collector.experts_implementation,
    )
    model = collector.model
    described = describe_run(describe_model(base_model(model)), data, settings, outcome, input_device(model), started)
    scores = assemble(found, outcome, described | {"fast": None, "graph": None} | provenance)
    warn_about(scores, outcome)
    return scores
