"""What `score` refuses, what it warns of, and the kinds of data it takes. Values: test_scoring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import InputError, Scores
from tests.support import tiny_models
from tests.support.tiny_models import Plain, token_batch


def score(model: nn.Module, data: Any, **settings: Any) -> Scores:
    return plop_ext.score(model, data, progress=False, **{"stop": None, **settings})


def features(samples: int = 2, tokens: int = 20) -> Tensor:
    return torch.randn(samples, tokens, 16)


@pytest.mark.parametrize("samples", [3, 20])  # 20 labels would broadcast over 20 tokens
def test_labels_that_are_no_tokens_labels(samples: int) -> None:
    batch = {**token_batch([20] * samples), "labels": torch.zeros(samples, dtype=torch.long)}
    with pytest.raises(InputError, match=rf"one entry per token, \[{samples}, 20\], got \[{samples}\]"):
        score(tiny_models.bert(), [batch], mask="completion")


@pytest.mark.parametrize("ids", [[1], [1, 2, 3], [[1], [2]]])
def test_sample_ids_that_are_not_one_per_sample(ids: list[Any]) -> None:
    with pytest.raises(InputError, match=r"`sample_ids` in a batch must be \[2\], one per sample, got \["):
        score(Plain(), [{"x": features(), "sample_ids": torch.tensor(ids)}])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask": "prompt"}, "`mask` must be one of attention, completion, all, got 'prompt'"),
        ({"baseline": "noise"}, "`baseline` must be one of frobenius, probe, got 'noise'"),
        ({"compat": "paper"}, "`compat` must be one of None, paper-script, got 'paper'"),
        ({"max_samples": 0}, "`max_samples` must be at least 1, got 0"),
        ({"token_step": 0}, "`token_step` must be at least 1, got 0"),
        ({"token_step": 1.5}, "`token_step` must be a whole number, got 1.5"),
        ({"max_samples": 2.5}, "`max_samples` must be a whole number, got 2.5"),
        ({"max_samples": "x"}, "`max_samples` must be a whole number .*, got 'x'"),
        ({"probes": -1}, "`probes` must be at least 1, got -1"),
        ({"include": ["q_proj"]}, "`q_proj` in `include`/`exclude` matches no .*; there are down, head, up"),
        ({"include": "q_proj"}, "`q_proj` in `include`/`exclude` matches no linear layer"),
        ({"include": []}, "`include` is empty; name what to score"),
        ({"exclude": [3]}, "`exclude` must hold names, got 3"),
        ({"token_step": 100_000}, "`token_step`=100000 reads one token in 100000, .* lower `token_step`"),
        ({"exclude": ["p"]}, "`p` in `include`/`exclude` matches no linear layer; there are down, head, up"),
        (
            {"include": ["up"], "exclude": ["up"]},
            r"`model` \(Plain\) has no linear layer to score; not scored: Linear",
        ),
        ({"mask": "completion"}, "mask='completion' needs `labels` in every batch, -100 where a token does not count"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(Plain(), [features()], **settings)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "`dataloader` is empty; give at least one batch, row or text"),
        (iter(()), "`dataloader` is empty; give it at least one batch"),
        ([{"x": 3}], "`tokenizer` is missing, and `dataloader` holds rows of text"),
        ([torch.tensor(1.0)], "a batch of `dataloader` holds no tensor with a batch dimension"),
        (["text"], "`tokenizer` is missing, and `dataloader` holds rows of text"),
        (
            [{"x": torch.ones(2, 20, 16), "attention_mask": torch.ones(2, 1, 20, 20)}],
            r"`attention_mask` in a batch must be \[B, T\], got \[2, 1, 20, 20\]; pass mask='all'",
        ),
        (
            [{"x": torch.ones(2, 20, 16), "attention_mask": torch.zeros(2, 20)}],
            "no token counts: every token of `dataloader` is masked, .* check `attention_mask`, `labels` and `mask`",
        ),
        ([torch.zeros(2, 20, 16)], "no module could be scored; `layers.1.down`: "),
    ],
    ids=["list", "generator", "no tensor", "scalar", "text", "4-D mask", "masked", "zeros"],
)
def test_data_that_holds_nothing_to_score(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(Plain(bias=False), data)


def test_all_labels_masked() -> None:
    batch = token_batch([20, 20])
    batch["labels"][:] = -100
    with pytest.raises(InputError, match="no token counts"):
        score(tiny_models.llama(), [batch], mask="completion")


def test_a_model_without_a_linear_layer() -> None:
    with pytest.raises(InputError, match=r"`model` \(Sequential\) has no linear layer to score$"):
        score(nn.Sequential(nn.ReLU()), [features()])
    with pytest.raises(InputError, match="has no linear layer to score; not scored: Bilinear"):
        score(nn.Sequential(nn.Bilinear(20, 20, 3)), [features()])


def test_a_weight_of_zeros_has_no_score_but_a_reason() -> None:
    model = Plain()
    nn.init.zeros_(model.layers[0].up.weight)
    with pytest.warns(
        UserWarning, match=r"not scored: `layers.0.up` \(Linear\): its weight is all zero or not finite"
    ):
        scores = score(model, [features()])
    assert "layers.0.up" not in scores.module_names and len(scores.modules) == 3


def test_few_tokens_per_sample_are_warned_of() -> None:
    batch = token_batch([15, 16, 3])
    with pytest.warns(UserWarning, match="2 of 3 samples have fewer than 16 counted tokens; use longer samples"):
        score(tiny_models.llama(), [batch])


def test_a_token_step_makes_no_sample_short(recwarn: pytest.WarningsRecorder) -> None:
    score(tiny_models.llama(), [token_batch([32, 64])], token_step=8)
    assert not [item for item in recwarn if "counted tokens" in str(item.message)]
    with pytest.warns(UserWarning, match="1 of 2 samples have fewer than 16 counted tokens"):
        score(tiny_models.llama(), [token_batch([8, 64])], token_step=8)


def test_tokens_with_an_input_of_zeros_are_warned_of() -> None:
    x = features()
    x[0, :3] = 0
    with pytest.warns(UserWarning, match=r"3 token features have an input of zeros .* most in `layers.0.up` \(3\)"):
        score(Plain(), [x], include=["layers.0.up"])


def test_a_single_name_may_be_a_string() -> None:
    listed = score(Plain(), [features()], include=["up"], exclude=["layers.0.up"])
    named = score(Plain(), [features()], include="up", exclude="layers.0.up")
    assert named.module_names == listed.module_names == ("layers.1.up",)
    assert named.provenance["settings"]["include"] == ("up",)


def test_the_provenance_tells_data_apart() -> None:
    x = features()
    facts = {"column": "text", "max_length": 20, "samples": 7}
    kept = score(Plain(), [x], data_name="toy", data_info=facts).provenance["data"]
    assert {**kept, "hash": None} == {"name": "toy", "samples": 2, "column": "text", "max_length": 20, "hash": None}
    hashes = [score(Plain(), data).provenance["data"]["hash"] for data in ([x], [x + 1], [x.flip(0)])]
    assert hashes[0] == kept["hash"] and len(set(hashes)) == 3
    with pytest.raises(InputError, match="`data_info` must be a dict of plain JSON values"):
        score(Plain(), [x], data_info={"column": object()})


class Odd(nn.Module):
    """A weight of an unsupported kind."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_layers_of_unknown_classes_are_named() -> None:
    model = Plain()
    for _ in range(4):
        model.layers.append(Odd())
    message = r"not scored: `layers.2` \(Odd\), `layers.3` \(Odd\), `layers.4` \(Odd\) and 1 more: no adapter .*matrix"
    with pytest.warns(UserWarning, match=message):
        scores = score(model, [features()])
    assert [item.layer_class for item in scores.unscored].count("Odd") == 4


