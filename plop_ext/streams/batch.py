"""The streams of one batch, read from its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext.errors import InputError
from plop_ext.layers.streams import AUDIO, DECODER, ENCODER, OUTSIDE, TEXT, VISION
from plop_ext.streams.facts import ModelFacts, facts_of
from plop_ext.streams.items import audio_streams, vision_streams
from plop_ext.streams.packed import numbers_segments, packed_starts
from plop_ext.streams.stream import Among, Equal, Rows, Sequences, Stream, Untold

_IGNORED = -100
# The streams that a module may read beside its own, as the keys and values of cross-attention do.
_FEEDING = (ENCODER, VISION, AUDIO)


@dataclass(frozen=True, eq=False)
class BatchStreams:
    """The streams of one batch.

    Attributes:
        samples: S.
        streams: The streams that the batch tells, by name (`plop_ext.layers.streams`).
        rest: The rows of a module in none of these.
        tables: Lengths of tables of relative positions, which some models multiply with the weights of attention.
    """

    samples: int
    streams: Mapping[str, Stream] = field(default_factory=dict)
    rest: Stream | None = None
    tables: Collection[int] = ()

    @classmethod
    def of_mask(cls, samples: int, mask: Tensor | None) -> BatchStreams:
        """Return the streams of a batch of one sequence per sample.

        Args:
            samples: B.
            mask: [B, T] bool or 0/1, which tokens count; None if all count.
        """
        if mask is None:
            return cls(samples, {}, Equal(samples))
        sequences = Sequences((samples, mask.numel() // max(1, samples)), mask.detach().bool())
        return cls(samples, {}, sequences)

    def rows(self, stream: str, fed: bool, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        """Return the layout of `rows` rows, or the reason why it cannot be told, which follows "its 12 input rows".

        Args:
            stream: The stream in which the module sits.
            fed: Whether the module reads another stream than its own.
            rows: R.
            extents: Of the input of one sequence, as for `Stream.rows`.
        """
        return self._stream(stream, fed).rows(rows, extents)

    def is_table(self, stream: str, fed: bool, shape: torch.Size, rows: int) -> bool | str:
        """Return whether the `rows` rows of an input of `shape` are relative positions; or why they may be.

        A single sequence in a batch of several samples may be a table of positions, which are of no sample, or the
        rows of one sample after another.
        """
        if len(shape) < 3 or shape[0] != 1:
            return False
        found = self._stream(stream, fed)
        tokens = found.shape if isinstance(found, Sequences) else None
        lengths = {*self.tables, *(min(2 * tokens[1], length) for length in self.tables if tokens is not None)}
        if len(shape) == 3 and rows in lengths:
            return "may be tokens or relative positions; use larger batches" if tokens == tuple(shape[:2]) else True
        layout = found.rows(rows)
        if self.samples == 1 or isinstance(layout, str) or layout.exact:
            return False
        return f"are one sequence for {self.samples} samples, as of a table of positions or of a single sample"

    def of_tokens(self, stream: str) -> bool:
        """Return whether the rows of a stream are the tokens of sequences."""
        return isinstance(self._stream(stream, False), Sequences)

    def time_first(self, stream: str, fed: bool, shape: torch.Size) -> bool:
        """Return whether an input of `shape` is [T, B, K], by the [B, T] of its stream; if T = B, assume [B, T, K]."""
        found = self._stream(stream, fed)
        streams = found.streams if isinstance(found, Among) else [found]
        return any(isinstance(each, Sequences) and each.time_first(shape) for each in streams)

    def _stream(self, stream: str, fed: bool) -> Stream:
        if fed and stream == DECODER and ENCODER in self.streams:
            return self.streams[ENCODER]
        if fed and stream in (TEXT, DECODER):
            feeding = [self.streams[name] for name in _FEEDING if name in self.streams]
            return Among(feeding) if feeding else Untold("come from a stream that no field of the batch describes")
        if stream in self.streams:
            return self.streams[stream]
        if stream == OUTSIDE and self.streams:
            return Among(list(self.streams.values()))
        return self.rest or Untold(f"are of the {stream} stream, which no field of the batch describes")


class StreamReader:
    """Reads the streams of batches.

    Args:
        model: The model.
        mask: Tokens that count, as for `plop_ext.score`.
    """

    def __init__(self, model: nn.Module, mask: str) -> None:
        self._facts: ModelFacts = facts_of(model)
        self._mask = mask

    def read(self, batch: Any) -> BatchStreams:
        """Return the streams of a batch.

        Raises:
            InputError: If a mask or the labels do not fit the batch.
        """
        fields = batch if isinstance(batch, Mapping) else {}
        facts, count_all = self._facts, self._mask == "all"
        streams: dict[str, Stream] = {}
        if facts.encodes:
            text = self._encoder(fields) if facts.main == TEXT else None
            decoder = self._decoder(fields, text)
            if text is not None:
                streams[ENCODER] = text
            if decoder is not None:
                streams[DECODER] = decoder
            tokens = text or decoder
        else:
            text = tokens = self._text(fields) if facts.main == TEXT else None
            if text is not None:
                streams[TEXT] = text
        samples = tokens.samples if tokens is not None else batch_size(batch)
        owner = None if text is None else _owners(text)
        for name, read in ((VISION, vision_streams), (AUDIO, audio_streams)):
            found = list(read(fields, facts, owner, samples, count_all))
            if found:
                streams[name] = found[0] if len(found) == 1 else Among(found)
        main = ENCODER if facts.encodes and facts.main == TEXT else facts.main
        return BatchStreams(samples, streams, None if main in streams else Equal(samples), facts.tables)

    def _text(self, fields: Mapping[str, Any]) -> Sequences | None:
        shape, attention = self._extent(fields), self._attention(fields, labels_suffice=self._mask == "completion")
        if shape is None:
            if self._mask == "completion":
                self._completion(fields, None)
            return None
        valid = torch.ones(shape, dtype=torch.bool) if attention is None else attention
        if self._mask != "all" and self._facts.ignores_segments and numbers_segments(fields.get("attention_mask")):
            raise InputError(
                "`attention_mask` in a batch numbers the samples packed into a row, and the model's attention reads "
                "any number as 1, so that samples would attend to each other; pass `position_ids` that restart at 0 "
                "instead of the mask"
            )
        starts, tokens = packed_starts(fields, valid)
        counted = None if attention is None and bool(tokens is valid) else tokens
        if self._mask == "completion":
            completion = self._completion(fields, attention if attention is not None else valid)
            counted = completion if counted is None else completion & counted.to(completion.device)
        return self._sequences(shape, None if self._mask == "all" else counted, starts)

    def _encoder(self, fields: Mapping[str, Any]) -> Sequences | None:
        shape = self._extent(fields)
        return None if shape is None else self._sequences(shape, self._attention(fields))

    def _decoder(self, fields: Mapping[str, Any], encoder: Sequences | None) -> Sequences | None:
        """Return the decoder's stream: its own mask, else its ids without padding at the end, else its labels."""
        labels = fields.get("labels")
        labels = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None
        own = [fields.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")]
        ids, embedded, mask = (value if isinstance(value, Tensor) else None for value in own)
        given = (
            ids if ids is not None else embedded if embedded is not None else labels if labels is not None else mask
        )
        if self._mask == "completion" and labels is None:
            raise InputError("mask='completion' needs `labels` in every batch, -100 where a token does not count")
        if given is None:  # the decoder reads the encoder's ids, shifted
            return None if encoder is None else self._sequences(encoder.shape, encoder.counted)
        shape = (int(given.shape[0]) // (self._facts.codebooks if given is ids else 1), int(given.shape[1]))
        counted: Tensor | None = None
        if mask is not None and mask.shape == shape:
            counted = mask.bool()
        elif ids is not None:
            counted = _without_end(ids, self._facts.pad_token_id)
        elif labels is not None and embedded is None:
            counted = labels != _IGNORED
        if self._mask == "completion":
            assert labels is not None
            if labels.shape != shape:
                raise InputError(
                    f"mask='completion' needs `labels` with one entry per decoder token, {list(shape)}, got "
                    f"{list(labels.shape)}"
                )
            counted = labels != _IGNORED if counted is None else (labels != _IGNORED) & counted.to(labels.device)
        return self._sequences(shape, counted)

    def _extent(self, fields: Mapping[str, Any]) -> tuple[int, int] | None:
        """Return (B, T) of the main tokens of a batch; None if it has none."""
        for name, dims in (("input_ids", 2), ("inputs_embeds", 3), ("attention_mask", 2)):
            value = fields.get(name)
            if isinstance(value, Tensor) and value.dim() == dims:
                rows = self._facts.codebooks if name == "input_ids" else 1
                return int(value.shape[0]) // rows, int(value.shape[1])
        return None

    def _sequences(self, shape: tuple[int, int], counted: Tensor | None, packed: Tensor | None = None) -> Sequences:
        counted = None if self._mask == "all" else counted
        tokens = torch.ones(shape, dtype=torch.bool) if counted is None else counted
        layouts = () if packed is not None else tuple(_layouts(tokens, self._facts))
        return Sequences(shape, counted, packed, layouts, self._facts.latents)

    def _attention(self, fields: Mapping[str, Any], labels_suffice: bool = False) -> Tensor | None:
        """Return [B, T] bool of the tokens that are no padding; None if there is no mask, or it is not needed."""
        mask = fields.get("attention_mask")
        if not isinstance(mask, Tensor):
            return None
        if mask.dim() != 2:
            if self._mask == "all" or labels_suffice:
                return None
            raise InputError(
                f"`attention_mask` in a batch must be [B, T], got {list(mask.shape)}; pass mask='all', or "
                "mask='completion' and `labels`"
            )
        shape = self._extent(fields)
        if shape is not None and mask.shape[1] > shape[1]:  # of the tokens in a key-value cache, too
            mask = mask[:, -shape[1] :]
        return mask.bool()

    def _completion(self, fields: Mapping[str, Any], tokens: Tensor | None) -> Tensor:
        labels = fields.get("labels")
        marks = fields.get("completion_mask")
        if labels is None and isinstance(marks, Tensor):  # in the pairs of TRL's trainers
            labels = marks.to(torch.int64) - 1
            labels[labels < 0] = _IGNORED
        if not isinstance(labels, Tensor):
            raise InputError("mask='completion' needs `labels` in every batch, -100 where a token does not count")
        if labels.dim() != 2 or (tokens is not None and labels.shape != tokens.shape):
            wanted = "[B, T]" if tokens is None else list(tokens.shape)
            raise InputError(
                f"mask='completion' needs `labels` with one entry per token, {wanted}, got {list(labels.shape)}; "
                "pass mask='attention'"
            )
        return labels != _IGNORED


def _layouts(tokens: Tensor, facts: ModelFacts) -> Iterator[Tensor]:
    """Yield [B, L] bool: which rows count where a model adds rows to the tokens [B, T] of each sequence."""
    length = tokens.shape[1]
    if facts.virtual:
        yield functional.pad(tokens, (facts.virtual, 0))
    for number in sorted(facts.before):
        yield functional.pad(tokens, (number, 0), value=True)
    for number in sorted(facts.after):
        yield functional.pad(tokens, (0, number), value=True)
    for number in sorted({-length % multiple for multiple in facts.multiples} - {0}):
        yield functional.pad(tokens, (0, number))
    for block in sorted(facts.staggered):
        yield functional.pad(tokens, (block // 2, -length % block + block // 2))
    for number in sorted(facts.repeats):
        yield tokens.repeat(1, number)
    for stride in sorted(facts.pools):
        yield tokens[:, ::stride]


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch without tokens: the first extent of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(row, Mapping) for row in batch):
        raise InputError(
            "a batch of `dataloader` is a list of rows, which no model takes; collate it to tensors, or give the "
            "trainer that makes it to `score_trainer`"
        )
    raise InputError("a batch of `dataloader` holds no tensor with a batch dimension; pass dicts, tuples or tensors")


def _without_end(ids: Tensor, pad: int | None) -> Tensor | None:
    """Return [B, T] bool: all tokens but the padding at the end; the first token starts the decoder and counts."""
    if pad is None:
        return None
    rest = (ids != pad).flip(1).cumsum(dim=1).flip(1) > 0
    rest[:, :1] = True
    return rest


def _owners(text: Sequences) -> Tensor:
    """Return [B, T] int64 on the CPU: the sample of each token."""
    size, length = text.shape
    if text.packed is None:
        return torch.arange(size).unsqueeze(1).expand(size, length)
    owners = torch.searchsorted(text.packed[1:].contiguous(), torch.arange(size * length), right=True)
    return owners.clamp_(max=text.samples - 1).view(size, length)
