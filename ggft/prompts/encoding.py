"""Text to token ids, as llama.cpp tokenizes the whole rendering, but in pieces we control.

Fixed text may hold special tokens, contents may not. Text between special tokens is tokenized in
one piece, whoever wrote it, except at the border between prompt and answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ggft.prompts.marks import Side
from ggft.system.errors import InputError

MAX_FIXED = 1 << 14  # texts of templates that are kept; rows with tools have their own
STAND_IN = "\x02"  # for text before; a control character merges with nothing
_BLANKS = " \t\n\r\v\f"  # what C's isspace calls so


class Tokenizer(Protocol):
    """What templates need of a tokenizer; `ggft.llama.model.LlamaTokenizer` is one."""

    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    n_vocab: int
    add_bos: bool

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token at which llama.cpp ends a generation."""
        ...

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
    """An example as token ids; `trained[i]` is 1 where the model learns to produce token i."""

    ids: array[int]
    trained: bytes

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


class Segment(NamedTuple):
    """Text that is tokenized in one piece, or a token that stands for itself.

    Attributes:
        what: The text, not empty, or the token's id.
        learn: Whether the model learns to produce it.
        fixed: Whether all of the text is the template's own.
        goes_on: Whether it goes on after other text and a space must not be put before it; the
            text then begins with `STAND_IN`, whose tokens are taken away again.
    """

    what: str | int
    learn: bool
    fixed: bool = False
    goes_on: bool = False


class Run:
    """Collects text between special tokens into segments.

    Args:
        space_prefix: Whether the tokenizer puts a space before text that follows a special token.
    """

    def __init__(self, space_prefix: bool) -> None:
        self._space_prefix = space_prefix
        self._text: list[str] = []
        self._content = False  # whether a message's content is in the text
        self._side = Side.PROMPT
        self._learn = False
        self._fresh = True  # whether the text begins at the start or after a special token
        self._strip = False
        self.segments: list[Segment] = []

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
        self.segments.append(Segment(token, learn))
        self._fresh = True

    def text(self, text: str, side: Side, learn: bool, *, content: bool) -> None:
        """Append text; where the side changes, the text before is a segment by itself."""
        if side is not self._side or learn != self._learn:
            self.flush()
            self._side, self._learn = side, learn
        self._text.append(text)
        self._content = self._content or content

    def flush(self, *, strip_right: bool = False) -> None:
        """Make a segment of what was collected."""
        if not self._text:
            return
        text = "".join(self._text)
        fixed = not self._content
        self._text.clear()
        self._content = False
        if self._strip:
            text = text.lstrip(_BLANKS)
        if strip_right:
            text = text.rstrip(_BLANKS)
        if not text:
            return
        goes_on = self._space_prefix and not self._fresh
        text = STAND_IN + text if goes_on else text
        self.segments.append(Segment(text, self._learn, fixed, goes_on))
        self._fresh = self._strip = False


class Encoder:
    """Turns segments into tokens; a template's own text is tokenized once.

    Args:
        encode_all: Returns the token ids of plain texts, without BOS.
    """

    def __init__(self, encode_all: Callable[[Sequence[str]], list[array[int]]]) -> None:
        self._encode_all = encode_all
        self._fixed: dict[str, array[int]] = {}

    def tokens(self, examples: Sequence[Sequence[Segment]]) -> list[Tokens]:
        """Return the tokens of examples, each given as segments.

        Raises:
            InputError: A text cannot be tokenized.
        """
        if len(self._fixed) > MAX_FIXED:
            self._fixed = {}  # other threads go on with the one that they have
        own = self._fixed
        fixed = {
            segment.what: segment.fixed
            for segments in examples
            for segment in segments
            if isinstance(segment.what, str) and segment.what not in own
        }
        new = dict(zip(fixed, self._encode_all(list(fixed)), strict=True))
        own.update((text, ids) for text, ids in new.items() if fixed[text])
        return [self._join(segments, new, own) for segments in examples]

    def _join(
        self,
        segments: Sequence[Segment],
        new: Mapping[str, array[int]],
        own: Mapping[str, array[int]],
    ) -> Tokens:
        ids = array("i")
        trained = bytearray()
        for what, learn, _, goes_on in segments:
            if isinstance(what, int):
                ids.append(what)
                trained.append(learn)
                continue
            more = own[what] if what in own else new[what]
            more = self._continued(more) if goes_on else more
            ids += more
            trained += bytes((learn,)) * len(more)
        return Tokens(ids, bytes(trained))

    def _continued(self, ids: array[int]) -> array[int]:
        """Return ids without those of `STAND_IN`, with which they begin."""
        before = self._encode_all([STAND_IN])[0]
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
