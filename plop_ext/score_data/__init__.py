"""What a scoring run measured, and the figures derived from it."""
