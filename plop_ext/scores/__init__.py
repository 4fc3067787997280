"""The result of a scoring run and what follows from it: types, samples, files, merges. Never touches a model."""

from plop_ext.scores.scores import ScoredModule, Scores
from plop_ext.scores.thin import ThinModules

__all__ = ["ScoredModule", "Scores", "ThinModules"]
