"""Forwards of supported families do not synchronize to read mask values; all others run unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext.collecting.collector import Collector
from plop_ext.forwards import eager as forwards_module
from plop_ext.forwards.batch import default_forward
from plop_ext.forwards.choose import choose_forwards
from plop_ext.forwards.eager import EagerForwards
from plop_ext.forwards.graph import capture
from plop_ext.forwards.masks.decide import without_all_ones_masks
from plop_ext.forwards.masks.known_models import may_omit_masks
from plop_ext.layers import discover
from plop_ext.streams.batch import BatchStreams
from tests.support.fast_models import FAMILIES, batches, make, needs_native
from tests.support.mask_users import MASK_USERS
from tests.support.totals import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens")


def looked(*unused: Any) -> Any:
    raise AssertionError("the value of a tensor was looked at")


def seen_masks(model: nn.Module) -> list[Any]:
    """Gets what the first attention of the model is given as its mask, call by call."""
    seen: list[Any] = []
    attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    return seen


def scored(model: nn.Module, batch: dict[str, Any], decides: bool) -> Tensor:
    layers = discover(model).layers
    with Collector(model, layers) as collector, torch.no_grad():
        forward = default_forward(model, [layer.module for layer in layers])
        forwards = EagerForwards(model, forward, collector, decides_masks=decides)
        forwards.run(batch, BatchStreams.of_mask(len(batch["input_ids"]), torch.ones_like(batch["input_ids"])))
        return collector.recording.queue.all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_decided_masks_are_those_of_the_model(family: str, padded: bool, device: torch.device) -> None:
    model, batch = make(family, device=device), batches(1, padded=padded)[0]
    seen = seen_masks(model)
    expected = scored(model, batch, decides=False)
    assert torch.equal(scored(model, batch, decides=True), expected)
    ours, theirs = seen[1], seen[0]
    assert (ours is None) == (theirs is None)
    assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_the_forward_looks_at_no_value(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("llama"), batches(1, padded=padded)[0]
    layers = discover(model).layers

    def forward(model: nn.Module, inputs: Any) -> None:
        with monkeypatch.context() as patched:
            for method in ("__bool__", "item", "tolist"):
                patched.setattr(Tensor, method, looked)
            default_forward(model, [])(model, inputs)

    with Collector(model, layers) as collector, torch.no_grad():
        for decides in (True, False):
            forwards = EagerForwards(model, forward, collector, decides_masks=decides)
            if decides:
                forwards.run(batch, BatchStreams.of_mask(3, None))
            else:
                with pytest.raises(AssertionError, match="looked at"):
                    forwards.run(batch, BatchStreams.of_mask(3, None))


def test_positions_mean_what_they_mean_to_the_model() -> None:
    model = make("llama")
    seen = seen_masks(model)
    batch = batches(1, padded=False)[0] | {"position_ids": torch.arange(12).remainder(6).expand(3, 12)}
    expected = scored(model, batch, decides=False)
    assert torch.equal(scored(model, batch, decides=True), expected)
    assert seen == [None, None]  # a mask of ones says that they are one sample
    expected = scored(model, batch | {"attention_mask": None}, decides=False)
    assert torch.equal(scored(model, batch | {"attention_mask": None}, decides=True), expected)
    assert seen[3] is not None and torch.equal(seen[2], seen[3])


def test_a_transformers_that_decides_elsewhere_looks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    model, batch = make("llama"), batches(1)[0]
    expected = scored(model, batch, decides=False)
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    layers = discover(model).layers
    seen: list[Any] = []
    tried: list[bool] = []
    decide = forwards_module.decided_masks

    def noted(*args: Any, **kwargs: Any) -> Any:
        tried.append(True)
        return decide(*args, **kwargs)

    monkeypatch.setattr(forwards_module, "decided_masks", noted)
    with Collector(model, layers) as collector:
        forwards = EagerForwards(model, lambda model, inputs: seen.append(inputs), collector, decides_masks=True)
        for _ in range(2):
            forwards.run(batch, BatchStreams.of_mask(3, None))
    assert [inputs["attention_mask"] is not None for inputs in seen] == [True, True]
    assert tried == [True]  # and not again for every batch
    monkeypatch.undo()
    assert torch.equal(scored(model, batch, decides=True), expected)


def test_a_forward_that_fails_leaves_transformers_as_it_was() -> None:
    from transformers import masking_utils

    def fail(model: nn.Module, inputs: Any) -> None:
        assert masking_utils.find_packed_sequence_indices is not before
        raise ZeroDivisionError

    model, before = make("llama"), masking_utils.find_packed_sequence_indices
    with Collector(model, discover(model).layers) as collector, pytest.raises(ZeroDivisionError):
        EagerForwards(model, fail, collector, decides_masks=True).run(batches(1)[0], BatchStreams.of_mask(3, None))
    assert masking_utils.find_packed_sequence_indices is before


@pytest.mark.parametrize("shape", [(3, 16), (3, 9), (1, 12)], ids=str)
def test_a_mask_for_no_input_is_what_it_is_to_the_model(shape: tuple[int, int]) -> None:
    model, batch = make("llama"), batches(1, padded=False)[0]
    batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    found: list[Any] = []
    for decides in (False, True):
        try:
            found.append(scored(model, batch, decides).tolist())
        except (RuntimeError, IndexError) as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_a_mask_longer_than_the_input_is_what_it_is_to_the_model() -> None:
    """transformers leaves one that masks the future alone out."""
    model, batch = make("llama"), batches(1, padded=False)[0]
    batch["attention_mask"] = torch.cat([torch.ones(3, 12), torch.zeros(3, 4)], dim=1).long()
    expected = scored(model, batch, decides=False)
    assert torch.equal(scored(model, batch, decides=True), expected)


def decisions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets, run by run, whether its eager forwards decide on masks."""
    made: list[bool] = []
    start = EagerForwards.__init__

    def noted(self: EagerForwards, *args: Any, decides_masks: bool = False) -> None:
        made.append(decides_masks)
        start(self, *args, decides_masks=decides_masks)

    monkeypatch.setattr(EagerForwards, "__init__", noted)
    return made


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_native)])
def test_eager_forwards_decide_unless_they_are_the_users(
    fast: bool, own: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user-defined forward may need the mask."""
    model, data = make("llama", device=device), batches(padded=False) + batches()
    made = decisions(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("plop_ext.forwards.choose.may_omit_masks", lambda model: False)
        plain = plop_ext.score(model, data, progress=False, max_samples=None)
    given = {"forward": lambda model, batch: model(**batch)} if own else {}
    scores = plop_ext.score(model, data, fast=fast, progress=False, max_samples=None, **given)
    assert made == [False, not own]
    assert_close(scores.totals, plain.totals, rtol=1e-5 if fast else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_may_do_without_a_mask(family: str) -> None:
    assert may_omit_masks(make(family))


def test_lora_needs_no_mask() -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"])
    assert may_omit_masks(peft.get_peft_model(make("llama"), config))
    others = [
        peft.get_peft_model(make("llama"), config).base_model,
        peft.get_peft_model(make("llama"), config, mixed=True),
        peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"])),
    ]
    for model in others:
        assert not may_omit_masks(model)


def with_another_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    for layer in model.layers:
        layer.self_attn = Wrapped(layer.self_attn)
    return model


@pytest.mark.parametrize("change", [*MASK_USERS, with_another_attention])
def test_whatever_may_need_its_mask_gets_it(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(padded=False)
    expected = plop_ext.score(make("llama"), data, progress=False, max_samples=None)
    model = change(make("llama"), monkeypatch)
    assert not may_omit_masks(model)
    scores = plop_ext.score(model, data, progress=False, max_samples=None)
    np.testing.assert_array_equal(scores.totals, expected.totals)


def test_a_mask_for_the_labels_alone_is_for_no_input() -> None:
    batch = batches(1, padded=False)[0]
    batch |= {"labels": torch.ones(3, 16, dtype=torch.long), "attention_mask": torch.ones(3, 16, dtype=torch.long)}
    assert without_all_ones_masks(batch)["attention_mask"] is batch["attention_mask"]


def test_a_mask_of_segments_is_no_mask_of_ones() -> None:
    batch = batches(1, padded=False)[0]
    batch["attention_mask"] = batch["attention_mask"].cumsum(1)
    assert without_all_ones_masks(batch)["attention_mask"] is batch["attention_mask"]


def test_a_cache_is_filled_with_the_mask_it_came_with() -> None:
    """Of a mask for the new tokens alone transformers takes the cached ones for masked, and of none for seen."""
    import transformers

    model, batch = make("llama"), batches(1, padded=False)[0]

    def with_cache() -> dict[str, Any]:
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True)
        return batch | {"past_key_values": cache}

    assert torch.equal(scored(model, with_cache(), decides=True), scored(model, with_cache(), decides=False))


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.filterwarnings("ignore:.*fast")
def test_an_unknown_family_is_given_its_mask(fast: bool) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert not may_omit_masks(model)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    plop_ext.score(model, batches(padded=False), fast=fast, progress=False, max_samples=None)
    assert seen and all(mask is not None for mask in seen)


@needs_native
def test_a_larger_model_around_known_blocks_is_given_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-Audio has Qwen2's blocks, and asks the mask of its audio, which has a name like that of the tokens."""
    import transformers

    text = {"model_type": "qwen2", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 20}
    config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=90)
    config.audio_token_id = 90
    model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 80, (2, 24), generator=generator)
    ids[:, 2:12] = 90
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(2, 8, 40, generator=generator),
        "feature_attention_mask": torch.ones(2, 40, dtype=torch.long),
    }
    made = decisions(monkeypatch)
    plain = plop_ext.score(model, [batch], progress=False, max_samples=None)
    fast = plop_ext.score(model, [batch], fast=True, progress=False, max_samples=None)
    assert made == [False, False] and fast.provenance["fast"]["blocks"] == 2
    assert_close(fast.totals, plain.totals, rtol=1e-5)
    assert without_all_ones_masks(batch)["feature_attention_mask"] is batch["feature_attention_mask"]


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_never_waits_in_a_forward(family: str, padded: bool, fast: bool, device: torch.device) -> None:
    model, data = make(family, torch.bfloat16, device), batches(3, padded=padded)
    layers = discover(model).layers
    with (
        Collector(model, layers) as collector,
        choose_forwards(model, None, collector, fast=fast) as forwards,
        torch.no_grad(),
    ):
        for batch in data[:2]:  # the first checks the kernels, and both may fill caches
            forwards.run(batch, BatchStreams.of_mask(3, batch["attention_mask"]))
        with capture.noting_waits(device) as waits:
            forwards.run(data[2], BatchStreams.of_mask(3, data[2]["attention_mask"]))
        assert forwards.report()["fast"] == ({"blocks": 4, "reason": None} if fast else None)
    assert waits == []
