"""Chats rendered to text by the tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plop_ext.data.formats import Chat, Message
from plop_ext.data.rows import Place
from plop_ext.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """Renders one chat, whole or changed, with the variables of its row.

    Args:
        tokenizer: Tokenizer of the model.
        chat: The chat.
        place: Where it was found, for error messages.

    Raises:
        InputError: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, place: Place) -> None:
        self.tokenizer = tokenizer
        self._variables = chat.variables
        self._place = place
        try:
            template = tokenizer.get_chat_template(tools=chat.variables.get("tools"))
        except ValueError as error:
            raise InputError(
                "`tokenizer` has no chat template for messages; use the tokenizer of a chat model, set"
                " `tokenizer.chat_template`, or give `prompt` and `completion` strings"
            ) from error
        self.marked = bool(_GENERATION.search(self._variables.get("chat_template") or template))

    def text(self, messages: Sequence[Message]) -> str:
        """Render messages.

        Raises:
            InputError: If the template refuses them.
        """
        return self._apply(messages, tokenize=False)

    def attempt(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """Render messages, perhaps with the generation prompt; None if the template refuses them."""
        try:
            return self._apply(messages, tokenize=False, **({"add_generation_prompt": True} if prompt else {}))
        except InputError:
            return None

    def marked_tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokenize messages; the template's `{% generation %}` marks say which tokens count.

        Raises:
            InputError: If the template refuses them.
        """
        out = self._apply(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return out["input_ids"], [bool(flag) for flag in out["assistant_masks"]]

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        """Apply the chat template; if it raises, name the row."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), **{**self._variables, **options})
        except Exception as error:  # a template is a program, and may raise any error
            raise InputError(
                f"`rows`: {self._place}: the chat template of `tokenizer` refuses the messages ({first_line(error)});"
                " check roles, contents and tools"
            ) from error
