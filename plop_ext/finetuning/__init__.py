"""Adapters trained on a placement, alone or in comparison with other placements."""
