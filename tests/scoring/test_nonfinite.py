"""A model with NaN or infinite values is named by its first module, and gets no placement unasked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from plop_ext.cli.main import main
from plop_ext.errors import InputError
from plop_ext.placement import Placement
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from tests.support import tiny_models


def data(samples: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 64, (samples, 24), generator=generator)}]


def broken(value: float, name: str) -> Scores:
    """Scores of a model with `value` in one element of the parameter `name`."""
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    with pytest.warns(UserWarning, match="NaN or infinite values in"):
        return score(model, data(), max_samples=None, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_bad_weight_is_named_and_nothing_is_placed(value: float) -> None:
    scores = broken(value, "model.layers.1.mlp.up_proj.weight")
    assert scores.nonfinite is not None
    assert scores.nonfinite.startswith("NaN or infinite values in the weights of `model.layers.1.mlp.up_proj`")
    assert not scores.placeable
    for arguments in ({}, {"types": 2}, {"strategy": "all"}, {"modules": 3}):
        with pytest.raises(InputError, match=r"weights of `model\.layers\.1\.mlp\.up_proj`.* a broken model is not"):
            scores.place(**arguments)
    with pytest.warns(UserWarning):
        assert scores.place(types=2, ignore_nonfinite=True).modules


def test_bad_activations_are_named_where_they_begin() -> None:
    # The embedding of token 0, which occurs: all weights that are scored are finite.
    assert (data()[0]["input_ids"] == 0).any()
    scores = broken(math.nan, "model.embed_tokens.weight")
    assert scores.nonfinite is not None
    assert "in the inputs or outputs of `model.layers.0.self_attn.q_proj` and of" in scores.nonfinite


def test_a_model_that_is_broken_from_its_start_has_no_scores() -> None:
    model = tiny_models.llama()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").fill_(math.nan)
    with pytest.raises(InputError, match=r"no module can be scored: NaN or infinite values in the inputs or outputs"):
        score(model, data(), max_samples=None, progress=False)


def test_a_finite_model_says_nothing() -> None:
    scores = score(tiny_models.llama(), data(), max_samples=None, progress=False)
    assert scores.nonfinite is None and scores.provenance["nonfinite"] is None


def test_the_file_a_merge_and_the_command_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, output = tmp_path / "s.json", tmp_path / "p.json"
    scores = broken(math.nan, "model.layers.0.self_attn.o_proj.weight")
    scores.save(saved)
    assert Scores.load(saved).nonfinite == Scores.merge([scores]).nonfinite == scores.nonfinite
    assert main(["place", str(saved), "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert "`model.layers.0.self_attn.o_proj`" in said and "set `--ignore-nonfinite`" in said and not output.exists()
    assert main(["report", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "not placed" in printed and " yes " not in printed
    assert main(["place", str(saved), "--types", "2", "--ignore-nonfinite", "-o", str(output)]) == 0
    assert Placement.load(output).modules


def test_intervals_are_positive_however_large_the_scatter() -> None:
    from plop_ext.statistics import GainTable, summarize

    generator = torch.Generator().manual_seed(0)
    gains = torch.rand(4, 4, generator=generator).double().numpy() ** 8 + 1e-9
    table = GainTable.make(gains, gains * 0 + 1, gains[:, 0] * 0 + 1, gains[:, 0] * 0 + 8, list("aabb"), [0, 1, 0, 1])
    found = summarize(table)
    pairs = [pair for item in found.types for pair in (item.over_samples, item.over_layers) if pair is not None]
    assert len(pairs) == 4 and all(0 < low <= high for low, high in pairs)
    assert (found.module_intervals > 0).all()
