"""Runs forwards of a batch: eagerly, as CUDA graphs, or by fused kernels."""
