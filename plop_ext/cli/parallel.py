"""`--parallel`: how the processes of a launch share a model."""

from __future__ import annotations

import argparse
import math
from typing import Any

from plop_ext.errors import InputError, SetupError

_WAYS = ("dp", "fsdp", "tp", "ep")


def add_option(group: argparse._ActionsContainer) -> None:
    """Add --parallel."""
    group.add_argument(
        "--parallel",
        default="dp",
        metavar="WAY",
        help="under torchrun or accelerate launch: dp (default; a whole model in each process), fsdp (weights "
        "sharded), tp (tensor parallel), ep (experts divided), or sizes, as in tp=4,dp=2",
    )


def sizes(text: str, processes: int) -> dict[str, int]:
    """Return the number of processes of each way; one without a number takes those that are left.

    Raises:
        InputError: If the text names no way, or the sizes do not multiply to the number of processes.
    """
    found: dict[str, int | None] = {}
    for part in text.split(","):
        way, _, number = part.strip().partition("=")
        if way not in _WAYS or way in found or (number and not (number.isdecimal() and int(number) > 0)):
            raise InputError(f"`--parallel` {text!r} is no way to share a model; give dp, fsdp, tp, ep, or tp=4,dp=2")
        found[way] = int(number) if number else None
    if "ep" in found and "tp" in found:
        raise InputError("`--parallel`: ep divides the experts over all processes that share a batch; leave tp out")
    given = math.prod(size for size in found.values() if size is not None)
    free = [way for way, size in found.items() if size is None]
    if len(free) > 1 or processes % given or (not free and given != processes):
        raise InputError(
            f"`--parallel` {text!r} does not fit {processes} processes; the sizes must multiply to this number "
            "(torchrun --nproc-per-node)"
        )
    return {way: processes // given if size is None else size for way, size in found.items()}


def distributed_config(text: str, processes: int) -> Any | None:
    """Return the `DistributedConfig` with which transformers loads a model; None for a whole model in each process.

    Raises:
        InputError: As `sizes`, or if a model cannot be shared because there is one process.
        SetupError: If the installed transformers cannot shard models.
    """
    found = sizes(text, processes)
    if set(found) == {"dp"}:
        return None
    if processes == 1:
        raise InputError(f"`--parallel` {text!r} needs several processes; start them by torchrun --nproc-per-node")
    options: dict[str, Any] = {}
    # Copies of a model that tensor parallelism divides share their weights too, which changes no number.
    copies = found.get("fsdp", 1) * found.get("dp", 1)
    if copies > 1:
        options["fsdp_size"] = copies
    if "tp" in found:
        options |= {"tp_size": found["tp"], "tp_plan": "auto"}
    if "ep" in found:
        options |= {"tp_size": found["ep"], "ep_size": found["ep"], "tp_plan": {}}
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(**options)
    except (ImportError, TypeError) as error:
        raise SetupError(
            f"`--parallel` {text!r} needs a later transformers ({error}); pip install -U transformers"
        ) from error
