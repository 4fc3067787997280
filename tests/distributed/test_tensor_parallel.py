"""Models that tensor and sequence parallelism divide: scores as of one process, equal on all ranks to the bit."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from plop_ext import InputError, Scores, StopRule
from tests.support import tiny_models
from tests.support.parallel_models import divided, divided_and_sharded, divided_replicas, loaded
from tests.support.processes import in_processes
from tests.support.quiet import nfn, quietly

# The products of the model itself are rounded in another order.
RTOL = 1e-6


def batches() -> list[dict[str, Tensor]]:
    return [tiny_models.token_batch(lengths, seed=seed) for seed, lengths in enumerate(([20, 9], [14, 16], [8, 8]))]


def totals(scores: Scores) -> Any:
    return np.asarray(getattr(scores.totals, "values", scores.totals))


def scored(divide: Callable[[nn.Module], nn.Module], model: nn.Module, settings: dict[str, Any]) -> Scores:
    return quietly(divide(model), batches(), **settings)


def assert_alike(expected: Scores, found: list[Scores]) -> None:
    for scores in found:
        assert scores.module_names == expected.module_names
        assert {item.reason for item in scores.unscored if item.wanted} == set()
        assert [module.target for module in scores.modules] == [module.target for module in expected.modules]
        assert scores.provenance["model"]["parameters"] == expected.provenance["model"]["parameters"]
        np.testing.assert_allclose(scores.nfn, expected.nfn, rtol=RTOL)
        np.testing.assert_allclose(totals(scores), totals(expected), rtol=RTOL)
        assert totals(scores).tobytes() == totals(found[0]).tobytes()
        assert nfn(scores) == nfn(found[0])


def biased() -> nn.Module:
    """A Llama with biases of columns and of rows, ten times larger than the features."""
    model = tiny_models.llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=5.0)
    return model


def sequence_parallel(model: nn.Module) -> nn.Module:
    return divided(model, sequence=True)


@pytest.mark.parametrize("divide", [divided, sequence_parallel])
def test_torchs_tensor_parallelism(divide: Callable[[nn.Module], nn.Module]) -> None:
    model = biased()
    assert_alike(quietly(model, batches()), in_processes(2, scored, divide, model, {}))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("divide", [divided, sequence_parallel])
def test_other_numbers_of_processes(divide: Callable[[nn.Module], nn.Module], count: int) -> None:
    model = biased()
    assert_alike(quietly(model, batches()), in_processes(count, scored, divide, model, {}))


@pytest.mark.slow
def test_a_mesh_of_two_dimensions_with_fsdp() -> None:
    model = biased()
    assert_alike(quietly(model, batches()), in_processes(4, scored, divided_and_sharded, model, {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"token_step": 3}, {"stop": StopRule(types=2, confidence=0.6, min_samples=2), "max_samples": 128}],
    ids=["default", "step", "stop"],
)
def test_replicas_that_are_divided(settings: dict[str, Any]) -> None:
    model = biased()
    found = in_processes(4, scored, divided_replicas, model, settings)
    assert_alike(quietly(model, batches(), **settings), found)
    assert {scores.provenance["parallel"]["batches_at_once"] for scores in found} == {2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"token_step": 4}, {"baseline": "probe"}, {"mask": "all"}, {"fast": True}, {"max_samples": 4}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("divide", [divided, sequence_parallel])
@pytest.mark.filterwarnings("ignore:.*fast")
def test_settings(divide: Callable[[nn.Module], nn.Module], settings: dict[str, Any]) -> None:
    model = biased()
    assert_alike(quietly(model, batches(), **settings), in_processes(2, scored, divide, model, settings))


def single_output(model: Any) -> nn.Module:
    """Column-wise layers of one output, which the first process holds alone."""
    divided_model = divided(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in divided_model.model.layers:  # type: ignore[union-attr]
        parallelize_module(block.mlp.extra, mesh, ColwiseParallel())
    return divided_model


class WithExtra(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.extra = nn.Linear(tiny_models.HIDDEN, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        self.extra(x)
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


@pytest.mark.slow
def test_a_layer_of_one_output() -> None:
    model: Any = biased()
    for block in model.model.layers:
        block.mlp = WithExtra(block.mlp)
    assert_alike(quietly(model, batches()), in_processes(2, scored, single_output, model, {}))


def from_files(model: Any, folder: Path, settings: dict[str, Any]) -> Scores:
    return quietly(loaded(model, folder, tp_size=distributed.get_world_size(), tp_plan="auto"), batches(), **settings)


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {
        "vocab_size": tiny_models.VOCAB,
        "hidden_size": tiny_models.HIDDEN,
        "intermediate_size": tiny_models.INNER,
    }
    return Phi3ForCausalLM(Phi3Config(**sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)).eval()


def uneven() -> nn.Module:
    """A Llama whose inner size three processes cannot divide."""
    return tiny_models.llama(hidden_size=48, intermediate_size=46, num_attention_heads=3, num_key_value_heads=3)


TRANSFORMERS = {
    "biases": (biased, 2),
    "four": (biased, 4),
    "grouped keys": (tiny_models.qwen2, 2),
    "fused": (phi3, 2),
    "uneven": (uneven, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_tensor_parallelism(case: str, tmp_path: Path) -> None:
    build, count = TRANSFORMERS[case]
    model: Any = build()
    model.save_pretrained(tmp_path)
    assert_alike(quietly(model, batches()), in_processes(count, from_files, model, tmp_path, {}))


@pytest.mark.slow
def test_probes_of_transformers_tensor_parallelism(tmp_path: Path) -> None:
    model: Any = biased()
    model.save_pretrained(tmp_path)
    expected = quietly(model, batches(), baseline="probe")
    assert_alike(expected, in_processes(2, from_files, model, tmp_path, {"baseline": "probe"}))


def adapted(model: Any) -> nn.Module:
    """The model with LoRA of equal values in all processes, which changes its activations."""
    with_lora: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in with_lora.named_parameters():
        if "lora_" in name:
            nn.init.constant_(weight, 0.1)
    return with_lora


def adapted_from_files(model: Any, folder: Path) -> Scores:
    return quietly(adapted(loaded(model, folder, tp_size=2, tp_plan="auto")), batches())


@pytest.mark.slow
def test_base_layers_under_adapters(tmp_path: Path) -> None:
    model: Any = biased()
    model.save_pretrained(tmp_path)
    found = in_processes(2, adapted_from_files, model, tmp_path)
    expected = quietly(adapted(copy.deepcopy(model)), batches())
    assert nfn(expected) != nfn(quietly(model, batches()))
    for scores in found:
        assert nfn(scores) == pytest.approx(nfn(expected), rel=RTOL)


def journalled(path: Path, model: nn.Module) -> str:
    """The error of a run that continues a journal; empty if there is none."""
    try:
        quietly(divided(model), batches(), journal=path, resume=True)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_journal_continues_on_as_many_processes_only(tmp_path: Path) -> None:
    model, path = biased(), tmp_path / "run.journal"
    assert in_processes(2, journalled, path, model) == ["", ""]
    assert in_processes(2, journalled, path, model) == ["", ""]
    for message in in_processes(4, journalled, path, model):
        assert "its tensor_parallel is 2, now it is 4; resume with the same" in message
    with pytest.raises(InputError, match="its tensor_parallel is 2, now it is"):
        quietly(model, batches(), journal=path, resume=True)


def refused(divide: Callable[[nn.Module], nn.Module], model: nn.Module) -> tuple[str, set[str]]:
    """The error of a run, or why modules were left out."""
    try:
        scores = quietly(divide(model), batches())
    except InputError as error:
        return str(error), set()
    return "", {f"{item.name.rsplit('.', 1)[-1]}: {item.reason}" for item in scores.unscored if item.wanted}


def reduced_later(model: Any) -> nn.Module:
    """Row-wise layers whose partial sums another module adds."""

    class Whole(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            distributed.all_reduce(y)
            return y

    model = divided(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.model.layers:
        fresh = nn.Linear(tiny_models.INNER, tiny_models.HIDDEN, bias=False)
        style = RowwiseParallel(output_layouts=Partial(), use_local_output=True)
        block.mlp.down_proj = Whole(parallelize_module(fresh, mesh, style))
    return model


@pytest.mark.slow
def test_partial_sums_are_left_out_by_name() -> None:
    for error, reasons in in_processes(2, refused, reduced_later, tiny_models.llama()):
        assert not error
        assert len(reasons) == 1
        assert "partial sums" in reasons.pop()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(2 * x, self.weight, self.bias)


def with_own_forward(model: Any) -> nn.Module:
    for block in model.model.layers:
        block.mlp.up_proj.__class__ = Doubled
    return divided(model)


def marked(model: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.tensor_model_parallel = True  # as Megatron does
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divide", "count", "reason"),
    [
        (with_own_forward, 2, "up_proj: tensor parallelism divides its weight, and its kind .* is scored whole"),
        (marked, 2, r"tensor parallelism by hand .* \(Megatron's form\).*`parallelize_module`"),
    ],
    ids=["own forward", "by hand"],
)
def test_what_cannot_be_told_is_refused_by_name(divide: Any, count: int, reason: str) -> None:
    for error, reasons in in_processes(count, refused, divide, tiny_models.llama()):
        assert re.search(reason, error or " ".join(reasons))


def computes_the_same(model: nn.Module) -> bool:
    """Whether the model's outputs are the same before and after a run of scoring."""
    whole = divided(model)
    batch = batches()[0]
    with torch.no_grad():
        before = whole(**batch).logits
        quietly(whole, batches())
        return torch.equal(before, whole(**batch).logits)


@pytest.mark.slow
def test_the_model_computes_the_same_after_scoring() -> None:
    assert all(in_processes(2, computes_the_same, tiny_models.llama()))
