"""Adam over replicas that lie in rows, each with a learning rate and a gradient clip of its own."""

from __future__ import annotations

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_CLIP = 1.0  # largest gradient norm of a replica
WARMUP = 0.06  # of the steps


def schedule(steps: int) -> Tensor:
    """[steps] factors of the learning rate: a linear rise, then a linear fall to 0."""
    rise = max(1, round(WARMUP * steps))
    place = torch.arange(steps, dtype=torch.float32)
    return torch.minimum((place + 1) / rise, (steps - place) / (steps - rise + 1))


class RowAdam:
    """Adam without weight decay for parameters [R, P], all of whose state stays on the device.

    Args:
        parameters: [R, P]
        steps: Length of the schedule.
    """

    def __init__(self, parameters: Tensor, steps: int) -> None:
        self.parameters = parameters
        self.first = torch.zeros_like(parameters)
        self.second = torch.zeros_like(parameters)
        self.rates = torch.zeros(len(parameters), 1, device=parameters.device)
        self.factors = schedule(steps).to(parameters.device)
        self.done = torch.zeros((), dtype=torch.int64, device=parameters.device)

    def reset(self, rates: Tensor) -> None:
        """Begin anew with `rates` [R]."""
        self.first.zero_()
        self.second.zero_()
        self.done.zero_()
        self.rates.copy_(rates[:, None])

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Update by `gradient` [R, P]."""
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient = gradient * (_CLIP / (norm + 1e-6)).clamp(max=1.0)
        factor = self.factors.index_select(0, self.done.view(1))
        self.done.add_(1)
        self.first.lerp_(gradient, 1 - _BETAS[0])
        self.second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        bias_first, bias_second = (1 - beta**self.done for beta in _BETAS)
        denominator = (self.second / bias_second).sqrt_().add_(_EPSILON)
        self.parameters.sub_(self.rates * factor / bias_first * self.first / denominator)
