"""From forwards to scores: hooks that stream sums of squares, baselines, and the run over a dataloader."""
