"""The searches for ranks find the largest that fit, no smaller ones."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.peft import alpha_pattern
from plop_ext.placement.ranks import DEFAULT_RANK, check_rank, inverse_nfn, largest_rank, most_common
from tests.support.made_scores import made


@pytest.mark.parametrize("most", [1, 2, 3, 7, 64])
def test_the_largest_rank_that_fits(most: int) -> None:
    for allowed in range(most + 2):
        assert largest_rank(most, lambda rank, allowed=allowed: rank <= allowed) == min(allowed, most)


def test_no_rank_is_tried_that_no_target_can_use() -> None:
    tried: list[int] = []
    assert largest_rank(5, lambda rank: not tried.append(rank)) == 5
    assert set(tried) <= {1, 2, 3, 4, 5}


def ranks_at(scale: Fraction, nfn: dict[str, float], caps: dict[str, int]) -> dict[str, int]:
    """Ranks floor(c / NFN) between 1 and the caps, in exact arithmetic."""
    return {name: max(1, min(int(scale / Fraction(nfn[name])), cap)) for name, cap in caps.items()}


@pytest.mark.parametrize("seed", range(12))
def test_ranks_by_score_are_at_the_largest_scale_that_fits(seed: int) -> None:
    """The ranks change only where c is a whole multiple of some NFN: all of these are tried."""
    rng = random.Random(seed)
    names = [f"m{i}" for i in range(rng.choice([1, 2, 5, 12]))]
    # Dyadic, so that multiples are exact; near to each other, so that few halvings cannot tell them apart.
    nfn = {name: rng.choice([1.0, 0.25]) * (1 + rng.randrange(2**12) / 2**42) for name in names}
    sizes = {name: rng.choice([64, 96, 4096]) for name in names}
    caps = {name: rng.choice([4, 16, 64]) for name in names}
    budget = rng.randrange(sum(sizes.values()), 40 * sum(sizes.values()))

    def fits(ranks: dict[str, int]) -> bool:
        return sum(rank * sizes[name] for name, rank in ranks.items()) <= budget

    scales = sorted({Fraction(nfn[name]) * rank for name in names for rank in range(caps[name] + 1)})
    expected = [ranks for ranks in (ranks_at(scale, nfn, caps) for scale in scales) if fits(ranks)][-1]
    assert inverse_nfn(caps, nfn, fits) == expected


def test_every_target_has_rank_1_or_nothing_fits() -> None:
    caps, nfn = {"a": 8, "b": 8}, {"a": 1.0, "b": 100.0}
    assert inverse_nfn(caps, nfn, lambda ranks: sum(ranks.values()) <= 2) == {"a": 1, "b": 1}
    assert inverse_nfn(caps, nfn, lambda ranks: sum(ranks.values()) <= 4) == {"a": 3, "b": 1}
    assert inverse_nfn(caps, nfn, lambda ranks: sum(ranks.values()) <= 1) is None


def test_the_search_begins_below_every_scale_of_nfn() -> None:
    assert inverse_nfn({"a": 8}, {"a": 1e-3}, lambda ranks: ranks["a"] <= 3) == {"a": 3}


def test_ranks_by_score_end_at_what_a_target_can_use() -> None:
    assert inverse_nfn({"a": 8, "b": 3}, {"a": 2.0, "b": 0.5}, lambda ranks: True) == {"a": 8, "b": 3}


def test_the_common_rank_is_the_most_frequent_and_of_several_the_highest() -> None:
    assert most_common({"a": 4, "b": 4, "c": 9}) == 4
    assert most_common({"a": 4, "b": 9}) == most_common({"a": 9, "b": 4}) == 9


def test_alphas_keep_the_scale_and_whole_numbers_whole() -> None:
    alphas = alpha_pattern({"a": 4, "b": 3}, 1.5)
    assert alphas == {"a": 6, "b": 4.5} and [type(alpha) for alpha in alphas.values()] == [int, float]


def test_a_rank_below_1_is_refused() -> None:
    assert DEFAULT_RANK == 16
    check_rank(None)
    check_rank(1)
    with pytest.raises(InputError, match="`r` must be at least 1, got 0"):
        check_rank(0)


def test_a_rank_that_no_update_can_have_is_refused() -> None:
    narrow, wide = LoraTarget.of_module("a", 512, 8), LoraTarget.of_module("b", 512, 64)
    check_rank(64, [narrow, wide])
    with pytest.raises(
        InputError, match=r"`r` must be at most 64, got 65: an update of the largest target has rank 64"
    ):
        check_rank(65, [narrow, wide])
    check_rank(DEFAULT_RANK, [narrow])  # the default is never a mistake
    with pytest.raises(InputError, match=r"`r` must be at most 16, got 1000000000: .* has rank 8"):
        check_rank(10**9, [narrow])
    check_rank(10**9, [])


def test_every_use_of_a_rank_is_bounded() -> None:
    placed = made().place(types=1)
    too_much = max(target.max_rank for target in placed.lora_targets) + 100
    for use in (
        lambda: made().place(types=1, r=too_much),
        lambda: placed.lora_config(r=too_much),
        lambda: placed.num_parameters(too_much),
        lambda: placed.cost("float32", 1, 1, r=too_much),
    ):
        with pytest.raises(InputError, match=f"`r` must be at most .*, got {too_much}"):
            use()
