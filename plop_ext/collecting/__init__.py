"""Streams per-module feature norms out of forwards that run anyway."""
