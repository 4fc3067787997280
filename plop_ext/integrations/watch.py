"""Scores of the forwards of a training, which run anyway."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from plop_ext._warnings import warn
from plop_ext.collecting.collector import Collector
from plop_ext.collecting.hooks import compiled_calls
from plop_ext.errors import InputError
from plop_ext.integrations.fields import small_on_host
from plop_ext.layers import Discovery, LinearLayer, ProductAdapter, discover, plain_class
from plop_ext.score_data.settings import Settings
from plop_ext.scores import Scores
from plop_ext.scoring.collected import Weights, make_scores
from plop_ext.streams.batch import StreamReader
from plop_ext.totals import Totals
from plop_ext.unscored import UnscoredModule

_ROUTED = "scoring it would change how the experts compute while they train; use `score_trainer` before training"
_OWN_FORWARD = "it has a forward of its own, which a training keeps; use `score_trainer` before training"


class TrainingWatch:
    """Scores a model in those of its training forwards that are due.

    A forward is scored if `due` is true and gradients are recorded, so that generation, reference models, evaluation
    and the repeated forwards of gradient checkpointing do not count. Outputs, gradients and random states are those of
    a training without the watch.

    Args:
        model: The model whose forward the training calls.
        settings: Which modules and tokens count.
        window: Number of the latest samples that `scores` covers, in whole batches.

    Attributes:
        due: Whether to score the next forward.
        batch: Fields of the batch that the trainer holds, for what the forward does not receive, or None.
        samples: Number of samples scored so far.

    Raises:
        InputError: If the model is compiled, or has no module that can be scored while it trains.
    """

    def __init__(self, model: nn.Module, settings: Settings, window: int) -> None:
        compiled = next((name for name, module in model.named_modules() if compiled_calls(module)), None)
        if compiled is not None or "_orig_mod" in model._modules:
            raise InputError(
                f"`{compiled or type(model).__name__}` is compiled, and compiled code runs no hooks; train without "
                "torch.compile, or use `score_trainer` before training"
            )
        found = discover(model, include=settings.include, exclude=settings.exclude, scope=settings.scope)
        self._found = _without_replaced(found)
        self._settings = settings
        self._window = window
        self._collector = Collector(model, self._found.layers)
        self._reader = StreamReader(model, settings.mask)
        self._phases = random.Random(settings.seed)
        self._weights = Weights.of(model, self._found, settings)
        weights = (weight for layer in self._found.layers for weight in layer.module.parameters(recurse=False))
        self._trained = any(weight.requires_grad for weight in weights)
        self._tables: deque[Totals] = deque()
        self._kept = 0
        self._gains = np.zeros((2, len(self._found.layers)))
        self._running = False
        self._started = time.perf_counter()
        self._stack = ExitStack()
        self.due = False
        self.batch: Mapping[str, Any] | None = None
        self.samples = 0

    @property
    def weight(self) -> str:
        """Which weight is scored, in a phrase."""
        return "W, which is trained" if self._trained else "W, not W + BA"

    def __enter__(self) -> TrainingWatch:
        """Attach the hooks; entering once more after an exit goes on with the same window."""
        with ExitStack() as stack:
            stack.enter_context(self._collector)
            model = self._collector.model
            stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(self._after).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *unused: object) -> None:
        try:
            self._take(wait=True)
        finally:
            self._stack.close()

    def scores(self, data: Mapping[str, Any], **training: Any) -> Scores:
        """Return the scores of the window; `training` describes the training in the provenance. Waits for the device.

        Raises:
            InputError: If nothing was scored yet.
        """
        self._take(wait=True)
        if not self._tables:
            raise InputError("no forward was scored yet; train at least one step that is due")
        self._read_trained_weights()
        return make_scores(
            self._collector,
            self._found,
            list(self._tables),
            self._weights,
            self._settings,
            data,
            self._started,
            first=self.samples - self._kept,
            training={"weight": self.weight, **training},
        )

    def drift(self) -> dict[str, float]:
        """Return the NFN of each type over the forwards since the last call; empty if there were none."""
        self._take(wait=True)
        gain, tokens = self._gains
        self._gains = np.zeros_like(self._gains)
        if not tokens.any():
            return {}
        self._read_trained_weights()
        with np.errstate(divide="ignore", invalid="ignore"):
            nfn = gain / tokens / np.array(self._weights.baselines)
        values: dict[str, list[float]] = {}
        for layer, value in zip(self._found.layers, nfn.tolist(), strict=True):
            if np.isfinite(value) and not layer.no_place and layer.name not in self._collector.unassigned:
                values.setdefault(layer.type, []).append(value)
        return {label: float(np.mean(each)) for label, each in values.items()}

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = False
        if not (self.due and model.training and torch.is_grad_enabled()):
            return
        try:
            streams = self._reader.read(small_on_host(self._fields(args, kwargs)))
        except InputError as error:
            if not self.samples:
                raise
            warn(f"a batch was not scored: {error}")
            return
        step = self._settings.token_step
        self._collector.announce(streams, step=step, phase=self._phases.randrange(step))
        self._running = True

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running:
            self._running = False
            self._collector.end()
            self._take(wait=False)

    def _fields(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the forward, with the labels that only the trainer's batch holds."""
        fields = dict(kwargs)
        if args and "input_ids" not in fields:
            fields["input_ids"] = args[0]
        labels = None if self.batch is None else self.batch.get("labels")
        ids = fields.get("input_ids")
        if fields.get("labels") is None and labels is not None and getattr(ids, "shape", None) == labels.shape:
            fields["labels"] = labels
        return fields

    def _take(self, *, wait: bool) -> None:
        """Move the totals of scored forwards from the queue to the window."""
        for table in self._collector.recording.queue.take(wait=wait):
            totals = Totals(table.numpy())
            self._tables.append(totals)
            size = totals.values.shape[1]
            self.samples += size
            self._kept += size
            self._gains += (totals.sum_gain.sum(axis=1), totals.tokens.sum(axis=1))
            while self._kept - self._tables[0].values.shape[1] >= self._window:
                self._kept -= self._tables.popleft().values.shape[1]

    def _read_trained_weights(self) -> None:
        if self._trained:
            self._weights = Weights.of(self._collector.model, self._found, self._settings)


def _without_replaced(found: Discovery) -> Discovery:
    """Return the layers that a collector only observes: it replaces the forwards of the others.

    Raises:
        InputError: If none is left.
    """
    kept: list[LinearLayer] = []
    unscored = list(found.unscored)
    for layer in found.layers:
        reason = _ROUTED if layer.adapter.routed else _OWN_FORWARD if isinstance(layer.adapter, ProductAdapter) else ""
        if reason:
            unscored.append(UnscoredModule(layer.name, plain_class(layer.module).__name__, reason))
        else:
            kept.append(layer)
    if not kept:
        raise InputError(f"no module can be scored while it trains; `{unscored[-1].name}`: {unscored[-1].reason}")
    return Discovery(tuple(kept), tuple(unscored), found.scope)
