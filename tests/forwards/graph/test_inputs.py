"""Which batches a graph takes for alike, and the copies it reads."""

from __future__ import annotations

import pytest
import torch

from plop_ext.forwards.graph.inputs import Ungraphable, launch_key, on_device, tensors
from tests.support.graphed import plain


def test_keys() -> None:
    batch = plain(2, 24, 0)
    assert launch_key(batch) == launch_key(plain(2, 24, 1))
    assert launch_key(batch) != launch_key(plain(2, 23, 0)) and launch_key(batch) != launch_key(plain(1, 24, 0))
    assert launch_key(batch) != launch_key({**batch, "labels": batch["labels"].int()})
    assert launch_key(batch) != launch_key({**batch, "attention_mask": None})
    assert launch_key(batch["labels"]) != launch_key(batch["labels"].T.contiguous().T)  # other strides, other kernels
    assert launch_key({"flag": True}) != launch_key({"flag": 1})
    assert launch_key({"image": [batch["labels"]] * 2}) != launch_key({"image": [batch["labels"]]})
    for foreign in (object(), {1, 2}, torch.eye(2).to_sparse()):
        with pytest.raises(Ungraphable, match="a batch holds a"):
            launch_key({"x": foreign})


def test_copies_of_a_batch() -> None:
    batch = {"x": torch.randn(2, 3), "more": [torch.ones(2), "text"], "none": None}
    copy = on_device(batch, torch.device("cpu"))
    assert copy["more"][1] == "text" and copy["none"] is None
    for ours, theirs in zip(tensors(copy), tensors(batch), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
