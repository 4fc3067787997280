"""Training and held-out samples that share no row: samples are compared by a hash of their token ids."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence

import numpy as np

from plop_ext.data.encoding import Encoded
from plop_ext.errors import InputError

logger = logging.getLogger(__name__)


def row_hash(sample: Encoded) -> str:
    """Return a hash of the token ids of a sample, which is that of the rendered and truncated row."""
    return hashlib.blake2b(np.asarray(sample["input_ids"], dtype=np.int64).tobytes(), digest_size=16).hexdigest()


def data_hash(encoded: Sequence[Encoded]) -> str:
    """Return a hash of the token ids and labels of samples, in their order."""
    state = hashlib.blake2b(digest_size=16)
    for sample in encoded:
        for values in (sample["input_ids"], sample["labels"]):
            state.update(np.asarray([len(values), *values], dtype=np.int64).tobytes())
    return state.hexdigest()


def distinct(encoded: Sequence[Encoded]) -> list[Encoded]:
    """Return the first of each set of equal samples, in their order."""
    found: dict[str, Encoded] = {}
    for sample in encoded:
        found.setdefault(row_hash(sample), sample)
    return list(found.values())


def apart(train: Sequence[Encoded], held_out: Sequence[Encoded], name: str) -> list[Encoded]:
    """Return the held-out samples that are not in the training data, each once; log how many are removed.

    Args:
        train: Samples to train on.
        held_out: Samples to measure on.
        name: Argument of the held-out samples, for messages.

    Raises:
        InputError: If every held-out sample is in the training data.
    """
    known = {row_hash(sample) for sample in train}
    unseen = [sample for sample in held_out if row_hash(sample) not in known]
    if not unseen:
        raise InputError(
            f"`{name}`: each of its {len(held_out)} samples is in the training data too, so that its loss would reward"
            " memory; give rows that are not trained on"
        )
    kept = distinct(unseen)
    if len(unseen) < len(held_out):
        logger.warning(
            "%d of %d samples of `%s` are in the training data too; they are not measured",
            len(held_out) - len(unseen),
            len(held_out),
            name,
        )
    if len(kept) < len(unseen):
        logger.warning("%d samples of `%s` are repetitions; each is measured once", len(unseen) - len(kept), name)
    return kept


def split_off(encoded: Sequence[Encoded], count: int, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Split distinct samples off at random; equal samples are never on both sides.

    Args:
        encoded: The samples.
        count: Number of distinct samples to split off, fewer than there are.
        seed: Seed of the choice.

    Returns:
        The rest, with its repetitions, and the samples split off, each once; both in the order of `encoded`.
    """
    candidates = distinct(encoded)
    chosen = {row_hash(sample) for sample in random.Random(seed).sample(candidates, count)}
    rest = [sample for sample in encoded if row_hash(sample) not in chosen]
    return rest, [sample for sample in candidates if row_hash(sample) in chosen]
