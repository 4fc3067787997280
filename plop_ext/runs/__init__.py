"""A run folder: scores, trials, verdict, the winner's adapter and a page, from one call."""
