"""Runs blocks of known decoder families by fused kernels, which emit the sums that scoring needs on their way."""

from plop_ext.forwards.fast.path import FastPath

__all__ = ["FastPath"]
