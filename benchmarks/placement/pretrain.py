"""Pretrains a decoder from its seed, in as many calls as it takes, and keeps checkpoints."""

from __future__ import annotations

import hashlib
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.placement.experts import balance
from benchmarks.placement.journal import Deadline
from benchmarks.placement.models import Shape, blocks_of, build, hidden_states
from benchmarks.placement.settings import Settings

_WARMUP = 100
_DECAY = 0.1  # weight decay, and the share of the peak rate that the last step has
_REPORTED = 50  # steps between recorded losses
_BALANCE = 0.01  # weight of an even use of experts
_LAST = 15.0  # seconds that these steps and saving the state take, at most
_BETAS = (0.9, 0.95)


def pretrain(
    shape: Shape,
    train: NDArray[np.uint16],
    validation: NDArray[np.uint16],
    folder: Path,
    settings: Settings,
    device: torch.device,
    deadline: Deadline,
) -> dict[str, Any] | None:
    """Train until the end or the deadline, from where an earlier call stopped.

    Returns:
        What was trained, or None if the deadline came first.
    """
    step_tokens = settings.pretrain_batch * settings.context
    steps = max(2, shape.tokens // step_tokens)
    model = build(shape, settings.vocabulary).to(device)
    optimizer = torch.optim.AdamW(_groups(model), lr=settings.pretrain_rate, betas=_BETAS, fused=device.type == "cuda")
    state_file = folder / "state.pt"
    done, losses, seconds = 0, list[tuple[int, float]](), 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses, seconds = state["done"], [tuple(each) for each in state["losses"]], state["seconds"]
    kept = {max(1, round(fraction * steps)): fraction for fraction in settings.checkpoints}
    data = torch.from_numpy(train.astype(np.int32)).to(device)
    windows = (len(data) - 1) // settings.context
    blocks = blocks_of(model, settings.compile)
    folder.mkdir(parents=True, exist_ok=True)
    started, recent = time.monotonic(), torch.zeros((), device=device)
    while done < steps:
        if done % _REPORTED == 0 and not deadline.allows(_LAST):
            _save(state_file, model, optimizer, done, losses, seconds + time.monotonic() - started)
            return None
        for group in optimizer.param_groups:
            group["lr"] = settings.pretrain_rate * _factor(done, steps)
        tokens, labels = _windows(data, _rows(done, settings.pretrain_batch, windows), settings.context)
        loss = _loss(model, blocks, tokens, labels)
        (loss + _BALANCE * balance(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.detach()
        done += 1
        if done % _REPORTED == 0 or done == steps:
            count = _REPORTED if done % _REPORTED == 0 else done % _REPORTED
            losses.append((done, round(float(recent) / count, 4)))
            recent.zero_()
        if done in kept:
            torch.save(weights(model), folder / f"{kept[done]:g}.pt")
    seconds += time.monotonic() - started
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state_file.unlink(missing_ok=True)
    return {
        "parameters": parameters,
        "steps": steps,
        "tokens": steps * step_tokens,
        "epochs": round(steps * step_tokens / len(data), 3),
        "losses": losses[:: max(1, len(losses) // 20)] + losses[-1:],
        "validation_loss": _validate(model.eval(), validation, settings, device),
        "weights_sha256": _digest(model),
        "seconds": round(seconds, 1),
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters in bfloat16 on the host."""
    return {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.named_parameters()}


def load(shape: Shape, folder: Path, settings: Settings, fraction: float = 1.0) -> nn.Module:
    """The model at a checkpoint, in float32 with the weights that bfloat16 kept."""
    model = build(shape, settings.vocabulary)
    state = torch.load(folder / f"{fraction:g}.pt", map_location="cpu", weights_only=True)
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    return model.eval()


def _save(
    path: Path, model: nn.Module, optimizer: Any, done: int, losses: list[tuple[int, float]], seconds: float
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "done": done,
        "losses": losses,
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    return [{"params": matrices, "weight_decay": _DECAY}, {"params": others, "weight_decay": 0.0}]


def _factor(done: int, steps: int) -> float:
    warmup = min(_WARMUP, max(1, steps // 10))
    if done < warmup:
        return (done + 1) / warmup
    return _DECAY + (1 - _DECAY) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))


def _rows(step: int, batch: int, windows: int) -> Tensor:
    """[B] windows of a step: each epoch a new order of all."""
    places = np.arange(step * batch, (step + 1) * batch)
    found = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(places // windows):
        order = _order(int(epoch), windows)
        mine = places // windows == epoch
        found[mine] = order[places[mine] % windows]
    return torch.from_numpy(found)


@lru_cache(maxsize=2)
def _order(epoch: int, windows: int) -> NDArray[np.int64]:
    return np.random.default_rng(epoch).permutation(windows)


def _windows(data: Tensor, rows: Tensor, context: int) -> tuple[Tensor, Tensor]:
    places = (rows[:, None] * context + torch.arange(context + 1)).to(data.device)
    text = data[places].long()
    return text[:, :-1], text[:, 1:]


def _loss(model: Any, blocks: list[Any], tokens: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        logits = model.lm_head(hidden_states(model, blocks, tokens))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def _validate(model: Any, validation: NDArray[np.uint16], settings: Settings, device: torch.device) -> float:
    data = torch.from_numpy(validation.astype(np.int32)).to(device)
    windows = min((len(data) - 1) // settings.context, 8 * settings.pretrain_batch)
    blocks, losses = blocks_of(model, compiled=False), []
    for start in range(0, windows, settings.pretrain_batch):
        rows = torch.arange(start, min(start + settings.pretrain_batch, windows))
        losses.append((len(rows), float(_loss(model, blocks, *_windows(data, rows, settings.context)))))
    return round(sum(count * loss for count, loss in losses) / windows, 4)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in weights(model).values():
        digest.update(value.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
