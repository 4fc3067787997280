"""Loss of a causal language model on held-out samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from plop_ext.data import Encoded, batches, counted_tokens
from plop_ext.data.encoding import check_encoded
from plop_ext.errors import InputError
from plop_ext.finetuning.training import autocast
from plop_ext.preserve import evaluating
from plop_ext.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowLosses:
    """The loss of each held-out sample.

    Attributes:
        nats: Loss of each sample, summed over its counted tokens.
        tokens: Number of counted tokens of each sample.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over all counted tokens of all samples, in nats."""
        return sum(self.nats) / sum(self.tokens)


def held_out_losses(
    model: torch.nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    progress: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> RowLosses:
    """Measure the loss of a causal language model on each sample.

    Every counted token has the same weight in the mean, independent of its batch. The model runs in eval mode, and its
    training mode is restored; on CUDA it is autocast as in training.

    Args:
        model: Causal language model.
        encoded: Samples, from `encode`. The first token of a sample has no prediction and is not counted.
        pad_token_id: Id to pad with.
        batch_size: Samples in a batch; affects only memory and time.
        progress: Show a progress bar.
        on_batch: Called after each batch.

    Returns:
        The losses of the samples with a token to predict, in the order of `encoded`.

    Raises:
        InputError: If no token is counted.
    """
    encoded = learnable(encoded, "encoded")
    # Without the row numbers of the data set, the batches number the samples by position.
    numbered = [Encoded(input_ids=sample["input_ids"], labels=sample["labels"]) for sample in encoded]
    device = next(model.parameters()).device
    nats = torch.zeros(len(encoded), dtype=torch.float64, device=device)
    loader = batches(numbered, batch_size=batch_size, pad_token_id=pad_token_id)
    with evaluating(model), autocast(device), progress_bar("held-out loss", len(loader), progress) as advance:
        for batch in loader:
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits
            # Row by row, because float32 logits of a batch would be the largest tensor of all.
            for index, row, labels in zip(batch["sample_ids"], logits, batch["labels"].to(device), strict=True):
                nats[index] = functional.cross_entropy(row[:-1].float(), labels[1:], reduction="sum")
            advance()
            if on_batch is not None:
                on_batch()
    return RowLosses(tuple(nats.tolist()), tuple(map(counted_tokens, encoded)))


def logits_of(model: torch.nn.Module, sample: Encoded) -> Tensor:
    """Return the logits [T, V] float32 of a sample, in eval mode and autocast as `held_out_loss`."""
    device = next(model.parameters()).device
    (batch,) = batches([sample], batch_size=1, pad_token_id=0)
    with evaluating(model), autocast(device):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        return model(**inputs, use_cache=False).logits[0].float()


def learnable(encoded: Sequence[Encoded], name: str) -> list[Encoded]:
    """Return the samples with at least one token to predict, and log how many have none.

    Raises:
        InputError: If no sample has one, or they are no samples; the message calls them `name`.
    """
    check_encoded(encoded, name)
    kept = [sample for sample in encoded if counted_tokens(sample)]
    if not kept:
        raise InputError(
            f"`{name}` has no token to predict in {len(encoded)} samples; give texts of two tokens or more, prompts"
            " shorter than the maximum length of a sample, or chats with an assistant turn"
        )
    if len(kept) < len(encoded):
        logger.warning(
            "%d of %d samples of `%s` were dropped: no token to predict", len(encoded) - len(kept), len(encoded), name
        )
    return kept
