"""The marks that models put around their thoughts.

Templates write them in their own ways; what none of them says, where a thought ends that the
prompt has opened, follows from the mark that opens it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ggft.prompts.messages import Message

# What opens a thought, and what closes it; \1 is the name that both have in common.
_PAIRS = (
    (r"<((?:[\w-]+:)?(?:think|thinking|thought|reasoning|reason)(?::[\w-]+)?)>", r"</\1>"),
    (r"\[(THINK)\]", r"[/\1]"),
    (r"<(judge)>", r"</\1>"),
    (r"<start_(working_out)>", r"<end_\1>"),
    (r"<\|start_(think)\|>", r"<|end_\1|>"),
    (r"<\|START_(THINKING)\|>", r"<|END_\1|>"),
    (r"<\|begin_of_(thought)\|>", r"<|end_of_\1|>"),
    (r"<\|channel>(thought)", r"<channel|>"),
    (r"<\|open\|>(think)<\|sep\|>", r"<|close|>\1<|sep|>"),
    (r"(Here are my reasoning steps:)", r"[BEGIN FINAL RESPONSE]"),
)
_OPEN = "|".join(re.sub(r"(?<!\\)\((?!\?)", "(?:", opened) for opened, _ in _PAIRS)
_CLOSE = (
    r"</(?:[\w-]+:)?(?:think|thinking|thought|reasoning|reason)(?::[\w-]+)?>|\[/THINK\]"
    r"|<\|END_THINKING\|>|<\|end_of_thought\|>|<channel\|>|<\|close\|>think<\|sep\|>"
    r"|\[BEGIN FINAL RESPONSE\]|</judge>|<end_working_out>|<\|end_think\|>"
)
_OPEN_AT_END = re.compile(rf"(?:{_OPEN})\s*\Z", re.IGNORECASE)
_CLOSED_AT_END = re.compile(rf"(?:(?:{_OPEN})\s*)?(?:{_CLOSE})\s*\Z", re.IGNORECASE)
_EMPTY_AT_START = re.compile(rf"\s*(?:(?:{_OPEN})\s*)?(?:{_CLOSE})", re.IGNORECASE)
_WHOLE = re.compile(rf"\s*(?:{_OPEN})(.*?)(?:{_CLOSE})(.*)\Z", re.IGNORECASE | re.DOTALL)
_ANY = re.compile(f"{_OPEN}|{_CLOSE}", re.IGNORECASE)


def mark_in(source: str) -> str:
    """Return the mark that opens thoughts by a template's source, and a line break; "" if none."""
    found = _ANY.search(source)
    opener = re.search(_OPEN, source, re.IGNORECASE)
    return f"{opener[0]}\n" if opener else "<think>\n" if found else ""


def opened(prompt: str) -> str:
    """Return the mark at a prompt's end that opens a thought, with the blanks after it, or ""."""
    found = _OPEN_AT_END.search(prompt)
    return found[0] if found else ""


def closed(prompt: str) -> str:
    """Return the marks at a prompt's end that close a thought, or ""."""
    found = _CLOSED_AT_END.search(prompt)
    return found[0] if found else ""


def closes(text: str) -> bool:
    """Return whether a mark in a text closes a thought."""
    return re.search(_CLOSE, text, re.IGNORECASE) is not None


def without_empty(text: str) -> str:
    """Return a text without the empty thought at its start."""
    found = _EMPTY_AT_START.match(text)
    return text[found.end() :] if found else text


def empty_at_start(text: str) -> tuple[str, str] | None:
    """Return what opens and what closes the empty thought at a text's start; None without one."""
    found = _EMPTY_AT_START.match(text)
    if found is None:
        return None
    close = re.search(_CLOSE, found[0], re.IGNORECASE)
    assert close is not None
    return found[0][: close.start()], found[0][close.start() :]


def closing(opening: str) -> str:
    """Return what closes a thought, as models write it: on a line of its own if opened on one."""
    mark = opening.strip()
    for opener, closer in _PAIRS:
        found = re.fullmatch(opener, mark, re.IGNORECASE)
        if found:
            close = found.expand(closer)
            end = "\n\n" if close.startswith("</") else ""
            return f"\n{close}{end}" if opening.endswith("\n") else close
    return ""


def split_thought(message: Message) -> Message:
    """Return a message whose content begins with a thought with the two apart."""
    found = _WHOLE.match(message["content"])
    if found is None or "reasoning" in message:
        return message
    return {**message, "reasoning": found[1].strip(), "content": found[2].lstrip()}


def dropped(messages: Sequence[Message], *, empty: bool) -> list[Message]:
    """Return messages without their thoughts; `empty`: each answer has an empty one."""
    kept: list[Message] = []
    for message in map(split_thought, messages):
        plain: Message = {**message}
        plain.pop("reasoning", None)
        if empty and message["role"] == "assistant":
            plain["reasoning"] = ""
        kept.append(plain)
    return kept
