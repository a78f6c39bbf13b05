"""Read the containers that training data comes in, row by row, with the line each row begins at.

JSON arrays, `{"data": […]}`, JSONL, CSV, TSV and documents, each also gzipped, in UTF-8 with or
without a byte order mark; and Parquet. A file is read once, in pieces; memory follows the largest
row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ggft.data.sources.find import SUFFIXES, check_regular, suffix_of
from ggft.data.sources.json_stream import JsonStream, parse_line
from ggft.data.sources.parquet import MAGIC, parquet_rows
from ggft.data.sources.standard_input import STDIN, open_stdin
from ggft.system.errors import InputError
from ggft.system.raw_file import RawFile

_CONVERT = "give data as JSON, JSONL, CSV, TSV or text; export or convert it first"
MAX_ROW_BYTES = 64 << 20  # one row; beyond it the file is not what it seems
CHUNK_BYTES = 1 << 18
PART_CHARS = 3000  # of a document in a row, more to the end of the paragraph
MOST_PARAGRAPHS = 4  # times as long may a part be without a blank line
MOVED_ROWS = 64  # between two looks at how far a file is read
WRAPPER_KEYS = ("data", "train", "rows", "examples", "instances")
_FOREIGN = (
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"PK\x03\x04", "a zip archive"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file"),
    (b"GGUF", "a GGUF model"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
)


@dataclass(frozen=True)
class Row:
    """A row as its container gives it: a mapping, or a string for a part of a document.

    Attributes:
        value: What it holds.
        path: The file.
        line: 1-based line at which it begins.
        ends: Whether a document ends with it.
    """

    value: dict[str, Any] | str
    path: Path
    line: int
    ends: bool = True


def read_rows(path: Path, moved: Callable[[int], object] = lambda _: None) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        path: The file.
        moved: Called now and then with the number of bytes read so far.

    Raises:
        InputError: The file cannot be read, is of another kind, or is malformed; names the line.
    """
    check_regular(path)
    try:
        with open_stdin() if path == STDIN else path.open("rb") as raw:
            start = raw.read(64)
            raw.seek(0)
            if start.startswith(MAGIC):
                for value, number in parquet_rows(path, raw):
                    yield Row(value, path, number)
                    if number % MOVED_ROWS == 0:
                        moved(raw.tell())
                return
            is_packed = start[:2] == b"\x1f\x8b"
            with gzip.open(raw) if is_packed else nullcontext(raw) as plain:
                for n, row in enumerate(_rows(path, plain)):  # type: ignore[arg-type]
                    yield row
                    if n % MOVED_ROWS == 0:
                        moved(raw.tell())
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise InputError(
            f"damaged gzip file: {e}",
            path=path,
            expected="a complete one",
            hint="download or pack the file again",
        ) from None
    except OSError as e:
        raise InputError(f"cannot read the data: {e.strerror}", path=path) from None


def _rows(path: Path, raw: BinaryIO) -> Iterator[Row]:
    source = _Source(path, raw)
    kind = source.sniff()
    if kind == "jsonl":
        return _jsonl_rows(source)
    if kind == "json":
        return _json_rows(source)
    if kind == "table":
        return _table_rows(source, "\t" if suffix_of(path) == ".tsv" else ",;")
    return _text_rows(source)


class _Source:
    """A file's text, by lines or by pieces, with the number of the line read last."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.path = path
        self.line = 0
        start = 0
        while (head := raw.read(CHUNK_BYTES)) and not head.strip():
            start += len(head)
            self.line += head.count(b"\n")
        self._head = head
        raw.seek(start)
        lone_cr = b"\r" in self._head and b"\n" not in self._head
        self._raw = io.BufferedReader(RawFile(raw, lone_cr=lone_cr), CHUNK_BYTES)
        if lone_cr:
            self._head = self._head.replace(b"\r", b"\n")
        for magic, what in _FOREIGN:
            if self._head.startswith(magic):
                self.fail(f"this is {what}", 1, "JSON, JSONL, CSV, TSV or text in UTF-8", _CONVERT)
        if self._head.startswith(b"\xef\xbb\xbf"):
            self._head = self._head[3:]
            self._raw.read(3)
        if not self._head.strip():
            self.fail("the file is empty", 1, "at least one example", "check the path")

    def fail(self, message: str, line: int, expected: str, hint: str) -> NoReturn:
        raise InputError(message, path=self.path, line=line, expected=expected, hint=hint)

    def sniff(self) -> str:
        """Return the kind of container: by the name, for JSON by what the text begins with."""
        suffix, start = suffix_of(self.path), self._head.lstrip()
        if suffix in (".csv", ".tsv"):
            return "table"
        if suffix in (".txt", ".text", ".md"):
            return "text"
        if suffix in (".jsonl", ".ndjson") and start[:1] != b"[":
            return "jsonl"
        if start[:1] == b"[":
            return "json"
        if start[:1] == b"{":
            return "jsonl" if _whole_object(start.split(b"\n", 1)) else "json"
        if suffix not in (".json", ".jsonl", ".ndjson"):
            self.fail("unknown kind of data file", 1, "one of " + " ".join(SUFFIXES), _CONVERT)
        line = self._head[: -len(start)].count(b"\n") + 1
        return self.fail("malformed JSON", line, "`[` or `{` at the start", _CONVERT)

    def lines(self) -> Iterator[str]:
        """Yield lines without their ends (LF or CRLF)."""
        while data := self._raw.readline(MAX_ROW_BYTES):
            self.line += 1
            if len(data) >= MAX_ROW_BYTES:
                self.fail(
                    "a line is too long", self.line, f"at most {MAX_ROW_BYTES} bytes", _CONVERT
                )
            yield self._decode(data).rstrip("\r\n")

    def skip_blank_lines(self, blanks: bytes = b" \t\r\n") -> None:
        """Go on behind lines of `blanks` only, however many they are."""
        while ahead := self._raw.peek(1):
            n_blank = len(ahead) - len(ahead.lstrip(blanks))
            end = ahead.rfind(b"\n", 0, n_blank) + 1
            if not end:
                return
            self.line += ahead.count(b"\n", 0, end)
            self._raw.read(end)

    def piece(self) -> str:
        """Return the next piece, which ends with a line if it can; empty at the end."""
        data = self._raw.read(CHUNK_BYTES)
        if data:
            data += self._raw.readline(CHUNK_BYTES)
            for _ in range(3):  # a character may be cut, if no line ended
                if _is_cut(data):
                    data += self._raw.read(1)
        text = self._decode(data)
        self.line += text.count("\n")
        return text

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            line = max(self.line, 1) + data.count(b"\n", 0, e.start)
            bad = data[e.start : e.start + 4].hex(" ")
            raise InputError(
                "the text is not UTF-8",
                path=self.path,
                line=line,
                found=f"bytes {bad}",
                hint="save the file as UTF-8",
            ) from None


def _is_cut(data: bytes) -> bool:
    """Whether the bytes end within a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False


