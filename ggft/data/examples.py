"""Turn rows into examples: conversations, or plain text, whatever the fields are called.

The schema is found row by row from the field names; anything that would silently train on
something else than meant is an error with file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggft.data.files import Row, read_rows
from ggft.prompts.messages import Message
from ggft.system.errors import InputError


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

    def short_conversation(self) -> list[Message] | None:
        """Return the conversation if it is short enough to be kept; None for plain text."""
        n_chars = sum(len(m["content"]) + len(m.get("input", "")) for m in self.messages)
        return self.messages if self.messages and n_chars <= SHORT_CHARS else None


SHORT_CHARS = 4000
INSTRUCTION_KEYS = ("instruction", "prompt", "question", "query")
OUTPUT_KEYS = ("output", "response", "answer", "completion")
CHAT_KEYS = ("messages", "conversations", "conversation")
FORMATS = ("auto", "alpaca", "chat", "sharegpt", "completion", "text")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def read_examples(
    path: Path, format_name: str = "auto", moved: Callable[[int], object] = lambda _: None
) -> Iterator[Example]:
    """Yield the examples of one file; `moved` is told now and then how many bytes are read."""
    return (to_example(row, format_name) for row in read_rows(path, moved))


def check_format(name: str) -> None:
    """Raise InputError unless `name` is one of `FORMATS`."""
    if name not in FORMATS:
        raise InputError("no such format", found=repr(name), expected=", ".join(FORMATS))


def to_example(row: Row, format_name: str = "auto") -> Example:
    """Return the example that a row holds."""
    value = row.value
    if isinstance(value, str):
        if format_name not in ("auto", "text"):
            raise _wrong(row, "plain text is not of this format", "a text", format_name)
        return Example([], _text(row, value, "the text"), row.path, row.line)
    if format_name == "auto":
        format_name = _detect(row, value)
    read = _READERS[format_name]
    messages = read(row, value)
    if isinstance(messages, str):
        return Example([], messages, row.path, row.line)
    return Example(messages, None, row.path, row.line)


def _detect(row: Row, value: dict[str, Any]) -> str:
    """Return the format that a row's field names show."""
    for key in CHAT_KEYS:
        if value.get(key) is not None:
            turns = value[key]
            first = turns[0] if isinstance(turns, list) and turns else None
            return "sharegpt" if isinstance(first, dict) and "from" in first else "chat"
    if "chosen" in value and "rejected" in value:
        raise _wrong(
            row, "preference pairs cannot be trained on", "chosen and rejected", "one answer a row"
        )
    if "completion" in value and "prompt" in value:
        return "completion"
    if any(k in value for k in OUTPUT_KEYS) and any(
        k in value for k in (*INSTRUCTION_KEYS, "input")
    ):
        return "alpaca"
    if "text" in value:
        return "text"
    asked = [k for k in (*INSTRUCTION_KEYS, "input") if k in value]
    if asked:
        raise _wrong(row, f"{asked[0]!r} without an answer", _keys(value), _any_of(OUTPUT_KEYS))
    raise _wrong(
        row,
        "these fields are of no known format",
        _keys(value),
        "instruction and output, messages, conversations, prompt and completion, or text",
    )


def _alpaca(row: Row, value: dict[str, Any]) -> list[Message]:
    """Read instruction, input, output, system and history, under any of their names."""
    asked = [k for k in INSTRUCTION_KEYS if value.get(k)]
    answered = [k for k in OUTPUT_KEYS if k in value]
    if len(asked) > 1 or len(answered) > 1:
        both = asked if len(asked) > 1 else answered
        raise _wrong(row, f"{both[0]!r} and {both[1]!r} in one row", _keys(value), "one of them")
    if not answered:
        raise _wrong(row, "a row without an answer", _keys(value), _any_of(OUTPUT_KEYS))
    given = _text(row, value.get("input") or "", "input")
    question = _text(row, value[asked[0]], asked[0]) if asked else ""
    if not question.strip() and not given.strip():
        raise _wrong(row, "a row without a question", _keys(value), _any_of(INSTRUCTION_KEYS))
    user: Message = {"role": "user", "content": question or given}
    if question and given.strip():
        user["input"] = given
    messages: list[Message] = []
    if value.get("system"):
        messages.append({"role": "system", "content": _text(row, value["system"], "system")})
    for pair in _list(row, value.get("history") or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong(row, "history is malformed", _kind(pair), "pairs [question, answer]")
        messages.append({"role": "user", "content": _text(row, pair[0], "history")})
        messages.append({"role": "assistant", "content": _text(row, pair[1], "history")})
    answer = _text(row, value[answered[0]], answered[0])
    return [*messages, user, {"role": "assistant", "content": answer}]


def _completion(row: Row, value: dict[str, Any]) -> list[Message]:
    """Read prompt and completion, each a text or a list of messages."""
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        part = value.get(key)
        if isinstance(part, list):
            messages += _turns(row, part, key, "role", "content")
        else:
            messages.append({"role": role, "content": _text(row, part, key)})
    if value.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row, value["system"], "system")})
    return messages


