"""The data of a scoring run, and the figures derived from it."""

from plop_ext.score_data.data import ScoreData
from plop_ext.score_data.modules import FewTokenModules, ScoredModule
from plop_ext.score_data.samples import SampleScores
from plop_ext.score_data.types import TypeScore, check_number_of_types, no_place_lines

__all__ = [
    "FewTokenModules",
    "SampleScores",
    "ScoreData",
    "ScoredModule",
    "TypeScore",
    "check_number_of_types",
    "no_place_lines",
]
