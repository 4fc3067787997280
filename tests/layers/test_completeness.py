"""A part of a model is told from a whole one: the stage of a pipeline, or what a user cut off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plop_ext.layers.completeness import part_of_model
from plop_ext.report.tables import left_out_lines
from plop_ext.scoring.score import score
from tests.support import meta_models, tiny_models


def stage(kept: list[int], number: int = 6) -> nn.Module:
    """As a pipeline of transformers leaves it on a rank: the other blocks are identities."""
    model = tiny_models.llama(num_hidden_layers=number)
    layers = model.get_submodule("model.layers")
    for index in set(range(number)) - set(kept):
        layers[index] = nn.Identity()  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([0, 1, 2], "blocks 0 to 2 of 6 in `model.layers`"),
        ([3, 4, 5], "blocks 3 to 5 of 6 in `model.layers`"),
        ([1, 3, 4], "blocks 1, 3 to 4 of 6 in `model.layers`"),
        ([0, 1, 2, 3, 4, 5], ""),
    ],
)
def test_a_stage_is_a_part(kept: list[int], expected: str) -> None:
    assert part_of_model(stage(kept)) == expected


def test_a_list_that_keeps_its_numbers_shows_what_is_missing() -> None:
    """As torch.distributed.pipelining leaves it: blocks are deleted from a dict."""
    model = tiny_models.llama(num_hidden_layers=4)
    layers = model.get_submodule("model.layers")
    model.get_submodule("model").layers = nn.ModuleDict({str(number): layers[number] for number in (2, 3)})  # type: ignore[index]
    assert part_of_model(model) == "blocks 2 to 3 of 4 in `model.layers`"


def test_scores_of_a_part_say_so() -> None:
    class Passing(nn.Identity):
        def forward(self, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return hidden

    model = stage([0, 1], 3)
    model.get_submodule("model.layers")[2] = Passing()  # type: ignore[index]
    batch = {"input_ids": torch.randint(3, tiny_models.VOCAB, (2, 24))}
    with pytest.warns(UserWarning, match=r"the model lacks some of its blocks: the scores are of blocks 0 to 1 of 3"):
        scores = score(model, [batch], max_samples=None, progress=False)
    assert scores.provenance["model"]["part"] == "blocks 0 to 1 of 3 in `model.layers`"
    assert left_out_lines(scores)[0].startswith("scored blocks 0 to 1 of 3 in `model.layers`")


@pytest.mark.slow
def test_no_whole_model_of_transformers_is_taken_for_a_part() -> None:
    found = {name: part_of_model(model) for name, model in meta_models.models(meta_models.class_names())}
    assert len(found) > 1000 and {name: part for name, part in found.items() if part} == {}
