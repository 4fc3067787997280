"""Held-out rows share nothing with the training rows, also where rows repeat."""

from __future__ import annotations

import random

import pytest

from plop_ext.data import Encoded
from plop_ext.data.held_out import apart, data_hash, distinct, row_hash, split_off
from plop_ext.errors import InputError


def sample(*ids: int, row: int = 0) -> Encoded:
    return Encoded(input_ids=list(ids), labels=list(ids), row=row)


A, B, C, D = sample(1, 2), sample(1, 2, 3), sample(12, 3), sample(1, 23)


def test_hash_is_of_the_tokens_alone() -> None:
    assert row_hash(sample(1, 2, row=5)) == row_hash(A)
    assert row_hash(Encoded(input_ids=[1, 2], labels=[-100, 2])) == row_hash(A)
    assert len({row_hash(one) for one in (A, B, C, D)}) == 4  # no concatenation of digits


def test_hash_of_data_depends_on_order_bounds_and_labels() -> None:
    assert data_hash([A, B]) == data_hash([sample(1, 2, row=9), B])
    others = [
        [B, A],
        [A],
        [A, B, B],
        [sample(1), sample(2, 1, 2, 3)],
        [Encoded(input_ids=[1, 2], labels=[-100, 2]), B],
    ]
    assert len({data_hash(one) for one in [[A, B], *others]}) == 6


def test_the_first_of_equal_samples_is_kept() -> None:
    assert distinct([A, B, sample(1, 2, row=7), C, B]) == [A, B, C]


class TestApart:
    def test_what_is_trained_on_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        assert apart([A, B], [C, sample(1, 2, row=4), D], "eval") == [C, D]
        assert caplog.messages == ["1 of 3 samples of `eval` are in the training data too; they are not measured"]

    def test_repetitions_are_measured_once(self, caplog: pytest.LogCaptureFixture) -> None:
        assert apart([A], [B, B, C], "eval") == [B, C]
        assert caplog.messages == ["1 samples of `eval` are repetitions; each is measured once"]

    def test_nothing_is_said_of_clean_data(self, caplog: pytest.LogCaptureFixture) -> None:
        assert apart([A], [B, C], "eval") == [B, C] and not caplog.messages

    def test_the_same_file_is_refused(self) -> None:
        with pytest.raises(InputError, match="`--eval`: each of its 2 samples is in the training data too"):
            apart([A, B, C], [B, A], "--eval")


class TestSplitOff:
    def test_no_sample_is_on_both_sides(self) -> None:
        rng = random.Random(0)
        samples = [sample(rng.randrange(12), row=row) for row in range(60)]
        for seed in range(20):
            rest, held = split_off(samples, 4, seed)
            assert len(held) == 4 and len({row_hash(one) for one in held}) == 4
            assert not {row_hash(one) for one in held} & {row_hash(one) for one in rest}
            gone = {row_hash(one) for one in held}
            assert rest == [one for one in samples if row_hash(one) not in gone]

    def test_choice_depends_on_the_seed_alone(self) -> None:
        samples = [sample(number) for number in range(50)]
        assert split_off(samples, 5, 1) == split_off(samples, 5, 1) != split_off(samples, 5, 2)