def _chat(row: Row, value: dict[str, Any]) -> list[Message]:
    return _conversation(row, value, "role", "content")


def _sharegpt(row: Row, value: dict[str, Any]) -> list[Message]:
    return _conversation(row, value, "from", "value")


def _conversation(row: Row, value: dict[str, Any], role: str, content: str) -> list[Message]:
    key = next((k for k in CHAT_KEYS if value.get(k) is not None), None)
    if key is None:
        raise _wrong(row, "a row without a conversation", _keys(value), _any_of(CHAT_KEYS))
    messages = _turns(row, _list(row, value[key], key), key, role, content)
    if value.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row, value["system"], "system")})
    return messages


def _turns(row: Row, turns: list[Any], key: str, role: str, content: str) -> list[Message]:
    """Read a list of turns.

    Args:
        row: Where they stand.
        turns: The list.
        key: Its field's name, for messages.
        role: Name of the role's field.
        content: Name of the content's field.
    """
    messages: list[Message] = []
    if not turns:
        raise _wrong(row, f"{key} is empty", "no turns", "at least one question and one answer")
    for n, turn in enumerate(turns, 1):
        where = f"{key}, turn {n}"
        if not isinstance(turn, dict):
            raise _wrong(row, f"{where}: not an object", _kind(turn), f"{{{role}, {content}}}")
        name = turn.get(role)
        if not isinstance(name, str) or name.lower() not in ROLES:
            raise _wrong(
                row,
                f"{where}: unknown {role}",
                repr(name) if isinstance(name, str) else _kind(name),
                "system, user, assistant, tool",
            )
        text = turn.get(content)
        if text is None and turn.get("tool_calls"):
            raise _wrong(
                row,
                f"{where}: tool_calls cannot be trained on",
                "tool_calls without content",
                "the call written as content",
            )
        message: Message = {"role": ROLES[name.lower()], "content": _content(row, text, where)}
        if turn.get("weight") == 0 or turn.get("train") is False:
            message["learn"] = False
        messages.append(message)
    return messages


def _content(row: Row, value: Any, where: str) -> str:
    """Return a content's text; a list of text parts, as OpenAI has them, is joined."""
    if not isinstance(value, list):
        return _text(row, value, f"{where}: content")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise _wrong(row, f"{where}: not only text", repr(kind), "parts of type text")
        texts.append(_text(row, part.get("text"), f"{where}: content"))
    return "".join(texts)


def _plain(row: Row, value: dict[str, Any]) -> str:
    return _text(row, value.get("text"), "text")


def _text(row: Row, value: Any, where: str) -> str:
    """Return a value that must be text a tokenizer can read."""
    if not isinstance(value, str):
        raise _wrong(row, f"{where} is not text", _kind(value), "a string")
    if "\0" in value:
        raise _wrong(row, f"{where} contains a NUL character", "\\u0000", "text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            bad = f"a lone surrogate \\u{ord(value[e.start]):04x}"
            raise _wrong(row, f"{where} is not valid Unicode", bad, "text") from None
    return value


def _list(row: Row, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(row, f"{where} is not a list", _kind(value), "a list")
    return value


def _wrong(row: Row, message: str, found: str, expected: str) -> InputError:
    return InputError(
        message,
        path=row.path,
        line=row.line,
        found=found,
        expected=expected,
        hint="correct or remove this row; `ggft prepare` shows how rows are read",
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null or missing" if value is None else names.get(type(value), "a number")


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(list(value)[:8]) or "no fields"


def _any_of(keys: Iterable[str]) -> str:
    return "one of " + ", ".join(keys)


_READERS: dict[str, Callable[[Row, dict[str, Any]], list[Message] | str]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "sharegpt": _sharegpt,
    "completion": _completion,
    "text": _plain,
}
