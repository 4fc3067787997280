"""A placement says from which scores it was chosen, and what there is to doubt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plop_ext.placement import Placement
from plop_ext.scores import Scores
from plop_ext.totals import Totals
from tests.support.gain_tables import scores as scores_of
from tests.support.gain_tables import table
from tests.support.saved_scores import ranked


def test_a_placement_says_what_it_was_chosen_from(tmp_path: Path) -> None:
    scores = ranked()
    placement = scores.place(types=2)
    evidence = placement.evidence
    assert evidence is not None
    means = {label: np.mean(scores.nfn[[m.type == label for m in scores.modules]]) for label in placement.types}
    assert evidence.nfn == pytest.approx(means) and list(evidence.nfn) == ["q_proj", "k_proj"]
    assert (evidence.samples, evidence.tokens, evidence.data, evidence.doubts) == (8, 800, "d", ())
    placement.save(tmp_path / "p.json")
    assert Placement.load(tmp_path / "p.json").evidence == evidence
    assert evidence.sentence().startswith(
        f"scores {evidence.scores_hash} of 8 samples (800 tokens) of d; NFN: q_proj "
    )


def test_the_hash_is_that_of_the_numbers_and_not_of_the_file(tmp_path: Path) -> None:
    scores = ranked()
    scores.save(tmp_path / "a.json")
    again = Scores.load(tmp_path / "a.json")
    assert again.content_hash == scores.content_hash
    values = np.array(scores.totals)
    values[3, 2, 0] = np.nextafter(values[3, 2, 0], np.inf)
    others = [
        replace(scores, totals=Totals(values)),
        replace(scores, sample_ids=scores.sample_ids[::-1].copy()),
        replace(scores, modules=(replace(scores.modules[0], name="other"), *scores.modules[1:])),
        replace(scores, modules=(replace(scores.modules[0], baseline=1.5), *scores.modules[1:])),
    ]
    assert len({scores.content_hash, *(other.content_hash for other in others)}) == 1 + len(others)


def test_doubts_are_kept() -> None:
    noise = scores_of(table([1.0, 1.0, 1.0, 1.0], out_features=2))
    with pytest.warns(UserWarning, match="no signal"):
        chosen = noise.place(types=2).evidence
    assert chosen is not None and chosen.doubts == (f"no signal: {noise.signal.reason}",)
    by_kind = noise.place(strategy="all").evidence
    assert by_kind is not None and by_kind.doubts == ()
    scores = ranked()
    broken = replace(scores, provenance={**scores.provenance, "nonfinite": "NaN in q_proj"})
    ignored = broken.place(types=2, ignore_nonfinite=True).evidence
    assert ignored is not None and ignored.doubts == ("NaN in q_proj",)
