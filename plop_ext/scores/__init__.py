"""`Scores`, the result of a scoring run."""

from plop_ext.scores.scores import Scores

__all__ = ["Scores"]
