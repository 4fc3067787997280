"""The comparison of the models that the ranks hold: replicas agree to the bit, shards and stages do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plop_ext.distributed.group import Group
from plop_ext.errors import InputError

# Relative difference of the norms of equal weights on unlike devices, which round differently.
_UNLIKE_DEVICES = 1e-5
_FIX = "or pass process_group=None to score what this process holds, as a part"


def check_alike(group: Group, names: Sequence[str], norms: Sequence[float], device: str) -> None:
    """Check that all ranks hold the same model.

    A hand-written form of tensor parallelism leaves no mark on the weights; their norms tell it from replicas.

    Args:
        group: The ranks.
        names: Names of this rank's layers.
        norms: Norms of their weights, NaN where unknown.
        device: Name of this rank's device.

    Raises:
        InputError: If the ranks hold other layers, or other weights; it names one of them.
    """
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).digest()
    found = group.gather(digest)
    other = next((rank for rank in range(group.size) if found[rank] != found[0]), None)
    if other is not None:
        listed = [set(json.loads(content)) for content in group.gather(json.dumps(list(names)).encode())]
        difference = sorted(listed[0] ^ listed[other])
        example = f", such as `{difference[0]}`" if difference else " in another order"
        raise InputError(
            f"`model`: rank {other} holds other layers than rank 0{example}: the ranks hold stages of a pipeline, or "
            f"parts of one model that nothing marks; load the same model on each rank, {_FIX}"
        )
    _check_norms(group, names, norms, device)


def check_settings(group: Group, settings: Mapping[str, Any]) -> None:
    """Check that all ranks were called with the same settings.

    Args:
        group: The ranks.
        settings: Values by the name of the argument, as JSON has them.

    Raises:
        InputError: If a rank has another value; it names the first such argument.
    """
    found = [json.loads(content) for content in group.gather(json.dumps(settings, sort_keys=True).encode())]
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other.get(name) != value:
                raise InputError(
                    f"`{name}` is {other.get(name)!r} on rank {rank} and {value!r} on rank 0; call with the same "
                    "arguments on all ranks"
                )


def _check_norms(group: Group, names: Sequence[str], norms: Sequence[float], device: str) -> None:
    devices = group.gather(device.encode())
    values = [np.frombuffer(content) for content in group.gather(np.array(norms, dtype=np.float64).tobytes())]
    for rank in range(1, group.size):
        known = np.isfinite(values[0]) & np.isfinite(values[rank])
        tolerance = 0.0 if devices[rank] == devices[0] else _UNLIKE_DEVICES
        far = known & (np.abs(values[rank] - values[0]) > tolerance * np.abs(values[0]))
        if far.any():
            worst = int(far.argmax())
            raise InputError(
                f"`model`: the weight of `{names[worst]}` has the norm {values[rank][worst]:.7g} on rank {rank} and "
                f"{values[0][worst]:.7g} on rank 0: the ranks hold shards of one model without marks (tensor "
                "parallelism by hand), or replicas that differ; load the same weights on each rank, or shard them "
                f"by `tp_plan`, `parallelize_module` or `fully_shard`, {_FIX}"
            )
