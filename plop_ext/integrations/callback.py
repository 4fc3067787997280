"""`PlopCallback`: scores while a `Trainer` trains, on the batches that run anyway."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from plop_ext._warnings import warn
from plop_ext.arguments import check_type, check_whole
from plop_ext.errors import InputError
from plop_ext.integrations.drift import Drift
from plop_ext.integrations.fields import model_fields
from plop_ext.integrations.watch import TrainingWatch
from plop_ext.score_data.types import metric_names
from plop_ext.scores import Scores
from plop_ext.scoring.collected import settings_of


class PlopCallback(TrainerCallback):
    """Scores the model of a trainer of transformers or TRL in the forwards of its training.

    The losses are bitwise those of a training without it. The weight that is scored is W of each module: in a model
    with LoRA adapters not W + BA, so that a drift is that of the module's inputs. Whenever the trainer logs, the NFN
    of each type since the last log goes to the same trackers, as `plop/nfn/TYPE`. Each process of a distributed
    training scores its own batches.

    Args:
        trainer: The trainer, whose `model` is scored.
        every: Score in every `every`-th optimizer step, from the first on, in all of its micro-batches.
        token_step: Read every `token_step`-th position of a batch, as for `plop_ext.score`.
        mask: Tokens that count, as for `plop_ext.score`. `"completion"` counts those of the trainer's loss.
        window: Number of the latest samples that `scores()` covers; the memory does not grow beyond them.
        include: As for `plop_ext.score`.
        exclude: As for `plop_ext.score`.
        scope: As for `plop_ext.score`.
        seed: Seed of the first position read in each batch.

    Raises:
        InputError: If an argument is out of range, or the trainer runs data-parallel replicas in one process. When the
            training begins: if the model is compiled or has no module to score.

    Example:
        >>> with PlopCallback(trainer, every=10) as watch:
        ...     result = trainer.train()
        >>> watch.scores().save("training.json")  # plop report training.json draws the drift
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 1,
        token_step: int = 8,
        mask: str = "attention",
        window: int = 128,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        scope: str = "language",
        seed: int = 0,
    ) -> None:
        check_type(Trainer, "a Trainer of transformers or TRL", trainer=trainer)
        check_whole(every=every, window=window, required=True)
        if trainer.args.n_gpu > 1:
            raise InputError(
                "`trainer` runs replicas on several GPUs in one process; launch it with torchrun or accelerate"
            )
        self._trainer = trainer
        self._every = every
        self._window = window
        self._settings = settings_of(mask, token_step, include=include, exclude=exclude, scope=scope, seed=seed)
        self._watch: TrainingWatch | None = None
        self._open = False
        self._attached = False
        self._replaced: Any = None
        self._observing: Any = None
        self._drift = Drift()
        self._step = 0
        self._due = False
        self._logging = False

    def __enter__(self) -> PlopCallback:
        self._trainer.add_callback(self)
        return self

    def __exit__(self, *unused: object) -> None:
        self._trainer.remove_callback(self)
        self.close()

    @property
    def drift(self) -> list[dict[str, Any]]:
        """`step` and `nfn` by type of each log, at most a thousand, evenly spread over the training."""
        return self._drift.records

    def scores(self) -> Scores:
        """Return the scores of the latest samples, with the drift in `provenance["training"]`. Waits for the device.

        Raises:
            InputError: If nothing was scored yet.
        """
        if self._watch is None:
            raise InputError("`trainer` has not trained with this callback yet; add it, and call `train()`")
        training = {"every": self._every, "step": self._step, "drift": self.drift}
        return self._watch.scores({"name": None, "hash": None}, **training)

    def close(self) -> None:
        """Remove all hooks. The end of a training calls this, and so does an exception in a loss; twice is once."""
        if not self._open:
            return
        self._open = False
        # What another callback has wrapped since stays until that one is closed; this one's then observes nothing.
        if vars(self._trainer).get("compute_loss") is self._observing:
            del self._trainer.compute_loss
            if (before := self._before()) is not None:
                self._trainer.compute_loss = before
        self._attach(False)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.close()
        self._drift = Drift()
        self._watch = TrainingWatch(model, self._settings, self._window)
        self._replaced = vars(self._trainer).get("compute_loss")
        self._observing = self._trainer.compute_loss = self._observed(self._trainer.compute_loss)
        self._open = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1
        self._due = state.global_step % self._every == 0
        self._attach(self._open and self._due)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._watch is None or not self._open or self._logging:
            return
        nfn = self._watch.drift()
        if not nfn:
            return
        self._drift.add(state.global_step, nfn)
        self._logging = True
        try:
            # That of the base class: TRL's own would close its means of the steps since the last log.
            Trainer.log(self._trainer, {f"plop/nfn/{name}": value for name, value in metric_names(nfn).items()})
        finally:
            self._logging = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if self._watch is not None and not self._watch.samples:
            warn(
                "`PlopCallback` scored nothing: the trainer calls parts of the model instead of the model, as fused "
                "losses do; use `score_trainer` before training"
            )

    def _attach(self, wanted: bool) -> None:
        """Attach or remove the hooks: the steps between those that score then cost nothing."""
        if self._watch is None or wanted == self._attached:
            return
        self._attached = wanted
        if wanted:
            self._watch.__enter__()
        else:
            self._watch.__exit__(None, None, None)

    def _observed(self, compute_loss: Any) -> Any:
        """Return `compute_loss` of the trainer, in which forwards are scored that are due."""

        @functools.wraps(compute_loss)
        def observed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            watch = self._watch
            assert watch is not None
            watch.due, watch.batch = self._due, model_fields(inputs)
            try:
                return compute_loss(model, inputs, *args, **kwargs)
            except BaseException:
                self.close()
                raise
            finally:
                watch.due, watch.batch = False, None

        observed.callback = self  # type: ignore[attr-defined]
        return observed

    def _before(self) -> Any:
        """Return the `compute_loss` that the trainer itself had, below those of callbacks that are closed; or None."""
        found = self._replaced
        while isinstance(owner := getattr(found, "callback", None), PlopCallback) and not owner._open:
            found = owner._replaced
        return found
