"""Turn files into examples: conversations with messages, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .chat_template import Message
from .errors import InputError


@dataclass(frozen=True)
class Example:
    """A row of training data and where it came from.

    Attributes:
        messages: The conversation, or empty for plain text.
        text: Plain text, or None for a conversation.
        path: The file.
        line: 1-based line at which the row begins.
    """

    messages: list[Message]
    text: str | None
    path: Path
    line: int


def load_examples(paths: Iterable[str | Path], format_name: str = "auto") -> Iterator[Example]:
    """Yield the examples of files, in order.

    Raises:
        InputError: A file cannot be read or a row is not an example; names file and line.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError("no such data file", path=path)
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as e:
            raise InputError(f"malformed JSON: {e.msg}", path=path, line=e.lineno) from None
        for n, row in enumerate(rows):
            if not isinstance(row, dict) or not isinstance(row.get("output"), str):
                raise InputError("row without output", path=path, line=n + 1)
            user: Message = {"role": "user", "content": row.get("instruction", "")}
            if row.get("input"):
                user["input"] = row["input"]
            yield Example(
                [user, {"role": "assistant", "content": row["output"]}], None, path, n + 1
            )
