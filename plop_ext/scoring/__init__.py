"""A scoring run: its batches, journal and early stop, baselines, and the scores made from its totals."""
