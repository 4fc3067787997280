"""Where the turns of a chat are in its rendering.

A chat template renders a conversation as a whole: it may drop what was thought in earlier turns, merge messages, or
end the last turn otherwise than the others. So no turn is looked for in the rendering of a part of the chat. The text
of a message is where the rendering changes once the message holds something else; around it are the generation prompt,
which the model receives, and the end of the turn, which it generates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plop_ext.data.formats import Message, is_assistant
from plop_ext.data.prefixes import common_prefix
from plop_ext.data.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# In no vocabulary and in no chat; no template strips, splits or escapes it.
_STAND_IN = "\U0010fffd"
# What an assistant generates besides the content of its message.
_GENERATED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class AddedTokens:
    """The tokens that a tokenizer takes out of a text before it looks at the rest.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._reach = max(map(len, names), default=0)
        added = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)

    def first_special(self, text: str) -> Span | None:
        """Return where the first special token of a text is."""
        found = (token for token in self._pattern.finditer(text) if token[0] in self._special)
        return next((token.span() for token in found), None)

    def before(self, text: str, place: int) -> int:
        """Return `place`, or the start of the token in which it lies."""
        for token in self._pattern.finditer(text, max(0, place - self._reach), place + self._reach):
            if token.start() < place < token.end():
                return token.start()
        return place


class Turns:
    """Finds turns in the rendering of one chat.

    Args:
        renderer: Renders the chat.
        messages: The messages of the chat.
        tokens: The added tokens of the tokenizer.

    Attributes:
        text: The rendering.
    """

    def __init__(self, renderer: Renderer, messages: list[Message], tokens: AddedTokens) -> None:
        self._renderer = renderer
        self._messages = messages
        self.text = renderer.text(messages)
        self._tokens = tokens
        assistant = [index for index, message in enumerate(messages) if is_assistant(message)]
        self._prompt = self._generation_prompt(assistant)
        self._closing = self._end_of_turn(assistant)

    def find(self, index: int, after: int = 0) -> Span | None:
        """Find what the model generates for a message, from the generation prompt to the end of the turn.

        Args:
            index: Number of the message.
            after: Where the previous turn ends.

        Returns:
            Start and end in the text; None if the template does not render the message, or renders it more than once.
        """
        changed = [self._change(self._messages, self.text, index, other) for other in _others(self._messages[index])]
        contents = [span for span in changed if span is not None and span[1] >= after]
        if not contents:
            return None
        start = max(after, self._start(min(start for start, _ in contents), contents[-1][1], after))
        if index + 1 == len(self._messages):
            return start, len(self.text)
        answer = self._tool_answer(index)
        if changed[0] is not None and changed[0][1] <= answer:
            return start, self._end(changed[0][1])
        # The template refuses the chat without the tool calls, or renders their answers otherwise. What follows the
        # calls is then what changes once the chat stops there.
        head = self._renderer.attempt(self._messages[: index + 1]) or ""
        cut = common_prefix(self.text, head)
        end = contents[-1][1]
        return start, cut if end <= cut <= answer else self._end(min(end, answer))

    def _tool_answer(self, index: int) -> int:
        """Return where the answer to a message's tool calls starts; without one, the end of the text."""
        if index + 1 < len(self._messages) and self._messages[index + 1]["role"] == "tool":
            other = {**self._messages[index + 1], "content": _STAND_IN}
            span = self._change(self._messages, self.text, index + 1, other)
            if span is not None:
                return span[0]
        return len(self.text)

    def _change(self, messages: Sequence[Message], text: str, index: int, other: Message) -> Span | None:
        """Return what of a text changes if `other` takes the place of a message; None if nothing does."""
        changed = self._renderer.attempt([*messages[:index], other, *messages[index + 1 :]])
        # A template that renders a message twice, as in a summary, does not say which of them is the answer.
        if changed is None or changed == text or (other.get("content") == _STAND_IN and changed.count(_STAND_IN) > 1):
            return None
        start = common_prefix(text, changed)
        limit = min(len(text), len(changed)) - start
        common = common_prefix(text[start:][::-1], changed[start:][::-1])
        end = len(text) - min(common, limit)
        return self._tokens.before(text, start), max(self._tokens.before(text, end), start)

    def _start(self, content: int, end: int, after: int) -> int:
        """Return where a turn starts whose content starts at `content`: behind the generation prompt."""
        if not self._prompt:
            # The model generates the space between an instruction and its answer.
            return after + len(self.text[after:content].rstrip(" "))
        # A generation prompt may open a block of thinking that belongs to the content of the message.
        found = self.text.rfind(self._prompt, after, min(end, content + len(self._prompt)))
        return content if found < 0 else found + len(self._prompt)

    def _end(self, content: int) -> int:
        """Return where a turn ends whose content ends at `content`."""
        text = self.text[content:]
        special = self._tokens.first_special(text)
        common = self._common(text)
        if common or special is None:
            return content + common
        start, end = special
        return content + max(end, start + self._common(text[start:]))

    def _common(self, text: str) -> int:
        """Return how much of the usual end of a turn a text starts with: all of it, or a special token and more."""
        common = self._tokens.before(text, common_prefix(text, self._closing))
        return common if common == len(self._closing) or self._tokens.first_special(text[:common]) else 0

    def _generation_prompt(self, assistant: list[int]) -> str:
        """Return what the template adds for the assistant to continue; empty if it adds nothing."""
        histories = [self._messages[:index] for index in assistant if index]
        # After a tool some templates add nothing, because the assistant's turn goes on.
        histories.sort(key=lambda history: history[-1]["role"] == "tool")
        for history in [*histories[:1], self._messages]:
            plain, prompted = self._renderer.attempt(history), self._renderer.attempt(history, prompt=True)
            if plain is not None and prompted is not None:
                added = prompted[self._tokens.before(prompted, common_prefix(plain, prompted)) :]
                return added if added.strip() else ""
        return ""

    def _end_of_turn(self, assistant: list[int]) -> str:
        """Return what the template writes behind the last message of a chat that ends with the assistant."""
        if not assistant:
            return ""
        last = assistant[-1]
        messages = self._messages[: last + 1]
        text = self.text if last + 1 == len(self._messages) else self._renderer.attempt(messages)
        span = text and self._change(messages, text, last, _others(messages[last])[0])
        return text[span[1] :] if text and span else ""


def _others(message: Message) -> list[Message]:
    """Return messages whose renderings differ from a message's in what was generated, the most different first."""
    plain = {name: value for name, value in message.items() if name not in _GENERATED}
    content = message.get("content")
    plain["content"] = _replaced(content) if isinstance(content, list) else _STAND_IN
    if not message.get("tool_calls"):
        return [plain]
    # A message without its tool calls may be refused, or change the tool messages that follow.
    return [plain, {name: _replaced(value) if name != "role" else value for name, value in message.items()}]


def _replaced(value: Any, key: str = "") -> Any:
    """Return a value with the stand-in for its texts, except for those by which templates tell parts apart."""
    if isinstance(value, dict):
        return {name: _replaced(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, key) for item in value]
    if key in ("type", "id", "name", "tool_call_id") or value is None:
        return value
    return _STAND_IN if value != "" else value