def test_layers_that_are_never_called_are_named() -> None:
    class Lazy(Plain):
        def forward(self, x: Tensor, *unused: Any, **ignored: Any) -> Tensor:
            return self.layers[0](x)

    with pytest.warns(UserWarning, match=r"not scored: `layers.1.up` \(Linear\), `layers.1.down` \(Linear\): never"):
        scores = score(Lazy(), [features()])
    reasons = {item.name: item.reason for item in scores.unscored}
    assert reasons["layers.1.up"].startswith("never called in the forward")
    assert reasons["head"] == "outside the repeated blocks"
    assert {item.name for item in scores.unscored if item.wanted} == {"layers.1.up", "layers.1.down"}


def test_nothing_is_warned_of_without_a_cause(recwarn: pytest.WarningsRecorder) -> None:
    score(tiny_models.llama(), [token_batch([20, 31])])
    score(Plain(), [features()], exclude=["up"])
    assert [str(item.message) for item in recwarn if item.category is UserWarning] == []


def as_dicts(x: Tensor) -> Any:
    return [{"x": part} for part in x.split(2)]


def as_tuples(x: Tensor) -> Any:
    return [(part, torch.zeros(len(part))) for part in x.split(2)]


def as_lists(x: Tensor) -> Any:
    return [[part] for part in x.split(2)]


def as_tensors(x: Tensor) -> Any:
    return x.split(2)


def as_generator(x: Tensor) -> Any:
    return iter(x.split(2))


def as_dataloader(x: Tensor) -> Any:
    return torch.utils.data.DataLoader([{"x": row} for row in x], batch_size=2)


def as_tensor_dataset(x: Tensor) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)


def as_batch_encodings(x: Tensor) -> Any:
    from transformers import BatchEncoding

    return [BatchEncoding({"x": part}) for part in x.split(2)]


KINDS = [as_dicts, as_tuples, as_lists, as_tensors, as_generator, as_dataloader, as_tensor_dataset, as_batch_encodings]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(kind: Any, device: torch.device) -> None:
    model, x = Plain().to(device), features(5)
    scores = score(model, kind(x))
    expected = score(model, [x])
    np.testing.assert_allclose(scores.totals, expected.totals, rtol=1e-5)
    assert scores.sample_batches.tolist() == [0, 0, 1, 1, 2] and scores.sample_ids.tolist() == [0, 1, 2, 3, 4]


def test_sample_ids_are_kept_and_not_passed_to_the_model() -> None:
    class Strict(Plain):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    ids = [[9, 2], [5, 7]]
    batches = [{"sample_ids": torch.tensor(pair), "x": features()} for pair in ids]
    assert score(Strict(), batches).sample_ids.tolist() == [9, 2, 5, 7]
    assert score(Strict(), [{"x": features(), "sample_ids": [4, 1]}]).sample_ids.tolist() == [4, 1]


def test_forward_decides_how_a_batch_is_run() -> None:
    model, x = Plain(), features()
    scores = score(model, [{"deep": x}], forward=lambda m, batch: m(batch["deep"]))
    assert scores.totals.values.tobytes() == score(model, [x]).totals.values.tobytes()


def test_a_decoder_computes_no_logits_that_no_module_needs() -> None:
    model, seen = tiny_models.llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    score(model, [token_batch([20, 31])])
    score(model, [token_batch([20, 31])], include=["lm_head"])
    assert seen == [1, 31]
