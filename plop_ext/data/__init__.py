"""Rows of a file, a folder, the hub or the package, rendered, tokenized and batched as padded token ids."""

from __future__ import annotations

from plop_ext.data.batching import Batches, batches
from plop_ext.data.encoding import Encoded, counted_tokens, encode
from plop_ext.data.rows import Place, Rows
from plop_ext.data.sources import load_rows

__all__ = ["Batches", "Encoded", "Place", "Rows", "batches", "counted_tokens", "encode", "load_rows"]
