"""Forwards replayed as CUDA graphs."""
