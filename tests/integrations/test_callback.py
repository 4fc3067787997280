"""Scores while a `Trainer` trains: the training is as without them, and they are those of its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import plop_ext
from plop_ext.errors import InputError
from plop_ext.integrations import PlopCallback
from plop_ext.integrations.watch import TrainingWatch
from plop_ext.scoring.collected import settings_of
from tests.support.architectures import ARCHITECTURES
from tests.support.trainings import ROWS, adapted, collate, losses_of, trainer_of, values

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "all": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
}


FAST = ("all",)  # with half precision, reentrant checkpointing and accumulation


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_losses_and_weights_are_bitwise_those_without(name: str, tmp_path: Path) -> None:
    plain, watched = adapted(), adapted()
    expected = losses_of(trainer_of(plain, tmp_path, **CASES[name]))
    random = torch.get_rng_state()
    trainer = trainer_of(watched, tmp_path, **CASES[name])
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in watched.modules()]
    watch = PlopCallback(trainer, token_step=1)
    trainer.add_callback(watch)
    assert losses_of(trainer) == expected
    assert torch.equal(torch.get_rng_state(), random)
    trained = values(watched)
    assert all(torch.equal(trained[key], value) for key, value in values(plain).items())
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in watched.modules()]
    # Trainer adds one hook of its own for checkpointing.
    assert sum(after) - sum(hooks) == ("gradient_checkpointing" in CASES[name])
    scores = watch.scores()
    assert len(scores.sample_ids) == 16
    assert not scores.totals.skipped_nonfinite.any()


def test_scores_are_those_of_the_batches(tmp_path: Path) -> None:
    # Nothing moves at a learning rate of 0, and rows in order need no shuffling.
    model = adapted(dropout=0.0)
    trainer = trainer_of(model, tmp_path, max_steps=6)
    trainer.args.learning_rate = 0.0
    with PlopCallback(trainer, token_step=1, mask="completion") as watch:
        trainer.train()
    scores = watch.scores()
    batches = [collate(ROWS[start : start + 4]) for start in range(0, 24, 4)]
    wanted = plop_ext.score(model, batches, mask="completion", max_samples=None, stop=None, progress=False)
    assert scores.module_names == wanted.module_names
    np.testing.assert_allclose(scores.nfn, wanted.nfn, rtol=1e-6)
    assert scores.tokens == wanted.tokens
    assert scores.provenance["training"]["weight"] == "W, not W + BA"


@pytest.mark.slow
def test_the_window_bounds_what_is_kept(tmp_path: Path) -> None:
    trainer = trainer_of(adapted(), tmp_path, max_steps=6)
    with PlopCallback(trainer, window=8) as watch:
        trainer.train()
    scores = watch.scores()
    assert scores.sample_ids.tolist() == list(range(16, 24))
    assert len(watch._watch._collector.recording.queue._arrived) == 0  # type: ignore[union-attr]


@pytest.mark.slow
def test_steps_between_are_not_scored(tmp_path: Path) -> None:
    trainer = trainer_of(adapted(), tmp_path, max_steps=6)
    with PlopCallback(trainer, every=3) as watch:
        trainer.train()
    assert len(watch.scores().sample_ids) == 8


def test_drift_goes_where_the_trainer_logs(tmp_path: Path) -> None:
    reported: list[str] = []

    class Tracker(TrainerCallback):  # as those of TensorBoard, Weights & Biases, MLflow and trackio
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.extend(logs)

    trainer = trainer_of(adapted(), tmp_path)
    trainer.add_callback(Tracker())
    with PlopCallback(trainer) as watch:
        trainer.train()
    assert reported.count("plop/nfn/q_proj") == reported.count("plop/nfn/down_proj") == 2
    logged = [entry for entry in trainer.state.log_history if "plop/nfn/q_proj" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert [record["step"] for record in watch.drift] == [2, 4]
    assert watch.drift[0]["nfn"]["q_proj"] == logged[0]["plop/nfn/q_proj"]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    halves = [watch.scores().per_sample().tokens[:, half].sum() for half in (slice(0, 8), slice(8, 16))]
    assert all(halves)


def test_an_exception_in_a_loss_leaves_nothing(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(PlopCallback(trainer))

    def fails(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule("base_model.model.model.layers.1").register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "compute_loss" not in vars(trainer)


@pytest.mark.slow
def test_weights_that_train_are_measured_as_they_are_now(tmp_path: Path) -> None:
    from tests.support.tiny_lm import tiny_llama

    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)
    with PlopCallback(trainer) as watch:
        trainer.train()
    scores = watch.scores()
    assert scores.provenance["training"]["weight"] == "W, which is trained"
    norms = {module.name: module.weight_norm for module in scores.modules}
    name = "model.layers.0.self_attn.q_proj"
    assert norms[name] == pytest.approx(float(model.get_submodule(name).weight.double().norm()), rel=1e-6)


def test_experts_are_named_and_left_alone() -> None:
    architecture = ARCHITECTURES["qwen3_moe"]
    model, batch = architecture.build().train(), architecture.batch()
    plain = model(**batch).logits
    watch = TrainingWatch(model, settings_of("attention", 1), 8)
    with watch:
        watch.due = True
        assert torch.equal(model(**batch).logits, plain)
    scores = watch.scores({"name": None, "hash": None})
    assert all("experts" not in name for name in scores.module_names)
    reasons = {item.reason for item in scores.unscored if "experts" in item.name}
    assert any("change how the experts compute" in reason for reason in reasons)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    model = adapted()
    inner = model.get_submodule("base_model.model.model.layers.0")
    inner.compile(backend="eager")
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(InputError, match="is compiled, and compiled code runs no hooks"), PlopCallback(trainer):
        trainer.train()


def test_scores_before_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has not trained with this callback yet"):
        PlopCallback(trainer_of(adapted(), tmp_path)).scores()


@pytest.mark.slow
def test_steps_between_have_no_hooks(tmp_path: Path) -> None:
    hooks: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            hooks.append(sum(len(module._forward_hooks) for module in model.modules()))

    model = adapted()
    trainer = trainer_of(model, tmp_path, max_steps=5)
    with PlopCallback(trainer, every=2) as watch:
        trainer.add_callback(Count())
        trainer.train()
    assert [count > 0 for count in hooks] == [True, False, True, False, True]
    assert len(watch.scores().sample_ids) == 12


@pytest.mark.parametrize("last_first", [False, True])
def test_two_callbacks_leave_the_trainer_as_they_found_it(tmp_path: Path, last_first: bool) -> None:
    trainer = trainer_of(adapted(), tmp_path, max_steps=1)
    loss = vars(trainer).get("compute_loss")
    first, second = PlopCallback(trainer, token_step=1), PlopCallback(trainer, token_step=1)
    for callback in (first, second):
        trainer.add_callback(callback)
    trainer.train()
    assert vars(trainer).get("compute_loss") is loss
    for callback in (first, second):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    for callback in (second, first) if last_first else (first, second):
        callback.close()
    assert vars(trainer).get("compute_loss") is loss


def test_hooks_go_if_waiting_for_the_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    watch = TrainingWatch(model, settings_of("attention", 1), 8)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    def fail(wait: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "_take", fail)
    with pytest.raises(KeyboardInterrupt), watch:
        pass
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
