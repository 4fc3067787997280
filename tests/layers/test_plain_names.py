"""Names are those of the plain model, whatever wraps it: its scores, placements and checks fit with and without."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from plop_ext import InputError
from plop_ext.layers import discover
from tests.support import tiny_models
from tests.support.quiet import nfn, quietly


class Around(nn.Module):
    """A user's wrapper around one model, with a loss that has no parameters."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.loss = nn.CrossEntropyLoss()

    def forward(self, input_ids: Any) -> Any:
        return self.inner(input_ids=input_ids).logits


class WithValueHead(nn.Module):
    """As of reinforcement learning: a head, and a temperature, beside the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = inner
        self.head = nn.Sequential(nn.Linear(tiny_models.VOCAB, 4), nn.ReLU(), nn.Linear(4, 1))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Any) -> Any:
        return self.head(self.pretrained_model(input_ids=input_ids).logits / self.temperature)


class PassingOn(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def each_block(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = model.get_submodule("model.layers")
    for index, block in enumerate(layers):
        layers[index] = wrap(block)
    return model


def with_compiled_forward(model: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def of_a_compiled_class(model: nn.Module) -> nn.Module:
    """The same model, of a class with `@torch.compile` on its forward."""
    kind = type(model)
    forward = torch.compile(kind.forward, backend="eager")
    model.__class__ = types.new_class(kind.__name__, (kind,), {}, lambda body: body.update(forward=forward))
    return model


def adapted(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def fsdp(model: nn.Module, **settings: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "compiled": compiled,
    "compiled blocks": lambda model: each_block(model, compiled),
    "compiled forward": with_compiled_forward,
    "compiled class": of_a_compiled_class,
    "checkpointed blocks": lambda model: each_block(model, checkpointing.checkpoint_wrapper),
    "offloaded blocks": lambda model: each_block(model, checkpointing.offload_wrapper),
    "FSDP": fsdp,
    "FSDP, original parameters": lambda model: fsdp(
        each_block(model, lambda block: fsdp(block, use_orig_params=True)), use_orig_params=True
    ),
    "fully_shard": lambda model: fully_shard(each_block(model, fully_shard)),
    "a user's": Around,
    "a user's, with a head": WithValueHead,
    "a user's, twice": lambda model: PassingOn(Around(model)),
    "PEFT": adapted,
    "PEFT in DDP": lambda model: DistributedDataParallel(adapted(model)),
    "compiled in DDP": lambda model: DistributedDataParallel(compiled(model)),
    "PEFT on compiled, checkpointed blocks": lambda model: adapted(
        each_block(model, lambda block: compiled(checkpointing.checkpoint_wrapper(block)))
    ),
}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return tiny_models.llama()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_names_and_scores_of_the_plain_one(wrapper: str, plain: nn.Module) -> None:
    batches = [{"input_ids": torch.randint(3, tiny_models.VOCAB, (2, 24))}]
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    quietly(wrapped, batches)
    scores, expected = quietly(wrapped, batches), quietly(plain, batches)

    assert nfn(scores) == nfn(expected)
    assert [(item.type, item.layer, item.target) for item in scores.modules] == [
        (item.type, item.layer, item.target) for item in expected.modules
    ]
    assert {(item.name, item.reason) for item in scores.unscored} == {
        (item.name, item.reason) for item in expected.unscored
    }
    assert scores.provenance["model"]["class"] == expected.provenance["model"]["class"]
    placement = scores.place(types=2)
    placement.check_model(plain)
    placement.check_model(wrapped)


def test_weights_that_someone_released_are_refused_with_what_to_do(plain: nn.Module) -> None:
    released = copy.deepcopy(plain)
    for parameter in released.parameters():
        parameter.untyped_storage().resize_(0)  # as FSDP 1 does between forwards
    with pytest.raises(InputError, match=r"its weight is released .*; score the model before it is sharded"):
        quietly(released, [{"input_ids": torch.randint(3, tiny_models.VOCAB, (2, 24))}])


@pytest.mark.parametrize("wrapper", ["DDP", "checkpointed blocks", "compiled blocks", "a user's", "compiled in DDP"])
def test_a_placement_is_verified_on_a_wrapped_model(wrapper: str, plain: nn.Module) -> None:
    placement = quietly(plain, [{"input_ids": torch.randint(3, tiny_models.VOCAB, (2, 24))}]).place(types=2)
    model = peft.get_peft_model(copy.deepcopy(plain), placement.lora_config(r=2))
    placement.verify(model)
    placement.verify(WRAPPERS[wrapper](model.get_base_model()))
    placement.verify(WRAPPERS[wrapper](model) if "blocks" not in wrapper else model)


def test_a_journal_of_the_plain_model_continues_with_the_wrapped_one(plain: nn.Module, tmp_path: Any) -> None:
    batches = [{"input_ids": torch.randint(3, tiny_models.VOCAB, (2, 24))} for _ in range(2)]
    first = quietly(plain, batches, journal=tmp_path / "run.journal")
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    again = quietly(wrapped, batches, journal=tmp_path / "run.journal", resume=True, forward=_never)
    assert nfn(again) == nfn(first)


def _never(model: nn.Module, batch: Any) -> None:
    raise AssertionError("the batch is in the journal")


def test_a_module_with_one_child_is_no_wrapper_unless_it_passes_everything_on() -> None:
    """`TextModel` below is the model that a user trains; nothing tells that `body` would be."""

    class TextModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> Any:
            return self.body(x)

    names = ["body.0", "body.1"]
    assert [layer.name for layer in discover(TextModel()).layers] == names
    assert [layer.name for layer in discover(PassingOn(TextModel())).layers] == names


def test_a_sequence_around_one_transformers_model_is_a_wrapper(plain: nn.Module) -> None:
    """As of sentence-transformers: the model, then a pooling without parameters."""
    found = discover(nn.Sequential(Around(plain), nn.Identity()))
    assert [layer.name for layer in found.layers] == [layer.name for layer in discover(plain).layers]


def test_the_original_of_a_parametrized_weight_is_no_module() -> None:
    model = tiny_models.mixtral()
    experts = model.get_submodule("model.layers.0.mlp.experts")
    nn.utils.parametrize.register_parametrization(experts, "gate_up_proj", nn.Identity())
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    nn.utils.parametrizations.weight_norm(linear)
    found = discover(model)
    assert not [item for item in found.unscored if "parametrizations" in item.name or item.wanted]
    assert {layer.name for layer in found.layers} == {layer.name for layer in discover(tiny_models.mixtral()).layers}


def test_a_parametrized_matrix_that_no_adapter_reads_is_reported() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.other = nn.Linear(4, 4)

    model = Own()
    nn.utils.parametrize.register_parametrization(model, "w", nn.Identity())
    (reported,) = discover(model).unscored
    assert reported.name == "" and "(w)" in reported.reason and reported.wanted
