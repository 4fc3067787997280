"""What a placement is worth: adapters trained on it, alone or against other placements."""
