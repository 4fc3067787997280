"""Scores a model that fits neither the device nor the RAM: one block at a time, read straight from the files."""
