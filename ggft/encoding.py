"""Text to token ids, as llama.cpp tokenizes the whole rendering, but in pieces we control.

Fixed text may hold special tokens, contents may not. Text between special tokens is tokenized in
one piece, whoever wrote it, except at the border between prompt and answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from .chat_template import Side
from .errors import InputError

_BLANKS = " \t\n\r\v\f"  # what C's isspace calls so


class Tokenizer(Protocol):
    """What templates need of a tokenizer; `ggft.llamacpp.LlamaTokenizer` is one."""

    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    n_vocab: int
    add_bos: bool

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return token ids without BOS; parse special tokens in the text only if `special`."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of ids."""
        ...

    def token_text(self, token: int) -> str:
        """Return a token's text as the vocabulary has it."""
        ...


@dataclass(frozen=True)
class Tokens:
    """An example as token ids; `trained[i]`: the model learns to produce token i."""

    ids: list[int]
    trained: list[bool]

    @property
    def n_trained(self) -> int:
        """Number of tokens that count in the loss (the first token is never predicted)."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class SpecialToken:
    """A special token in a template's fixed text, and the blanks that it swallows."""

    id: int
    text: str
    strips_left: bool
    strips_right: bool


class Run:
    """Collects text between special tokens and tokenizes it in one piece.

    Args:
        tokenizer: The tokenizer.
        space_prefix: Whether it puts a space before text that follows a special token.
        literal_ids: Ids of fixed texts met before, shared between runs.
    """

    def __init__(
        self, tokenizer: Tokenizer, space_prefix: bool, literal_ids: dict[str, list[int]]
    ) -> None:
        self._tokenizer = tokenizer
        self._space_prefix = space_prefix
        self._literal_ids = literal_ids
        self._text: list[str] = []
        self._content = False  # whether a message's content is in the text
        self._side = Side.PROMPT
        self._learn = False
        self._fresh = True  # whether the text begins at the start or after a special token
        self._strip = False
        self.ids: list[int] = []
        self.trained: list[bool] = []

    def unit(self, unit: str | SpecialToken, side: Side, learn: bool) -> None:
        """Append fixed text or a special token."""
        if isinstance(unit, str):
            self.text(unit, side, learn, content=False)
            return
        self.flush(strip_right=unit.strips_left)
        self.token(unit.id, learn)
        self._strip = unit.strips_right

    def token(self, token: int, learn: bool) -> None:
        """Append a token that stands for itself."""
        self.flush()
        self.ids.append(token)
        self.trained.append(learn)
        self._fresh = True

    def text(self, text: str, side: Side, learn: bool, *, content: bool) -> None:
        """Append text; where the side changes, the text before is tokenized by itself."""
        if side is not self._side or learn != self._learn:
            self.flush()
            self._side, self._learn = side, learn
        self._text.append(text)
        self._content = self._content or content

    def flush(self, *, strip_right: bool = False) -> None:
        """Tokenize what was collected."""
        text = "".join(self._text)
        literal = not self._content
        self._text.clear()
        self._content = False
        if self._strip:
            text = text.lstrip(_BLANKS)
        if strip_right:
            text = text.rstrip(_BLANKS)
        if not text:
            return
        if not (self._fresh or not self._space_prefix):
            ids = encode_continuation(self._tokenizer, text)
        elif literal and text in self._literal_ids:
            ids = self._literal_ids[text]
        else:
            ids = self._tokenizer.encode(text, special=False)
            if literal:
                self._literal_ids[text] = ids
        self._fresh = self._strip = False
        self.ids += ids
        self.trained += [self._learn] * len(ids)


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize text that goes on after other text, for a tokenizer that begins with a space.

    A control character stands in for the text before: it merges with nothing.
    """
    before = tokenizer.encode("\x02", special=False)
    ids = tokenizer.encode("\x02" + text, special=False)
    if ids[: len(before)] != before:
        raise InputError("this vocabulary merges control characters with text")
    return ids[len(before) :]


def find_special(tokenizer: Tokenizer, token: int) -> SpecialToken | None:
    """Return what is to be known of a token if it is special, else None; found out by trying."""
    encode, text = tokenizer.encode, tokenizer.token_text(token)
    if not text or encode(text, special=True) != [token] or encode(text, special=False) == [token]:
        return None
    return SpecialToken(
        token,
        text,
        strips_left=encode("x \n" + text, special=True)[:-1] != encode("x \n", special=False),
        strips_right=encode(text + "\n x", special=True)[1:] != encode("\n x", special=False),
    )
