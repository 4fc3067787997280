"""What the report tells a reader to do."""

from __future__ import annotations

from typing import Any

import pytest

from plop_ext.report.recommendation import Recommendation, listed, recommend
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table


def recommended(found: Scores, types: int | str | None = None, path: str = "s.json") -> Recommendation:
    placements: list[Any] = [(found.place(types=types), None), (found.place(strategy="all"), None)]
    return recommend(found, placements, found.statistics(len(placements[0][0].types)), path=path)


def test_the_choice_its_cost_and_what_to_run_next() -> None:
    found = scores(table([0.6, 0.8, 0.9, 1.4, 2.0]), name="org/model", data="my data.jsonl")
    said = recommended(found)
    assert said.placed and said.headline == "Put LoRA on a, b and c: 3 of 5 module types, 36 modules."
    params = found.place().num_parameters()
    every = found.place(strategy="all").num_parameters()
    assert said.lines[0] == (
        f"It has {params:,} trainable parameters at rank 16; all linear layers would have {every:,}."
    )
    assert said.commands == (
        "plop place s.json -o placement.json",
        "plop finetune org/model 'my data.jsonl' --placement placement.json -o adapter",
        "plop run org/model 'my data.jsonl' -o run",
    )
    assert "whether this trains better than LoRA on all linear layers depends" in said.lines[-1]


def test_the_cost_is_said_where_it_is_known() -> None:
    found = scores(table([0.6, 0.8, 0.9, 1.4, 2.0]))
    pairs = [(item, item.cost("float32", 2, 16)) for item in (found.place(), found.place(strategy="all"))]
    said = recommend(found, pairs, found.statistics(), path="s.json")
    sizes = [f"{cost.total_bytes / 2**20:,.1f} MiB" for _, cost in pairs]
    assert f"training adds {sizes[0]} to the memory of the model" in said.lines[0]
    assert said.lines[0].endswith(f"and add {sizes[1]}.")


@pytest.mark.parametrize(
    ("levels", "types", "said", "command"),
    [
        ([0.6, 0.8, 0.9, 1.4, 2.0], None, "after 3 types is stable, so --types auto chooses the same", ""),
        ([0.6, 0.8, 1.4, 1.41, 1.42], None, "the paper, is not stable, and that after 2 is: for", ""),
        ([0.6, 0.8, 1.4, 1.41, 1.42], None, "leave out c (--types 2)", ""),
        ([0.6, 0.8, 1.4, 1.41, 1.42], 4, "after 4 types is not stable", " --types 4"),
        ([0.6, 0.6, 0.6, 0.6, 2.0], None, "also take d (--types 4)", ""),
        ([0.6, 0.8, 0.9, 1.4, 2.0], 1, "after 1 type is stable; --types auto chooses 3", " --types 1"),
    ],
)
def test_the_number_of_types_and_automatic_k_are_one_sentence(
    levels: list[float], types: int | None, said: str, command: str
) -> None:
    found = recommended(scores(table(levels, own_layer_sd=0.03)), types)
    assert said in found.lines[2]
    assert found.commands[0] == f"plop place s.json -o placement.json{command}"


def test_a_ranking_without_a_safe_cut_says_so() -> None:
    close = table([1.5, 1.55, 1.6, 1.65, 1.7], sample_sd=0.01, own_layer_sd=0.3)
    found = recommended(scores(close))
    assert found.lines[2].startswith("No cut of the ranking is stable, so the number of types is a convention")


def test_certainty_names_a_tie_across_the_cut_and_a_single_sample() -> None:
    tied = recommended(scores(table([0.6, 0.8, 1.4, 1.4, 2.0], own_layer_sd=0.05)))
    assert tied.lines[1].endswith(", on the two sides of the cut, are tied.")
    one = recommended(scores(table([0.6, 0.8, 0.9, 1.4, 2.0], samples=1)))
    assert "one sample says nothing of other data" in one.lines[1]
    every = recommended(scores(table([0.6, 0.8, 0.9])))
    assert every.lines[1] == "All types are chosen, so the choice does not depend on the ranking."
    assert every.lines[0].endswith("; these are all linear layers.")


def test_no_signal_is_no_recommendation() -> None:
    found = scores(table([1.0, 1.0, 1.0]))
    said = recommend(found, (), found.statistics(), path="my scores.json")
    assert not said.placed and said.headline.startswith("No placement is recommended")
    assert found.signal.reason in said.headline and "-o 'my scores.json' --force" in said.commands[0]


def test_a_list_of_many_names_is_cut() -> None:
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b"
    assert listed([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