def _whole_object(lines: list[bytes]) -> bool:
    """Whether the first line is a complete row by itself, as in JSONL."""
    if len(lines) < 2:
        return False
    try:
        value = json.loads(lines[0])
    except (ValueError, RecursionError):
        return False
    alone = not lines[1].strip()
    return not (alone and any(isinstance(value.get(k), list) for k in WRAPPER_KEYS))


def _json_rows(source: _Source) -> Iterator[Row]:
    stream = JsonStream(
        source.path, source.piece, WRAPPER_KEYS, MAX_ROW_BYTES, line=source.line + 1
    )
    return (_row(source.path, value, line) for value, line in stream.values())


def _jsonl_rows(source: _Source) -> Iterator[Row]:
    for text in source.lines():
        if not text.strip():
            source.skip_blank_lines()
        else:
            yield _row(source.path, parse_line(text, source.path, source.line), source.line)


def _row(path: Path, value: Any, line: int) -> Row:
    if isinstance(value, dict):
        return Row(value, path, line)
    raise InputError(
        "a row is not a JSON object",
        path=path,
        line=line,
        found=_KINDS.get(type(value), "a value"),
        expected='{"instruction": …, "output": …} or the like',
        hint="correct or remove this row",
    )


_KINDS = {
    str: "a string",
    list: "an array",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _text_rows(source: _Source) -> Iterator[Row]:
    """Yield a document in parts of some paragraphs; together they are its text."""
    part: list[str] = []
    size, first, blank = 0, 1, False
    for text in source.lines():
        between = size > PART_CHARS and (blank or size > MOST_PARAGRAPHS * PART_CHARS)
        blank = not text.strip()
        if between and not blank:
            yield Row("".join(part), source.path, first, ends=False)
            part, size = [], 0
        if not part:
            first = source.line
        if part or not blank:
            part.append(text + "\n")
            size += len(text) + 1
        if blank:
            source.skip_blank_lines()
    yield Row("".join(part).rstrip(), source.path, first)


def _table_rows(source: _Source, delimiters: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns."""
    lines = source.lines()
    header = next(lines)
    delimiter = max(delimiters, key=header.count)
    csv.field_size_limit(MAX_ROW_BYTES)
    columns = [c.strip() for c in next(csv.reader([header], delimiter=delimiter), [])]
    if len(set(columns)) != len(columns) or "" in columns:
        source.fail(
            f"the header has empty or repeated columns: {', '.join(columns)}",
            1,
            "a name of its own for each column",
            "correct the first line",
        )
    reader = csv.reader((f"{x}\n" for x in lines), delimiter=delimiter, strict=True)
    while True:
        line = source.line + 1
        try:
            values = next(reader, None)
        except csv.Error as e:
            source.fail(
                f"malformed table: {e}", line, f"{len(columns)} fields", "check the quotes here"
            )
        if values is None:
            return
        if not values:
            source.skip_blank_lines(b"\r\n")
            continue
        if len(values) != len(columns):
            raise InputError(
                "a row has another number of fields than the header",
                path=source.path,
                line=line,
                found=len(values),
                expected=f"{len(columns)}: {', '.join(columns)}",
                hint="fields that contain the delimiter or line breaks must be quoted",
            )
        yield Row(dict(zip(columns, values, strict=True)), source.path, line)
