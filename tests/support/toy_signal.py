"""A toy model and data between which PLoP sees a signal."""

from __future__ import annotations

import torch

from tests.support.tiny_models import Plain


def aligned(depth: int = 4, width: int = 16) -> Plain:
    """A model with a signal: `up` shrinks its inputs, `down` does not care for them."""
    torch.manual_seed(0)
    model = Plain(width, depth)
    for block in model.layers:
        # Rows that look away from the first half of the features, where the data lies.
        block.up.weight.data[:, : width // 2] *= 0.2
    return model


def toy_data(count: int, size: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(count, size, 20, 16, generator=generator)
    data[..., 8:] *= 0.05
    return list(data)
