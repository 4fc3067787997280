"""Scores a model that fits neither the device nor the RAM: one block at a time, its weights straight from the files."""
