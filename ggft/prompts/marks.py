"""Renderings with markers in place of what messages say: cut apart, and filled again.

A marker is a number between two characters that no text has. Every message has three: what it says,
its input and its thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from ggft.prompts.messages import Message

MARK_OPEN, MARK_CLOSE = "\ue0c5", "\ue0c6"  # private use; a template that has them is refused
_MARK = re.compile(f"{MARK_OPEN}(\\d+){MARK_CLOSE}")
N_SLOTS = 3  # of a message: content, input, reasoning
SHOWN_CHARS = 40


class Side(IntEnum):
    """Who produces a part of the rendering."""

    PROMPT = 0  # given to the model
    ANSWER = 1  # produced by the model, the end token included
    END = 2  # produced by the model, an end that the template does not write behind a last answer


@dataclass(frozen=True)
class Item:
    """A part of a shape: fixed text, or the number of the content that stands there.

    Number 3i is the content of message i, 3i + 1 its input, 3i + 2 its thought. `turn` is the
    message whose answer this is, −1 for prompts.
    """

    what: str | int
    side: Side
    turn: int


class Span(NamedTuple):
    """Where the answer of a message stands in a rendering."""

    start: int
    stop: int
    turn: int


def mark(number: int) -> str:
    """Return the marker of a content."""
    return f"{MARK_OPEN}{number}{MARK_CLOSE}"


def in_words(text: str) -> str:
    """Return a marked rendering for people."""
    return _MARK.sub(lambda m: f"[message {int(m[1]) // N_SLOTS + 1}]", text)


def last_mark_end(text: str) -> int:
    """Return where the last marker of a rendering ends, 0 without one."""
    return text.rfind(MARK_CLOSE) + 1


def is_filled(text: str) -> bool:
    """Return whether there is more than blanks in a text."""
    return bool(text) and not text.isspace()


def contents(message: Message) -> tuple[str, str, str]:
    """Return the texts of a message that markers stand for."""
    return message["content"], message.get("input", ""), message.get("reasoning", "")


def marked(message: Message, index: int) -> Message:
    """Return a message with markers for its texts.

    Blank texts stay as they are, for templates ask whether there is text; but an answer's place
    must be known even if it is empty.
    """
    place = N_SLOTS * index
    always = message["role"] == "assistant" and "tool_calls" not in message
    out: Message = {**message}
    if always or is_filled(message["content"]):
        out["content"] = mark(place)
    if is_filled(message.get("input", "")):
        out["input"] = mark(place + 1)
    if is_filled(message.get("reasoning", "")):
        out["reasoning"] = mark(place + 2)
    return out


def cut(text: str, spans: Sequence[Span]) -> tuple[Item, ...]:
    """Cut a marked rendering at its markers and where answers begin and end."""
    items: list[Item] = []
    pos = 0
    for start, stop, turn in spans:
        _cut_piece(text[pos:start], Side.PROMPT, -1, items)
        _cut_piece(text[start:stop], Side.ANSWER, turn, items)
        pos = stop
    _cut_piece(text[pos:], Side.PROMPT, -1, items)
    return tuple(items)


def _cut_piece(text: str, side: Side, turn: int, items: list[Item]) -> None:
    pos = 0
    for found in _MARK.finditer(text):
        if found.start() > pos:
            items.append(Item(text[pos : found.start()], side, turn))
        items.append(Item(int(found[1]), side, turn))
        pos = found.end()
    if pos < len(text):
        items.append(Item(text[pos:], side, turn))


def fill(shape: tuple[Item, ...], texts: Sequence[str], whole: str) -> list[str] | None:
    """Put texts, as they are or as templates change them, into a shape; None if not `whole`."""
    filled = [x.what if isinstance(x.what, str) else texts[x.what] for x in shape]
    if "".join(filled) == whole:
        return filled
    filled, pos = [], 0
    for n, item in enumerate(shape):
        after = shape[n + 1].what if n + 1 < len(shape) else None
        options = [item.what] if isinstance(item.what, str) else _changed(texts[item.what])
        for text in options:
            end = pos + len(text)
            if whole.startswith(text, pos) and (
                not isinstance(after, str) or whole.startswith(after, end)
            ):
                break
        else:
            return None
        filled.append(text)
        pos = end
    return filled if pos == len(whole) else None


def _changed(text: str) -> list[str]:
    """Return a text as templates write it: stripped, or quoted in JSON."""
    plain = (text, text.strip(), text.lstrip(), text.rstrip())
    lines = (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    quoted = (json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return list(dict.fromkeys((*plain, *lines, *quoted)))


def after_common(text: str, other: str) -> str:
    """Return the first characters of `text` that `other` does not have in the same place."""
    n = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    n = min(len(text), len(other)) if n is None else n
    begun = text.rfind(MARK_OPEN, 0, n)
    n = begun if begun > text.rfind(MARK_CLOSE, 0, n) else n
    rest = in_words(text[n:])
    return repr(rest[:SHOWN_CHARS]) if rest else "nothing more"
