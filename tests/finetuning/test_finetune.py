"""Training an adapter: what it reports, what it writes, and that nothing else is left behind."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from plop_ext.data import Encoded, counted_tokens, encode, load_rows
from plop_ext.errors import InputError, OutputError
from plop_ext.finetuning.evaluation import held_out_losses, learnable
from plop_ext.finetuning.finetune import FinetuneResult, _diverged, finetune
from plop_ext.placement import peft
from tests.support.tiny_lm import byte_tokenizer, placement, tiny_llama

TOKENIZER = byte_tokenizer()
QUICK: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "progress": False, "r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def train() -> list[Encoded]:
    return encode(load_rows("arithmetic", max_samples=64), TOKENIZER, mask="completion", max_length=48)


@pytest.fixture(scope="module")
def held_out() -> list[Encoded]:
    return encode(load_rows("arithmetic", split="test", max_samples=11), TOKENIZER, max_length=128)


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything a run could leave behind in a model or in the process."""
    return {
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "parameters": {
            name: (id(weight), weight.data_ptr(), weight.dtype, weight.requires_grad, id(weight.grad))
            for name, weight in model.named_parameters()
        },
        "hooks": {
            name: [
                sorted(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ]
            for name, module in model.named_modules()
        },
        "attributes": sorted(vars(model)),
        "config": model.config.to_dict(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def found(request: pytest.FixtureRequest) -> Iterator[torch.nn.Module]:
    """A model in an unusual state, checked to be in the same one after the test."""
    model = tiny_llama(request.param, attention_bias=True)
    model.model.layers[1].train()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].register_forward_hook(lambda *args: None)
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    yield model
    after = state_of(model)
    for part, value in before.items():
        assert after[part] == value, part
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert model.state_dict().keys() == weights.keys()


class TestLeftAsFound:
    def test_after_success(self, found: Any, train: list[Encoded], held_out: list[Encoded]) -> None:
        result = finetune(found, TOKENIZER, train, held_out, placement(found, "q_proj"), **QUICK)
        assert result.model is None

    def test_after_training_biases_beside_the_adapter(
        self, found: Any, train: list[Encoded], held_out: list[Encoded]
    ) -> None:
        chosen = placement(found, "q_proj")
        result = finetune(found, TOKENIZER, train, held_out, chosen, lora_kwargs={"bias": "all"}, **QUICK)
        assert result.trainable_params > chosen.num_parameters(2)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_an_exception_in_training(
        self, found: Any, train: list[Encoded], held_out: list[Encoded], tmp_path: Path, error: type[BaseException]
    ) -> None:
        def fail(step: int, loss: float | None) -> None:
            if step == 2:
                raise error("stop")

        with pytest.raises(error, match="stop"):
            finetune(
                found, TOKENIZER, train, held_out, placement(found), on_step=fail, output_dir=tmp_path / "out", **QUICK
            )
        assert not list(tmp_path.iterdir())

    def test_after_an_injection_that_fails_halfway(
        self, found: Any, train: list[Encoded], held_out: list[Encoded], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peft.tuners.lora import LoraModel

        replace, calls = LoraModel._replace_module, []

        def fail(self: Any, *args: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("halfway")
            replace(self, *args)

        monkeypatch.setattr(LoraModel, "_replace_module", fail)
        with pytest.raises(RuntimeError, match="halfway"):
            finetune(found, TOKENIZER, train, held_out, placement(found), **QUICK)

    def test_after_adapting_other_modules_than_placed(
        self, found: Any, train: list[Encoded], held_out: list[Encoded], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = {"target_modules": ["v_proj"], "target_parameters": None}
        monkeypatch.setattr(peft, "names", lambda placement: other)
        with pytest.raises(InputError, match="does not match the placement"):
            finetune(found, TOKENIZER, train, held_out, placement(found, "q_proj"), **QUICK)


class TestResult:
    def test_learns_what_it_reports(self, train: list[Encoded], held_out: list[Encoded], tmp_path: Path) -> None:
        model = tiny_llama()
        chosen, steps = placement(model, "v_proj", "down_proj"), []
        result = finetune(
            model,
            TOKENIZER,
            train,
            held_out,
            chosen,
            r=4,
            lora_alpha=8,
            learning_rate=2e-2,
            max_steps=25,
            batch_size=8,
            progress=False,
            output_dir=tmp_path / "adapter",
            on_step=lambda step, loss: steps.append((step, loss)),
        )
        assert result.loss_before == pytest.approx(naive_loss(model, held_out), rel=1e-6)
        assert result.loss_after < result.loss_before - 0.1 and not result.diverged
        assert result.trainable_params == chosen.num_parameters(4) == 4 * 2 * (32 + 16 + 48 + 32)
        assert (result.r, result.learning_rate, result.seed, result.steps) == (4, 2e-2, 0, 25)
        assert [step for step, _ in result.history] == [step for step, _ in steps] == list(range(1, 26))
        assert result.history[-1][1] < result.history[0][1]
        assert 0 < result.seconds and result.seconds_per_step == result.seconds / 25

        from peft import PeftModel

        assert result.output_dir == str(tmp_path / "adapter")
        assert (tmp_path / "adapter").stat().st_mode & 0o055
        assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "adapter").iterdir())
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
        chosen.verify(loaded)
        assert held_out_losses(loaded, held_out, pad_token_id=0).mean == pytest.approx(result.loss_after, abs=1e-6)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    def test_a_file_that_gives_other_values_or_logits_is_refused(
        self, train: list[Encoded], held_out: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import peft

        read = peft.load_peft_weights

        def lossy(path: str, **kwargs: Any) -> dict[str, torch.Tensor]:
            values = read(path, **kwargs)
            name = min(name for name in values if "lora_B" in name)
            return {**values, name: torch.zeros_like(values[name])}

        def finetuned(folder: str) -> None:
            model = tiny_llama()
            finetune(model, TOKENIZER, train, held_out, placement(model), output_dir=tmp_path / folder, **QUICK)

        with monkeypatch.context() as patched:
            patched.setattr(peft, "load_peft_weights", lossy)
            with pytest.raises(InputError, match=r"PEFT loads 1 of 28 values .* `.*lossy` holds all values"):
                finetuned("lossy")
        with monkeypatch.context() as patched:
            drift = iter(range(9))
            patched.setattr(
                "plop_ext.finetuning.finetune.logits_of",
                lambda *args: torch.ones(2, 3) + next(drift) * torch.eye(2, 3),
            )
            with pytest.raises(InputError, match=r"`.*other` was written, but .* other logits, by up to 1"):
                finetuned("other")
        # What was trained is not lost.
        assert (tmp_path / "lossy" / "adapter_model.safetensors").exists()

    def test_depends_on_the_seed_alone(self, train: list[Encoded], held_out: list[Encoded]) -> None:
        losses = []
        for seed in (1, 1, 2):
            random.seed(len(losses))
            torch.manual_seed(len(losses))
            model = tiny_llama()
            losses.append(finetune(model, TOKENIZER, train, held_out, placement(model), seed=seed, **QUICK).loss_after)
        assert losses[0] == losses[1] != losses[2]

    def test_kept_model(self, train: list[Encoded], held_out: list[Encoded]) -> None:
        model = tiny_llama(torch.bfloat16)
        result = finetune(model, TOKENIZER, train, held_out, placement(model), keep=True, learning_rate=1e-2, **QUICK)
        assert result.model.get_base_model() is model and not result.model.training
        assert model.config.use_cache and model.lm_head.weight.dtype == torch.bfloat16
        assert "forward" not in vars(result.model)
        # Half-precision base weights again, so not to the last digit.
        assert held_out_losses(result.model, held_out, pad_token_id=0).mean == pytest.approx(
            result.loss_after, abs=0.02
        )

    def test_divergence_is_a_result(
        self, train: list[Encoded], held_out: list[Encoded], tmp_path: Path, caplog: Any
    ) -> None:
        model = tiny_llama()
        result = finetune(
            model,
            TOKENIZER,
            train,
            held_out,
            placement(model),
            learning_rate=1e30,
            output_dir=tmp_path / "out",
            lr_scheduler="constant",
            **(QUICK | {"max_steps": 12}),
        )
        assert result.diverged and result.output_dir is None and not list(tmp_path.iterdir())
        assert "all-linear diverged at learning rate 1e+30; no adapter is written" in caplog.text
        assert math.isnan(result.loss_after) and result.steps < 12
        values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert values["loss_after"] is None and values["diverged"] and "model" not in values

    @pytest.mark.parametrize(
        ("losses", "after", "expected"),
        [
            ([3.0, 2.0, 1.0], 1.0, False),
            ([3.0, 3.1, 3.2], 3.0, False),
            ([3.0, 2.0, 3.4], 2.0, True),
            ([3.0, 9.0, 2.0], 2.0, False),
            ([3.0, math.nan, 2.0], 2.0, True),
            ([3.0, 2.0, 2.0], math.inf, True),
        ],
    )
    def test_divergence_is_a_broken_or_a_rising_loss(self, losses: list[float], after: float, expected: bool) -> None:
        assert _diverged(list(enumerate(losses, start=1)), after) is expected

    def test_nothing_is_printed_warned_or_left_in_the_folder(
        self, train: list[Encoded], held_out: list[Encoded], tmp_path: Path, monkeypatch: Any, capfd: Any, caplog: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = tiny_llama()
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            finetune(model, TOKENIZER, train, held_out, placement(model), **QUICK)
        assert not [str(warning.message) for warning in caught if warning.category is not DeprecationWarning]
        assert capfd.readouterr() == ("", "") and not caplog.records and not list(tmp_path.iterdir())

    def test_progress_shows_the_loss(self, train: list[Encoded], held_out: list[Encoded], capfd: Any) -> None:
        model = tiny_llama()
        finetune(model, TOKENIZER, train, held_out, placement(model), **(QUICK | {"progress": True}))
        out, err = capfd.readouterr()
        assert out == "" and "4/4" in err and "loss 5." in err

    def test_known_loss_is_not_measured_again(self, train: list[Encoded], held_out: list[Encoded]) -> None:
        model = tiny_llama()
        result = finetune(model, TOKENIZER, train, held_out, placement(model), loss_before=7.0, **QUICK)
        assert result.loss_before == 7.0

    def test_is_frozen(self) -> None:
        result = FinetuneResult(1.0, 0.5, 10, 1, 1e-3, 0, 1, 1.0, ((1, 0.7),), False)
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.r = 2  # type: ignore[misc]


def naive_loss(model: torch.nn.Module, samples: list[Encoded]) -> float:
    """The definition, one sample and one token at a time, without padding."""
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0].double()
        for position, label in enumerate(sample["labels"][1:]):
            if label != -100:
                total -= float(functional.log_softmax(logits[position], dim=-1)[label])
                count += 1
    return total / count


class TestHeldOutLoss:
    @pytest.mark.parametrize("batch_size", [1, 3, 50])
    def test_every_token_weighs_the_same(self, held_out: list[Encoded], batch_size: int) -> None:
        model = tiny_llama()
        expected = naive_loss(model, held_out)
        assert held_out_losses(model, held_out, pad_token_id=0, batch_size=batch_size).mean == pytest.approx(
            expected, rel=1e-6
        )
        means = [naive_loss(model, [sample]) for sample in held_out]
        assert abs(sum(means) / len(means) - expected) > 1e-4  # the mean of means is another number

    def test_modes_come_back(self, held_out: list[Encoded]) -> None:
        model = tiny_llama()
        model.model.layers[0].train()
        held_out_losses(model, held_out, pad_token_id=0)
        assert model.model.layers[0].training and not model.model.layers[1].training and not model.training

    def test_nothing_to_predict(self) -> None:
        with pytest.raises(InputError, match="`encoded` has no token to predict in 1 samples; give texts of two"):
            held_out_losses(tiny_llama(), [Encoded(input_ids=[5], labels=[5])], pad_token_id=0)
        assert counted_tokens(Encoded(input_ids=[5, 6], labels=[5, -100])) == 0


def test_progress_goes_to_stderr_for_each_phase(train: list[Encoded], held_out: list[Encoded], capfd: Any) -> None:
    model = tiny_llama()
    finetune(model, TOKENIZER, train, held_out, placement(model), **(QUICK | {"progress": True, "eval_batch_size": 4}))
    printed = capfd.readouterr()
    assert printed.out == "" and "training" in printed.err
    assert printed.err.count("held-out loss") == 2 and "3/3" in printed.err


def test_learnable_leaves_out_what_predicts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Encoded(input_ids=[5, 6], labels=[-100, 6]), Encoded(input_ids=[5, 6], labels=[5, -100])
    with caplog.at_level(logging.WARNING):
        assert learnable([bad, good, bad], "train") == [good]
    assert "2 of 3 samples of `train` were dropped: no token to predict" in caplog.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"r": 0}, "`r` must be at least 1, got 0"),
            ({"r": 1.5}, "`r` must be a whole number, got 1.5"),
            ({"lora_alpha": 0}, "`lora_alpha` must be above 0, got 0"),
            ({"lora_alpha": -4}, "`lora_alpha` must be above 0, got -4"),
            ({"seed": -1}, "`seed` must be at least 0, got -1"),
            ({"seed": 2**32}, "`seed` must be at most 4294967295, got 4294967296"),
            ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
            ({"batch_size": -1}, "`batch_size` must be at least 1, got -1"),
            ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1, got 0"),
            ({"learning_rate": 0.0}, "`learning_rate` must be above 0, got 0.0"),
            ({"learning_rate": math.nan}, "`learning_rate` must be a number, got nan"),
            ({"warmup_ratio": 1.0}, "`warmup_ratio` must be at least 0 and below 1, got 1.0"),
            ({"lr_scheduler": "cosin"}, "`lr_scheduler` must be one of .*cosine.*, got 'cosin'"),
            ({"train": []}, "`train` is empty; give at least one sample"),
            ({"eval": [Encoded(input_ids=[5], labels=[5])]}, "`eval` has no token to predict in 1 samples"),
        ],
    )
    def test_arguments(
        self, train: list[Encoded], held_out: list[Encoded], options: dict[str, Any], match: str
    ) -> None:
        model = tiny_llama()
        arguments = {"train": train, "eval": held_out, "placement": placement(model), **QUICK, **options}
        with pytest.raises(InputError, match=match):
            finetune(model, TOKENIZER, **arguments)

    def test_models(self, train: list[Encoded], held_out: list[Encoded]) -> None:
        from peft import get_peft_model

        model = tiny_llama()
        chosen = placement(model, "q_proj")
        with pytest.raises(InputError, match="`model` is no causal language model but a LlamaModel; give one with a"):
            finetune(model.model, TOKENIZER, train, held_out, chosen, **QUICK)
        with pytest.raises(InputError, match="the placement was made for another model"):
            finetune(tiny_llama(hidden_size=16), TOKENIZER, train, held_out, chosen, **QUICK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, chosen.lora_config())
        for other in (adapted, model):
            with pytest.raises(InputError, match="`model` has adapters already; give the base model"):
                finetune(other, TOKENIZER, train, held_out, chosen, **QUICK)

    def test_output_folders(self, train: list[Encoded], held_out: list[Encoded], tmp_path: Path) -> None:
        model = tiny_llama()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("x")
        (tmp_path / "empty").mkdir()
        for name, match in {
            "full": "`output_dir` .*full is not empty; name a new folder",
            "full/mine": "`output_dir` .*mine is a file; name a new folder",
            "no/way": "cannot write .*way`: No such file or directory; name a writable folder that exists",
        }.items():
            with pytest.raises(InputError, match=match):
                finetune(model, TOKENIZER, train, held_out, placement(model), output_dir=tmp_path / name, **QUICK)
        finetune(model, TOKENIZER, train, held_out, placement(model), output_dir=tmp_path / "empty", **QUICK)
        assert (tmp_path / "empty" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "full" / "mine").read_text() == "x"

    def test_a_failing_write_leaves_no_folder(
        self, train: list[Encoded], held_out: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peft import PeftModel

        def fail(self: Any, folder: Path, **kwargs: Any) -> None:
            (folder / "adapter_config.json").write_text("{}")
            raise OSError("disk full")

        monkeypatch.setattr(PeftModel, "save_pretrained", fail)
        model = tiny_llama()
        with pytest.raises(OutputError, match="disk full"):
            finetune(model, TOKENIZER, train, held_out, placement(model), output_dir=tmp_path / "out", **QUICK)
        assert not list(tmp_path.iterdir())
