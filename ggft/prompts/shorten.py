"""Leave out of a conversation what its first tokens do not depend on, before it is tokenized.

A token stands for at most as many characters as the longest one has, so that a text's beginning
tells its first tokens. How far the end of a cut text reaches back is bounded: a text is cut at a
space, `MARGIN` characters behind what is needed, which no word and no chain of merges spans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ggft.prompts.marks import is_filled
from ggft.prompts.messages import Message

MARGIN = 1 << 15
_MODELS = ("gpt2", "llama")  # vocabularies whose tokens are made by merges
_WORD_END = re.compile(r"\S(?=\s)")
_VISIBLE = re.compile(r"\S")


class Shortener:
    """Shortens conversations for one vocabulary.

    Args:
        metadata: The model's key-value pairs.
    """

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata
        self._longest: int | None = None

    def shorten(self, messages: Sequence[Message], n_tokens: int) -> Sequence[Message]:
        """Return a conversation with the same first `n_tokens` tokens, and more if it had.

        It ends with an answer if it had one.
        """
        if len(messages) <= n_tokens and all(
            len(m["content"]) + len(m.get("input", "")) <= MARGIN for m in messages
        ):
            return messages
        longest = self._longest_token()
        if not longest:
            return messages
        left = n_tokens + 1
        kept: list[Message] = []
        for message in messages:
            texts = {
                key: _cut(str(message[key]), max(left, 0) * longest)
                for key in ("content", "input")
                if key in message
            }
            kept.append({**message, **texts})  # type: ignore[typeddict-item]
            left -= sum(-(-len(text) // longest) for text in texts.values() if is_filled(text))
            if left <= 0 and message["role"] == "assistant":
                break
        return kept

    def _longest_token(self) -> int:
        """Return the characters of the longest token; 0 where that does not bound a text's."""
        if self._longest is None:
            tokens = self._metadata.get("tokenizer.ggml.tokens")
            known = self._metadata.get("tokenizer.ggml.model") in _MODELS
            self._longest = 0
            if known and isinstance(tokens, Sequence):
                self._longest = max((len(token) for token in tokens), default=0)
        return self._longest


def _cut(text: str, n_chars: int) -> str:
    """Return the beginning of a text, at least `n_chars` characters that are not blank in front."""
    first = _VISIBLE.search(text)
    if first is None:
        return text
    end = first.start() + n_chars + MARGIN
    if end >= len(text):
        return text
    place = _WORD_END.search(text, end, end + MARGIN) or _VISIBLE.search(text, end)
    return text if place is None else text[: place.end()]
