"""What a graphed forward decides on attention masks: as an eager one, without a look at values, in its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.forwards.masks.decide import decided_masks, without_all_ones_masks
from plop_ext.forwards.masks.known_models import runs_library_code
from tests.support.architectures import ARCHITECTURES
from tests.support.fast_models import make
from tests.support.graphed import Batch, padded, plain, scored
from tests.support.mask_users import MASK_USERS
from tests.support.threads import in_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build()


def test_only_masks_that_mask_nothing_are_left_out() -> None:
    ones = torch.ones(2, 4, dtype=torch.long)
    some = ones.clone()
    some[1, 3] = 0
    batch = {"attention_mask": ones, "decoder_attention_mask": some, "input_ids": ones, "x_attention_mask": ones[0]}
    assert {name: value is None for name, value in without_all_ones_masks(batch).items()} == {
        "attention_mask": True,
        "decoder_attention_mask": False,
        "input_ids": False,
        "x_attention_mask": False,
    }
    decoder = without_all_ones_masks({"labels": ones, "decoder_attention_mask": ones, "attention_mask": ones})
    assert decoder["decoder_attention_mask"] is None and decoder["attention_mask"] is ones
    assert batch["attention_mask"] is ones
    packed = batch | {"position_ids": ones}  # without a mask they would say where samples start
    assert without_all_ones_masks(packed) is packed
    assert without_all_ones_masks(ones) is ones


def attention_masks(model: nn.Module, batch: Any) -> list[Any]:
    """What each attention module of `model` is given as its mask."""
    seen: list[Any] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for name, module in model.named_modules()
        if name.endswith((".self_attn", ".attn"))
    ]
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def looked(*unused: Any) -> Any:
    raise AssertionError("the value of a tensor was looked at")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "qwen3_moe", "gemma3"])
@pytest.mark.parametrize("make", [plain, padded])
@pytest.mark.parametrize("capturing", [False, True])
def test_trial_and_capture_make_the_masks_of_an_eager_forward_and_look_at_nothing(
    name: str, make: Callable[..., Batch], capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ARCHITECTURES[name].build()
    model.config.pad_token_id = 0  # some look for it where there is no mask
    batch = {key: make(2, 24, 1)[key] for key in ("input_ids", "attention_mask")}
    eager = attention_masks(model, batch)
    inputs = without_all_ones_masks(batch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    if name != "qwen3_moe":  # its experts on a CPU look at the numbers of rows
        for method in ("__bool__", "item", "tolist"):
            monkeypatch.setattr(Tensor, method, looked)
    with decided_masks(inputs, plain=True):
        captured = attention_masks(model, inputs)
    monkeypatch.undo()
    assert len(captured) == len(eager) > 0
    for ours, theirs in zip(captured, eager, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_what_transformers_decides_is_given_back(llama: nn.Module) -> None:
    from transformers import masking_utils, modeling_utils

    def found() -> list[Any]:
        return [masking_utils.is_tracing, masking_utils.find_packed_sequence_indices, modeling_utils.is_tracing]

    before = found()
    with pytest.raises(ZeroDivisionError), decided_masks(plain(2, 24, 0), plain=True):
        assert not any(ours is theirs for ours, theirs in zip(found(), before, strict=True))
        raise ZeroDivisionError
    assert found() == before


def test_other_threads_decide_on_masks_as_ever(llama: nn.Module) -> None:
    """Two samples in one row of another thread must not see each other while this one says nothing is packed."""
    packed = {"input_ids": plain(1, 24, 0)["input_ids"], "position_ids": torch.arange(24).remainder(12)[None]}
    full = {"input_ids": packed["input_ids"], "attention_mask": torch.ones(1, 24, dtype=torch.long)}
    expected, idle = attention_masks(llama, packed)[0], attention_masks(llama, full)[0]
    assert expected is not None and idle is None
    with decided_masks(plain(1, 24, 0), plain=True):
        assert attention_masks(llama, packed)[0] is None
        assert torch.equal(in_thread(lambda: attention_masks(llama, packed))[0], expected)
        assert in_thread(lambda: attention_masks(llama, full))[0] is None


def test_overlapping_threads_leave_nothing_behind(llama: nn.Module) -> None:
    from transformers import masking_utils

    before, decided = masking_utils.find_packed_sequence_indices, threading.Event()
    finish = threading.Event()
    positions = torch.arange(24).remainder(12)[None]

    def other() -> Any:
        with decided_masks(plain(1, 24, 0), plain=True):
            decided.set()
            assert finish.wait(60)
            return masking_utils.find_packed_sequence_indices(positions)

    with ThreadPoolExecutor(1) as pool:
        with decided_masks(plain(1, 24, 0), plain=True):
            result = pool.submit(other)
            assert decided.wait(60)
        try:  # the first to come was the first to go
            assert masking_utils.find_packed_sequence_indices(positions) is not None
        finally:
            finish.set()
        assert result.result() is None
    assert masking_utils.find_packed_sequence_indices is before


def test_packed_samples_stay_apart(llama: nn.Module) -> None:
    """Positions of the batch itself are looked at: two samples in one row must not see each other."""
    batch = {"input_ids": plain(1, 24, 0)["input_ids"], "position_ids": torch.arange(24).remainder(12)[None]}
    eager = attention_masks(llama, batch)
    assert eager[0] is not None
    with decided_masks(batch, plain=True):
        assert torch.equal(attention_masks(llama, batch)[0], eager[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_transformers_are_graphed_as_such(name: str) -> None:
    assert runs_library_code(ARCHITECTURES[name].build())


def test_a_hook_within_a_block_may_see_the_mask_of_the_batch() -> None:
    model = ARCHITECTURES["mamba"].build()
    mixer = next(module for name, module in model.named_modules() if name.endswith(".mixer"))
    handle = mixer.register_forward_pre_hook(lambda *inputs: None, with_kwargs=True)
    assert not runs_library_code(model)
    handle.remove()
    assert runs_library_code(model)


@pytest.mark.filterwarnings("ignore:`graph`")
@pytest.mark.parametrize("change", MASK_USERS)
def test_whatever_may_need_its_mask_gets_it(
    change: Any, graphing: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is not graphed, since it looks at that mask."""
    data = [plain(2, 24, i) for i in range(4)]
    expected = scored(make("llama", device=graphing), data)
    with monkeypatch.context() as patched:
        model = change(make("llama", device=graphing), patched)
        assert not runs_library_code(model)
        graphed = scored(model, data, graph=True)
    assert graphed.totals.values.tobytes() == expected.totals.values.tobytes()
    if graphing.type == "cuda":
        assert "synchronizes" in graphed.provenance["graph"]["reason"]
