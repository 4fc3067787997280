"""The result of a scoring run and what follows from it: types, samples, files, merges. Never touches a model."""

from plop_ext.score_data.few_tokens import ThinModules
from plop_ext.scores.scores import ScoredModule, Scores

__all__ = ["ScoredModule", "Scores", "ThinModules"]
