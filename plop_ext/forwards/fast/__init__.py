"""Blocks of supported decoder families on fused kernels, which also emit the sums that scoring needs."""

from plop_ext.forwards.fast.path import FastPath

__all__ = ["FastPath"]
