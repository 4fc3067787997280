"""Rows of a file, a hub data set or a packaged one, encoded and batched as padded token ids."""

from __future__ import annotations

from plop_ext.data.batching import Batches, batches
from plop_ext.data.encoding import Encoded, counted_tokens, encode
from plop_ext.data.sources import load_rows

__all__ = ["Batches", "Encoded", "batches", "counted_tokens", "encode", "load_rows"]
