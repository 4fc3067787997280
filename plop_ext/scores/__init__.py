"""The result of a scoring run: places LoRA, merges with other runs, saves and loads."""

from plop_ext.scores.scores import Scores

__all__ = ["Scores"]
