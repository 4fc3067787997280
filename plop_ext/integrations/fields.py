"""The fields of a model's forward, from the batches that trainers make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def model_fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trainer's batch with `input_ids`, `attention_mask` and `labels`, -100 where the loss does not count.

    TRL marks the completion in `completion_mask`: of the whole sequence in batches of pairs, of the completion alone
    beside `prompt_ids` and `completion_ids` in on-policy batches.
    """
    fields = dict(batch)
    completion = fields.get("completion_mask")
    if not isinstance(completion, Tensor):
        return fields
    if "prompt_ids" in fields and "completion_ids" in fields:
        prompt, prompt_mask = fields["prompt_ids"], fields["prompt_mask"]
        ids = torch.cat((prompt, fields["completion_ids"]), dim=1)
        attention = torch.cat((prompt_mask, completion), dim=1)
        counted = torch.cat((torch.zeros_like(prompt_mask), completion), dim=1)
        return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(counted == 0, IGNORED)}
    del fields["completion_mask"]
    tokens = fields.get("input_ids")
    if "labels" not in fields and isinstance(tokens, Tensor):
        fields["labels"] = tokens.masked_fill(completion == 0, IGNORED)
    return fields


def small_on_host(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with ids, masks and lengths on the CPU, so that reading them waits for the device once."""
    return {
        name: value.cpu() if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() < 4 else value
        for name, value in fields.items()
    }
