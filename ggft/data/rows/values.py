"""Values of a row, checked, and the errors that say what is wrong with one."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ggft.data.files import Row
from ggft.system.errors import InputError

HINT = "correct or remove this row; `ggft prepare` shows how rows are read"


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, or a text, list or object without anything in it."""
    return value is None or value == "" or value == [] or value == {}


def text_of(row: Row, value: Any, where: str) -> str:
    """Return a value that must be text a tokenizer can read."""
    if not isinstance(value, str):
        raise wrong(row, f"{where} is not text", kind_of(value), "a string")
    if "\0" in value:
        raise wrong(row, f"{where} contains a NUL character", "\\u0000", "text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            bad = f"a lone surrogate \\u{ord(value[e.start]):04x}"
            raise wrong(row, f"{where} is not valid Unicode", bad, "text") from None
    return value


def content_of(row: Row, value: Any, where: str) -> str:
    """Return a content's text; a list of text parts, as OpenAI has them, is joined."""
    if not isinstance(value, list):
        return text_of(row, value, where)
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part:
            kind = part.get("type") if isinstance(part, dict) else None
            found = kind_of(part) if kind is None else repr(kind)
            raise wrong(row, f"{where}: not only text", found, "parts of type text")
        texts.append(text_of(row, part["text"], where))
    return "".join(texts)


def list_of(row: Row, value: Any, where: str) -> list[Any]:
    """Return a value that must be a list; tables have one as its JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise wrong(row, f"{where} is not a list", kind_of(value), "a list")
    return value


def passages_of(row: Row, value: Any, where: str, unused: Counter[str]) -> str:
    """Return the text of a passage, or of a list of them, each a text or an object with one.

    Fields of an object that are not used are counted in `unused`.
    """
    if isinstance(value, str):
        return text_of(row, value, where)
    texts: list[str] = []
    names: set[str] = set()
    for passage in list_of(row, value, where):
        if isinstance(passage, dict):
            parts = [passage.get(k) for k in ("title", *PASSAGE_KEYS)]
            found = [text_of(row, part, where) for part in parts if not is_empty(part)]
            if not found:
                raise wrong(
                    row, f"{where}: a passage without text", ", ".join(passage) or "no fields",
                    any_of(PASSAGE_KEYS),
                )  # fmt: skip
            texts.append("\n".join(found))
            rest = (k for k in passage if k not in ("title", *PASSAGE_KEYS))
            names.update(f"{where}.{k}" for k in rest if not is_empty(passage[k]))
        else:
            texts.append(text_of(row, passage, where))
    unused.update(names)
    return "\n\n".join(texts)


PASSAGE_KEYS = ("text", "content", "contents", "passage", "page_content")


def wrong(row: Row, message: str, found: str, expected: str, hint: str = HINT) -> InputError:
    """Return the error that says what is wrong with a row."""
    return InputError(
        message, path=row.path, line=row.line, found=found, expected=expected, hint=hint
    )


def kind_of(value: Any) -> str:
    """Say what a value is."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null or missing" if value is None else names.get(type(value), "a number")


def keys_of(value: Iterable[str]) -> str:
    """List the first names of a row's columns."""
    return ", ".join(list(value)[:8]) or "no fields"


def any_of(keys: Iterable[str]) -> str:
    """Say that one of some names is expected."""
    return "one of " + ", ".join(keys)
