"""Everything of a model that scoring could change, to compare before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def state(model: nn.Module) -> dict[str, Any]:
    """All that scoring could touch: each module's attributes and the order of its hooks, and every value."""
    return {
        "attributes": [
            {key: list(value.items()) if "hooks" in key else value for key, value in vars(module).items()}
            for module in model.modules()
        ],
        "training": [module.training for module in model.modules()],
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "identities": [(id(p), p.data_ptr(), p.requires_grad, p.grad is None) for p in model.parameters()],
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    values, expected = after.pop("values"), before["values"]
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[key], expected[key]) for key in expected)
    for key, found in after.items():
        assert found == before[key], key
