"""Scores that say nothing get no placement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from plop_ext.data import batches, encode, load_rows
from plop_ext.errors import InputError
from plop_ext.models import load_model
from plop_ext.report import tables
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from plop_ext.scoring.targets import find_plop_target_modules
from plop_ext.statistics import find_signal
from tests.support.gain_tables import scores, table


def untrained(width: int, depth: int, seed: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def data() -> list[dict[str, torch.Tensor]]:
    _, tokenizer = load_model("plop-tiny", device="cpu")
    encoded = encode(load_rows("prose", max_samples=12), tokenizer)
    return list(batches(encoded, pad_token_id=tokenizer.pad_token_id))


@pytest.mark.parametrize(("width", "depth"), [(32, 2), (64, 6), (128, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_model_of_any_size_has_none(
    width: int, depth: int, seed: int, data: list[dict[str, torch.Tensor]]
) -> None:
    found = score(untrained(width, depth, seed), data, max_samples=None, progress=False)
    assert not found.signal.found
    assert "every type's NFN is 1 within its interval" in found.signal.reason


def test_no_placement_without_signal(data: list[dict[str, torch.Tensor]]) -> None:
    model = untrained(64, 2, 0)
    found = score(model, data, max_samples=None, progress=False)
    for arguments in ({}, {"types": "auto"}, {"strategy": "inverse"}, {"max_params": 10_000}):
        with pytest.raises(InputError, match="no signal: every type's NFN is 1"):
            found.place(**arguments)
    with pytest.raises(InputError, match="no signal"):
        find_plop_target_modules(model, data, progress=False)


def test_a_number_places_with_a_warning_and_other_strategies_do_not_need_a_signal() -> None:
    found = scores(table([1.0, 1.0, 1.0, 1.0], layers=2))
    for arguments in ({"types": 3}, {"modules": 0.5}, {"max_nfn": 2.0}):
        with pytest.warns(UserWarning, match="no signal: .*; placed because a number was given"):
            assert found.place(**arguments).modules
    assert found.place(strategy="random").modules and found.place(strategy="all").modules
    assert found.place(types=["a"]).types == ("a",)


def test_the_embedded_model_has_one(data: list[dict[str, torch.Tensor]]) -> None:
    model, _ = load_model("plop-tiny", device="cpu")
    found = score(model, data, max_samples=None, progress=False).signal
    assert found.found and found.reason == "" and found.halves_tau is not None and found.halves_tau > 0.9


def test_halves_that_disagree_are_no_signal() -> None:
    rng = np.random.default_rng(0)
    source = table([1.5] * 5, samples=16, sample_sd=0.0)
    # Every sample ranks the types its own way: the mean is noise, though nothing is 1.
    noise = 1 + 0.5 * rng.standard_normal((5, 16))
    source.sum_gain[:] *= noise[source.type_index]
    found = find_signal(source)
    assert not found.found and found.halves_tau is not None and found.halves_tau < 0.5
    assert "halves of the data disagree on the order of types" in found.reason


def test_ties_above_a_clear_low_end_are_no_lack_of_signal() -> None:
    source = table([0.5] + [1.5] * 6, samples=16, sample_sd=0.05, seed=1)
    found = find_signal(source)
    assert found.found and found.halves_tau is not None and found.halves_tau < 0.5


def test_a_difference_beyond_what_random_weights_do_is_a_signal() -> None:
    # 12 layers of 4096 rows scatter by 0.3 %.
    assert find_signal(table([0.98, 1.0, 1.0])).found
    assert not find_signal(table([0.998, 1.0, 1.0])).found
    assert not find_signal(table([0.98, 1.0, 1.0], out_features=16)).found


def test_table_and_file_say_so(tmp_path: Path) -> None:
    found = scores(table([1.0, 1.0, 1.0, 1.0]))
    assert tables.confidence_lines(found)[0].startswith("no signal: ")
    found.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["statistics"]["signal"]["found"] is False
    assert not Scores.load(tmp_path / "s.json").signal.found


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from plop_ext.cli.main import main

    scores(table([1.0, 1.0, 1.0, 1.0])).save(tmp_path / "s.json")
    assert main(["place", str(tmp_path / "s.json"), "-o", str(tmp_path / "p.json")]) == 2
    assert "no signal" in capsys.readouterr().err and not (tmp_path / "p.json").exists()
    assert main(["place", str(tmp_path / "s.json"), "-o", str(tmp_path / "p.json"), "--types", "2"]) == 0
    assert "no signal" in capsys.readouterr().err and (tmp_path / "p.json").exists()
