"""Read JSON values one after the other from text that comes in pieces, with their lines.

A file of any size is read within the memory of its largest row. Stricter than Python's `json`:
repeated keys, NaN and infinities are errors, as is nesting that would exhaust the stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ggft.system.errors import InputError

_BLANKS = " \t\r\n"
_BLANK = re.compile(f"[{_BLANKS}]+")
_END = "the end of the file"
_NEAR_END = 16  # an error this close to the end of what was read may only mean "not all there yet"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is repeated")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def parse_line(text: str, path: Path, line: int) -> Any:
    """Return the value that a line of JSONL holds.

    Raises:
        InputError: Malformed; names line and column.
    """
    try:
        value, end = _DECODER.raw_decode(text, len(text) - len(text.lstrip(_BLANKS)))
    except json.JSONDecodeError as e:
        raise _malformed(e.msg, path, line, text[e.pos : e.pos + 20], e.pos + 1) from None
    except ValueError as e:
        raise _malformed(str(e), path, line) from None
    except RecursionError:
        raise _malformed("nested too deeply", path, line) from None
    if text[end:].strip(_BLANKS):
        raise _malformed("text after the value", path, line, text[end : end + 20], end + 1)
    return value


def _malformed(
    message: str, path: Path, line: int, found: str = "", column: int | None = None
) -> InputError:
    where = f" at column {column}" if column else ""
    return InputError(
        f"malformed JSON{where}: {message.removesuffix(' at')}",
        path=path,
        line=line,
        found=repr(found) if found else None,
        expected="one JSON value after the other, in double quotes what is text",
        hint="correct this line; line breaks inside a text are written \\n",
    )


class JsonStream:
    """The values of a JSON text: the elements of an array, or of `{"data": [...]}`, or objects.

    Args:
        path: The file, for messages.
        piece: Returns the next piece of text, empty at the end.
        wrappers: Keys of a top-level object whose array holds the rows.
        max_chars: Longest row.
        line: Line at which the text begins.
    """

    def __init__(
        self,
        path: Path,
        piece: Callable[[], str],
        wrappers: tuple[str, ...],
        max_chars: int,
        line: int = 1,
    ) -> None:
        self._path = path
        self._piece = piece
        self._wrappers = wrappers
        self._max_chars = max_chars
        self._text = ""
        self._pos = 0
        self._line = line  # of self._pos
        self._ended = False

    def values(self) -> Iterator[tuple[Any, int]]:
        """Yield each value with the line it begins at."""
        while self._peek():
            if self._peek() == "[":
                yield from self._array()
            elif self._peek() == "{":
                yield from self._object()
            else:
                self._fail("expected `[` or `{`")

    def _array(self) -> Iterator[tuple[Any, int]]:
        self._take("[")
        if self._peek() == "]":
            self._take("]")
            return
        while True:
            yield self._value()
            if self._peek() == "]":
                self._take("]")
                return
            self._take(",")

    def _object(self) -> Iterator[tuple[Any, int]]:
        """Yield the rows that an object wraps, or the object itself."""
        members: dict[str, Any] = {}
        self._peek()
        first = self._line
        wrapped = False
        self._take("{")
        while self._peek() != "}":
            if members:
                self._take(",")
            if self._peek() != '"':
                self._fail("expected a key in double quotes")
            key, _ = self._value()
            if key in members:
                self._fail(f"the key {key!r} is repeated")
            self._take(":")
            if key in self._wrappers and self._peek() == "[":
                members[key] = None
                wrapped = True
                yield from self._array()
            else:
                members[key], _ = self._value()
        self._take("}")
        if not wrapped:
            yield members, first

    def _value(self) -> tuple[Any, int]:
        """Return the value at the position and its line; read on until it is complete."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._pos)
            except json.JSONDecodeError as e:
                cut = e.pos > len(self._text) - _NEAR_END or e.msg.startswith("Unterminated string")
                if cut and not self._ended:
                    self._grow()
                    continue
                line = self._line + self._text.count("\n", self._pos, e.pos)
                found = self._text[e.pos : e.pos + 20] or _END
                raise _malformed(e.msg, self._path, line, found) from None
            except ValueError as e:
                raise _malformed(str(e), self._path, self._line) from None
            except RecursionError:
                raise _malformed("nested too deeply", self._path, self._line) from None
            if end >= len(self._text) and not self._ended:
                self._grow()  # a number may go on
                continue
            line = self._line
            self._advance(end)
            return value, line

    def _grow(self) -> None:
        """Read at least as much again as the current value has, so that work stays linear."""
        self._text, self._pos = self._text[self._pos :], 0
        if len(self._text) > self._max_chars:
            self._fail(f"a row is longer than {self._max_chars} characters")
        pieces, wanted = [self._text], max(1, len(self._text))
        while wanted > 0 and not self._ended:
            piece = self._piece()
            self._ended = not piece
            pieces.append(piece)
            wanted -= len(piece)
        self._text = "".join(pieces)

    def _peek(self) -> str:
        """Return the next character that is not blank, without taking it; empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._pos)
            n = self._pos if blank is None else blank.end()
            self._advance(n)
            if n < len(self._text):
                return self._text[n]
            if self._ended:
                return ""
            self._grow()

    def _take(self, wanted: str) -> None:
        found = self._peek()
        if found != wanted:
            self._fail(f"expected {wanted!r}")
        self._advance(self._pos + 1)

    def _advance(self, pos: int) -> None:
        self._line += self._text.count("\n", self._pos, pos)
        self._pos = pos

    def _fail(self, message: str) -> NoReturn:
        found = self._text[self._pos : self._pos + 20] or _END
        raise _malformed(message, self._path, self._line, found)
