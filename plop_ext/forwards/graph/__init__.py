"""Forwards that are captured as CUDA graphs and replayed."""
