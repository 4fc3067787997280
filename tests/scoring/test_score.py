"""`score` against the float64 oracle, and what a score must not depend on. Refusals and data: test_scoring_input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import Scores, reference
from tests.support import tiny_models
from tests.support.tiny_models import DECODERS, TEXT_MODELS, Plain, token_batch, unpadded

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens")
RTOL = 1e-5


def score(model: nn.Module, data: Any, **settings: Any) -> Scores:
    return plop_ext.score(model, data, progress=False, **{"stop": None, **settings})


def text(*lengths: int, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """A batch without labels: a classifier would take them for its own."""
    batch = token_batch(list(lengths), side=side, seed=seed)
    del batch["labels"]
    return batch


def mixed() -> list[dict[str, Tensor]]:
    return [text(20, 31, 17), text(9, 40, side="left", seed=1), text(25, seed=2)]


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def assert_equals_oracle(scores: Scores, model: nn.Module, batches: list[dict[str, Tensor]], rtol: float) -> None:
    expected = reference.nfn(model, batches, scores.module_names)
    assert set(scores.module_names) == set(expected)
    for name, value in zip(scores.module_names, scores.nfn, strict=True):
        assert value == pytest.approx(expected[name], rel=rtol), name


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the blocks of a text model, by the names themselves."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".layers." in name or ".layer." in name)
    ]


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_module_equals_the_oracle(name: str, device: torch.device) -> None:
    model = TEXT_MODELS[name]().to(device)
    batches = [moved(batch, device) for batch in mixed()]
    scores = score(model, batches)
    assert list(scores.module_names) == linear_names(model)
    assert_equals_oracle(scores, model, batches, RTOL)


# The largest deviations seen are 1.3e-4 (llama) and 6e-4 (qwen2, whose biases are ten times the feature: what bfloat16
# rounds off the sum is lost to the feature).
@pytest.mark.parametrize("name, rtol", [("llama", 5e-4), ("bert", 5e-4), ("gemma3", 5e-4), ("qwen2", 2e-3)])
def test_a_bfloat16_model_stays_close_to_the_oracle(name: str, rtol: float, device: torch.device) -> None:
    model = TEXT_MODELS[name]().to(device, torch.bfloat16)
    batches = [moved(batch, device) for batch in mixed()]
    assert_equals_oracle(score(model, batches), model, batches, rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_module_equals_the_oracle(bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    model = Plain(depth=3, bias=bias).to(device, dtype)
    batches = [{"x": torch.randn(size, 20, 16, dtype=dtype, device=device)} for size in (3, 1)]
    scores = score(model, batches)
    assert scores.types and set(scores.types) == {"up", "down"} and len(scores.modules) == 6
    assert_equals_oracle(scores, model, batches, RTOL if dtype == torch.float32 else 1e-12)


# BERT's positions count padding on the left, so that its samples themselves would change.
@pytest.mark.parametrize("name, side", [*((name, "right") for name in TEXT_MODELS), *((n, "left") for n in DECODERS)])
def test_padding_never_counts(name: str, side: str) -> None:
    model, padded = TEXT_MODELS[name](), text(20, 33, 17, side=side)
    ours, alone = score(model, [padded]), score(model, unpadded(padded))
    assert ours.totals.tokens.tolist() == [[20, 33, 17]] * len(ours.modules)
    np.testing.assert_allclose(ours.totals, alone.totals, rtol=1e-5)
    counting = score(model, [padded], mask="all")
    assert (counting.totals.seen == 33).all()
    assert np.abs(counting.nfn / ours.nfn - 1).max() > 1e-3


def test_mask_all_counts_every_row() -> None:
    model, batches = tiny_models.llama(), mixed()
    scores = score(model, batches, mask="all")
    expected = reference.nfn(model, batches, scores.module_names, count_padding=True)
    np.testing.assert_allclose(scores.nfn, [expected[name] for name in scores.module_names], rtol=RTOL)


def test_completion_mask() -> None:
    model, batch = tiny_models.llama(), token_batch([30, 40])
    batch["labels"][0, :12] = -100
    batch["labels"][1, 25:] = -100
    scores = score(model, [batch], mask="completion")
    assert scores.totals.tokens[0].tolist() == [18, 25]
    # The oracle counts what `attention_mask` says, but the model must see the prompt.
    kept = batch["labels"] != -100
    gains: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda m, a, o, name=name: gains.update({name: reference.token_gains(m.weight, a[0])[kept].mean()})
        )
        for name, module in model.named_modules()
        if name in scores.module_names
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(scores.gain, [gains[name] for name in scores.module_names], rtol=RTOL)
    assert score(model, [{**batch, "labels": batch["input_ids"]}], mask="completion").nfn == pytest.approx(
        score(model, [batch]).nfn, rel=1e-12
    )


@pytest.mark.parametrize("chunks", [(1,) * 6, (2, 4), (5, 1)])
def test_a_chunked_stream_equals_one_batch(chunks: tuple[int, ...]) -> None:
    model, x = Plain(), torch.randn(6, 24, 16)
    whole, parts = score(model, [x]), score(model, list(x.split(list(chunks))))
    np.testing.assert_allclose(parts.totals, whole.totals, rtol=1e-6)
    assert parts.sample_ids.tolist() == list(range(6))
    assert parts.sample_batches.tolist() == [number for number, size in enumerate(chunks) for _ in range(size)]


def test_the_order_of_batches_is_irrelevant() -> None:
    model, batches = tiny_models.llama(), mixed()
    np.testing.assert_allclose(score(model, batches[::-1]).nfn, score(model, batches).nfn, rtol=1e-12)


def test_scaling_inputs_or_weights_changes_nothing() -> None:
    model, x = Plain(depth=1, bias=False), torch.randn(4, 20, 16)
    expected = score(model, [x]).nfn
    np.testing.assert_allclose(score(model, [x * 1024]).nfn[0], expected[0], rtol=1e-6)
    with torch.no_grad():
        model.layers[0].up.weight.mul_(0.03)
        model.layers[0].down.weight.mul_(700)
    np.testing.assert_allclose(score(model, [x]).nfn, expected, rtol=1e-5)


@pytest.mark.parametrize("baseline", ["frobenius", "probe"])
def test_gaussian_inputs_score_one(baseline: str) -> None:
    model = nn.Sequential(nn.Linear(512, 384))
    scores = score(model, [torch.randn(8, 256, 512)], baseline=baseline)
    assert scores.nfn[0] == pytest.approx(1.0, abs=3e-3)


def test_two_runs_are_bitwise_identical(device: torch.device) -> None:
    model = tiny_models.llama().to(device)
    batches = [moved(batch, device) for batch in mixed()]
    for settings in ({}, {"token_step": 3}, {"baseline": "probe"}):
        first, second = (score(model, batches, **settings) for _ in range(2))
        assert first.totals.values.tobytes() == second.totals.values.tobytes()
        assert first.nfn.tobytes() == second.nfn.tobytes()


def test_token_step_reads_every_nth_token_from_a_seeded_first_one() -> None:
    model, x = Plain(depth=1), torch.randn(2, 64, 16)
    expected = reference.token_gains(model.layers[0].up.weight, x).reshape(-1)
    sums = set()
    for seed in range(12):
        scores = score(model, [x], token_step=8, seed=seed)
        assert scores.totals.tokens[0].tolist() == [8, 8]
        total = float(scores.totals.sum_gain[0].sum())
        assert total == score(model, [x], token_step=8, seed=seed).totals.sum_gain[0].sum()
        sums.add(min(range(8), key=lambda phase: abs(float(expected[phase::8].sum()) - total)))
        assert min(abs(float(expected[phase::8].sum()) - total) for phase in range(8)) < 1e-5
    assert len(sums) > 3


def test_a_sample_of_which_no_token_was_read_is_said_so() -> None:
    batch = tiny_models.token_batch([40, 40])
    batch["labels"][0, :-3] = -100
    read = []
    for seed in range(40):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = score(tiny_models.llama(), [batch], mask="completion", token_step=8, seed=seed)
        short, long = scores.totals.tokens.max(axis=0).tolist()
        said = [str(item.message) for item in caught if "`token_step`=8 read no token of 1 of 2" in str(item.message)]
        assert len(said) == (short == 0) and long == 5
        few = [str(item.message) for item in caught if "fewer than 16 counted tokens" in str(item.message)]
        assert len(few) == (short > 0)
        read.append(short)
    # Three of the eight phases hit one of the three tokens.
    assert set(read) == {0, 1} and 0.1 < sum(read) / len(read) < 0.65


def test_token_step_keeps_the_mask() -> None:
    scores = score(tiny_models.llama(), [text(40, 64)], token_step=4)
    assert (np.abs(scores.totals.tokens - [10, 16]) <= 1).all()


def test_tokens_without_a_feature_are_left_out_and_counted() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(2, 30, 16)
    x[0, 3], x[0, 4], x[0, 5, 2], x[1, 7:11], x[1, 29, 0] = torch.nan, torch.inf, 1e30, 0.0, -torch.inf
    with pytest.warns(UserWarning, match=r"4 token features are NaN or infinite and were excluded, most in `0` \(4\)"):
        scores = score(model, [x])
    totals = scores.totals
    assert totals.tokens[0].tolist() == [27, 25]
    assert totals.skipped_zero[0].tolist() == [0, 4] and totals.skipped_nonfinite[0].tolist() == [3, 1]
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[0, 3:6], keep[1, 7:11], keep[1, 29] = False, False, False
    expected = reference.token_gains(model[0].weight, x[keep]).mean()
    assert scores.gain[0] == pytest.approx(float(expected), rel=RTOL)


def test_left_padding_makes_zero_inputs_that_do_not_count() -> None:
    scores = score(tiny_models.llama(), [text(20, 33, side="left")], mask="all")
    assert np.isfinite(scores.nfn).all()


def test_max_samples_stops_after_the_batch_that_completes_them() -> None:
    drawn = []

    def stream() -> Any:
        for number in range(10):
            drawn.append(number)
            yield torch.randn(3, 20, 16)

    assert len(score(Plain(), stream(), max_samples=4).sample_ids) == 6 and drawn == [0, 1]
    assert len(score(Plain(), stream(), max_samples=None).sample_ids) == 30


def test_scores_do_not_depend_on_training_mode_or_dropout() -> None:
    model = tiny_models.llama(attention_dropout=0.5)
    expected = score(model, mixed()).nfn
    assert np.array_equal(score(model.train(), mixed()).nfn, expected)


@pytest.mark.gpu
def test_a_model_on_the_gpu_takes_batches_from_the_host() -> None:
    model = tiny_models.llama()
    expected = score(model, mixed())
    ours = score(model.cuda(), mixed())
    assert ours.provenance["backend"] == "native-cuda"
    np.testing.assert_allclose(ours.nfn, expected.nfn, rtol=1e-4)
    assert np.array_equal(ours.totals.tokens, expected.totals.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("token_step", [1, 4])
def test_the_host_never_waits_between_the_first_batch_and_the_last(token_step: int) -> None:
    from plop_ext.forwards.batch import batch_to_device
    from plop_ext.layers import discover

    model = Plain().cuda()
    batches = [{"x": torch.randn(2, 20, 16), "mask": torch.ones(2, 20, dtype=torch.bool)} for _ in range(4)]
    device = torch.device("cuda")
    with torch.no_grad(), plop_ext.Collector(model, discover(model).layers) as collector:
        for number, batch in enumerate(batches):
            if number > 0:  # the first allocates
                torch.cuda.set_sync_debug_mode("error")
            try:
                collector.begin(2, batch["mask"], step=token_step, phase=token_step - 1)
                model(batch_to_device(batch["x"], device))
                collector.end()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert collector.recording.queue.all().shape == (4, 8, 5)


def test_progress_goes_to_stderr_for_each_phase(capfd: pytest.CaptureFixture[str]) -> None:
    plop_ext.score(tiny_models.llama(), [text(20)], baseline="probe")
    printed = capfd.readouterr()
    assert printed.out == "" and all(name in printed.err for name in ("reading weights", "probing", "scoring"))
