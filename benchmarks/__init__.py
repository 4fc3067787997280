"""Benchmarks of plop_ext: every figure in the documentation comes from a script in this folder."""
