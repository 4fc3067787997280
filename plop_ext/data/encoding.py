"""Token ids and labels of rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from plop_ext.arguments import check_choice, check_type, check_whole, shown
from plop_ext.data.formats import IGNORED, Format, recognize, renamed
from plop_ext.data.rows import located
from plop_ext.data.tokens import TokenEncoder
from plop_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class _Tokens(TypedDict):
    input_ids: list[int]
    labels: list[int]


class Encoded(_Tokens, total=False):
    """One sample: `labels` repeats `input_ids`, with -100 for tokens that do not count; `row` is its row number."""

    row: int


def encode(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: str | Mapping[str, str] | None = None,
    mask: Literal["attention", "completion"] = "attention",
    max_length: int = 1024,
) -> list[Encoded]:
    """Tokenize rows as a trainer does, and label the tokens that count.

    The format of the rows is recognized by the columns of the first, in this order, and logged:

    - `input_ids`: token ids, used as they are. `labels` of -100 do not count; without labels, the tokens count that
      `completion_mask` and `assistant_masks` do not leave out. Padding by `attention_mask` is removed.
    - `messages`, a list of messages with `role` and `content`, rendered by the tokenizer's chat template. The tokens
      of assistant turns count: those inside the template's `{% generation %}` marks. In a template without marks, a
      turn reaches from the generation prompt to the end-of-turn marker, which counts too. All turns are found in the
      one rendering that is tokenized, so that a template may render earlier turns otherwise than the last.
    - `conversations`, the same with `from` and `value` (ShareGPT), perhaps with the system message in `system`.
    - `chosen`, the preferred answer to `prompt`, or to what it has in common with `rejected`. The answer counts.
    - `prompt` and `completion`, two strings or two lists of messages. Strings are tokenized as one text, with the
      end-of-sequence token if the tokenizer has one. The completion counts: the tokens from the first on in which the
      sample differs from the prompt alone. Lists of messages are rendered as one chat.
    - `text`, tokenized with the tokenizer's special tokens. Every token counts.
    - `instruction`, perhaps with `input`, and `output` (Alpaca): one exchange of a chat, or Alpaca's own prompt if the
      tokenizer has no chat template. The output counts.

    The columns `tools` and `documents`, and the entries of `chat_template_kwargs`, reach the chat template. Text that
    is rendered already and starts with the beginning-of-sequence token gets no second one.

    Samples are truncated at their end to `max_length`. Rows without a token that counts are dropped: rows of special
    tokens only, as of an empty text, and with `mask="completion"` also a prompt of `max_length` tokens and a chat
    without an assistant turn. The log gives the number of truncated and of dropped samples.

    Args:
        rows: Rows, as returned by `load_rows`. All rows must have the columns by which the first row is recognized.
        tokenizer: Tokenizer of the model.
        columns: Column to read under each of the names above, as in `{"prompt": "question", "completion": "answer"}`;
            only formats with one of these names are then considered. A string names the column of plain text.
        mask: Tokens that will count: all, or with `"completion"` the labelled ones. `"completion"` refuses plain text,
            which has no completion. The samples carry both kinds of mask in either case.
        max_length: Largest length of a sample in tokens. Lower it if memory is short.

    Returns:
        One dict for each row kept, in the order of the rows. `row` is its number in the data set if `rows` come from
        `load_rows`, otherwise its position in `rows`.

    Raises:
        InputError: If a column is missing or holds another type, the tokenizer lacks a chat template, the template or
            the tokenizer refuses a row, `mask` does not fit the rows, or no row has a token that counts.

    Example:
        >>> from plop_ext.data import encode, load_rows
        >>> from plop_ext.models import load_model
        >>> _, tokenizer = load_model("plop-tiny")
        >>> samples = encode(load_rows("prose", max_samples=2), tokenizer)
        >>> samples[0]["labels"] == samples[0]["input_ids"]
        True
    """
    check_choice(("attention", "completion"), mask=mask)
    check_whole(max_length=max_length, required=True)
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"`rows` must be a list of dicts, got {shown(rows)}")
    check_type((str, Mapping, type(None)), "a column, or columns by name", columns=columns)
    if not callable(tokenizer) or not hasattr(tokenizer, "all_special_ids"):
        raise InputError(f"`tokenizer` must be a tokenizer of transformers, got {shown(tokenizer)}")
    if not rows:
        raise InputError("`rows` is empty; give at least one")
    found, mapping = renamed(located(rows), columns)
    kind = recognize(found, mapping)
    _check_mask(mask, kind)
    logger.info("reading %d row%s as %s", len(rows), "s" * (len(rows) > 1), kind.describe())
    encoder = TokenEncoder(tokenizer)
    has_template = bool(tokenizer.chat_template)
    encoded: list[Encoded] = []
    special = _special_ids(tokenizer)
    truncated = 0
    for row, number, place in zip(found, found.numbers, found.places, strict=True):
        input_ids, labels = encoder.encode(kind.read(row, place, has_template), place)
        truncated += len(input_ids) > max_length
        sample = Encoded(input_ids=input_ids[:max_length], labels=labels[:max_length], row=number)
        if counted_tokens(sample) if mask == "completion" else not special.issuperset(sample["input_ids"]):
            encoded.append(sample)
    if encoder.unplaced:
        logger.warning(
            "%d assistant turns do not count: the chat template does not render them, or renders them twice",
            encoder.unplaced,
        )
    if truncated:
        logger.warning("%d of %d samples were truncated to `max_length` = %d tokens", truncated, len(rows), max_length)
    if not encoded:
        raise InputError(
            f"no row has a token to count in {kind.describe()} within `max_length` = {max_length}; give longer texts"
            + ", shorter prompts, or chats with an assistant turn" * (mask == "completion")
        )
    if len(encoded) < len(rows):
        logger.warning("%d of %d samples were dropped: no token to count", len(rows) - len(encoded), len(rows))
    return encoded


def check_encoded(encoded: Any, name: str) -> None:
    """Check that an argument is a list of samples as `encode` returns them, and not empty.

    Raises:
        InputError: If it is not; the message calls it `name`.
    """
    check_type(Sequence, "a list of encoded samples", **{name: encoded})
    if not len(encoded):
        raise InputError(f"`{name}` is empty; give at least one sample")
    if not all(isinstance(sample, Mapping) and "input_ids" in sample and "labels" in sample for sample in encoded):
        raise InputError(f"`{name}` must hold samples as `encode` returns them, with `input_ids` and `labels`")


def counted_tokens(sample: Encoded) -> int:
    """Return how many tokens of a sample a causal model predicts: all that count except the sample's first token."""
    return sum(label != IGNORED for label in sample["labels"][1:])


def _check_mask(mask: str, kind: Format) -> None:
    """Check that rows of this format have completions if the mask asks for them."""
    if mask == "completion" and not kind.completions:
        raise InputError(
            f"`mask`='completion' needs chats, or prompts and completions, and the rows are {kind.describe()};"
            " leave it at 'attention'"
        )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that represent no text; the unknown token does, unless it has another role too."""
    roles = {getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "sep", "cls", "pad", "mask")}
    return set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - roles)
