"""The training loop of an adapter: the `Trainer` of transformers, without its files, output and reports."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from plop_ext.data import Encoded
from plop_ext.data.batching import pad

OnStep = Callable[[int, "float | None"], None]

_HISTORY_POINTS = 100


@dataclass(frozen=True)
class Run:
    """The record of a training loop: steps taken, wall-clock seconds, and pairs of a step and a mean training loss."""

    steps: int
    seconds: float
    history: tuple[tuple[int, float], ...]


def train_adapter(
    adapted: Any,
    train: Sequence[Encoded],
    pad_token_id: int,
    arguments: dict[str, Any],
    on_step: OnStep | None,
) -> Run:
    """Train the trainable parameters of a model in place; stop early once the loss is not finite.

    Args:
        adapted: The model, on the device to train on.
        train: Samples to train on.
        pad_token_id: Id to pad with.
        arguments: Arguments of `transformers.TrainingArguments`, including `max_steps`.
        on_step: Called after each step with its number and the latest loss.

    Returns:
        The record of the run.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    device, max_steps = adapted.device, arguments["max_steps"]
    with tempfile.TemporaryDirectory() as scratch, _current(device):
        settings = TrainingArguments(
            output_dir=scratch,
            bf16=_bfloat16(device),
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            logging_steps=max(1, max_steps // _HISTORY_POINTS),
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            **arguments,
        )
        observer = _observer(on_step)
        settings._n_gpu = min(settings.n_gpu, 1)  # with more, the model would be wrapped in DataParallel
        trainer = Trainer(
            model=adapted,
            args=settings,
            train_dataset=train,
            data_collator=lambda samples: pad(samples, pad_token_id),
            callbacks=[observer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - observer.started
        trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)
    return Run(trainer.state.global_step, seconds, tuple(observer.history))


def autocast(device: torch.device) -> torch.autocast:
    """Return the autocast context of a training step on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_bfloat16(device))


def _observer(on_step: OnStep | None) -> Any:
    """Return a callback that keeps the losses, reports each step, and ends a run whose loss is not finite."""
    from transformers import TrainerCallback

    class Observer(TrainerCallback):
        started = 0.0

        def __init__(self) -> None:
            self.history: list[tuple[int, float]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.history.append((state.global_step, float(logs["loss"])))
                if not math.isfinite(self.history[-1][1]):
                    control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, self.history[-1][1] if self.history else None)

    return Observer()


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make a CUDA device the current one, because the trainer uses the current device, not the model's."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def _bfloat16(device: torch.device) -> bool:
    """Return whether training on a device is autocast to bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
