"""How a template wants to be told of thoughts and tool calls, found out by trying.

Templates differ in the fields that they read: a thought may be a field of the message, a part of
its content, text in it, or nothing that they know; a call's arguments are an object or a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ggft.prompts.jinja import VARIABLES
from ggft.prompts.messages import Message
from ggft.prompts.thoughts import closed, empty_at_start, mark_in, opened
from ggft.system.errors import InputError

# Renders conversations as templates are given them, each with or without the generation prompt.
RenderAll = Callable[[Sequence[tuple[Sequence[Any], bool]]], list[str | InputError]]
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
_CALL_ID = "call{:05d}"  # nine letters and digits, as Mistral's templates demand


class Thoughts(Enum):
    """Where a template takes a thought from."""

    FIELD = "a field of the message"
    PART = "a part of the content"
    TEXT = "text in the content, which stays there in later turns"
    BUILT = "nowhere: it is put in front of the answer, between the marks that the template has"
    NONE = "nowhere: the prompt has closed it"


@dataclass(frozen=True)
class Dialect:
    """How a template is spoken to, and how it ends answers.

    Attributes:
        thoughts: Where it takes thoughts from.
        text_arguments: Whether a call's arguments are to be a text.
        null_content: Whether a turn that only calls tools is to have no content.
        typed_content: Whether contents are to be lists of parts, as of models that see.
        last_tail: What it writes behind a last answer.
        later_tail: What it writes between an answer and the next question; "" where unknown.
        mark: What opens a thought.
        switch: The template argument by which a prompt that closes thoughts does not; "" if none.
    """

    thoughts: Thoughts
    text_arguments: bool
    null_content: bool
    typed_content: bool = False
    last_tail: str = ""
    later_tail: str = ""
    mark: str = "<think>\n"
    switch: str = ""

    def write(self, messages: Sequence[Message]) -> Sequence[Any]:
        """Return messages as the template wants them."""
        if not self.typed_content and not any(m.keys() & _EXTRA for m in messages):
            return messages
        written: list[dict[str, Any]] = []
        ids = _Ids()
        for message in messages:
            plain: dict[str, Any] = {k: v for k, v in message.items() if k not in _EXTRA}
            if self.typed_content:
                plain["content"] = [{"type": "text", "text": message["content"]}]
            if message.get("reasoning"):
                self._add_thought(plain, message["reasoning"])
            if calls := message.get("tool_calls"):
                plain["tool_calls"] = [self._call(call, ids.new(call.get("id"))) for call in calls]
                if self.null_content and not message["content"]:
                    plain["content"] = None
            if message["role"] == "tool":
                plain["tool_call_id"], name = ids.take(message.get("tool_call_id"), written)
                plain["name"] = message.get("name") or name
            elif "name" in message:
                plain["name"] = message["name"]
            written.append(plain)
        for key in ("tools", "documents"):
            if messages[0].get(key):
                written[0][key] = messages[0][key]
        return written

    def _add_thought(self, plain: dict[str, Any], thought: str) -> None:
        if self.thoughts is Thoughts.PART:
            plain["content"] = [
                {"type": "thinking", "thinking": thought},
                {"type": "text", "text": plain["content"]},
            ]
        elif self.thoughts is Thoughts.TEXT:
            self._put_in_text(plain, f"<think>\n{thought}\n</think>\n\n")
        else:
            plain.update(dict.fromkeys(THOUGHT_FIELDS, thought))

    def _put_in_text(self, plain: dict[str, Any], text: str) -> None:
        if self.typed_content:
            plain["content"].insert(0, {"type": "text", "text": text})
        else:
            plain["content"] = text + plain["content"]

    def _call(self, call: Any, identity: str) -> dict[str, Any]:
        arguments = call["arguments"]
        if self.text_arguments and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        return {"id": identity, "type": "function", "function": function}


_EXTRA = frozenset(("reasoning", "tool_calls", "tool_call_id", "tools", "documents", "name"))


class _Ids:
    """Identities of calls: the row's own, else new ones, taken by results in their order."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._n = 0

    def new(self, own: str | None) -> str:
        """Return a call's identity."""
        self._n += 1
        self._waiting.append(own or _CALL_ID.format(self._n))
        return self._waiting[-1]

    def take(self, own: str | None, written: Sequence[dict[str, Any]]) -> tuple[str, str]:
        """Return the identity of a result's call, and the name of its function."""
        identity = own or (self._waiting[0] if self._waiting else _CALL_ID.format(0))
        if identity in self._waiting:
            self._waiting.remove(identity)
        calls = [call for message in written for call in message.get("tool_calls", ())]
        names = [call["function"]["name"] for call in calls if call["id"] == identity]
        return identity, names[-1] if names else "tool"


_Q, _A, _R = "qqzuq", "aazya", "rrzxr"  # words that no template has
_TOOL = {
    "type": "function",
    "function": {
        "name": "zfunction",
        "description": "zdescription",
        "parameters": {"type": "object", "properties": {"zkey": {"type": "string"}}},
    },
}


def learn_dialect(render: RenderAll, source: str) -> Dialect:
    """Return how a template wants to be spoken to.

    Raises:
        InputError: It cannot render a question and its answer.
    """
    (first,) = render([([_say("user", _Q)], True)])
    typed = isinstance(first, InputError) or _Q not in first
    if typed:
        (other,) = render([([_say("user", _Q, typed=True)], True)])
        typed = isinstance(other, str) and _Q in other
    question, answer = _say("user", _Q, typed=typed), _say("assistant", _A, typed=typed)
    fields = {**answer, **dict.fromkeys(THOUGHT_FIELDS, _R)}
    parts = [{"type": "thinking", "thinking": _R}, {"type": "text", "text": _A}]
    calls = [_calls(content, text) for content in ("", None) for text in (False, True)]
    asked, plain, later, with_field, with_parts, *with_calls = render(
        [
            ([question], True),
            ([question, answer], False),
            ([question, answer, question, answer], False),
            ([question, fields], False),
            ([question, {**answer, "content": parts}], False),
            *(([{**question, "tools": [_TOOL]}, call], False) for call in calls),
        ]
    )
    for text in (asked, plain):
        if isinstance(text, InputError):
            raise text
    prompt, whole = str(asked), str(plain)
    null_content, text_arguments = _choose_calls(with_calls)
    after = [] if isinstance(later, InputError) else later.split(_A)
    return Dialect(
        _where_thoughts(prompt, whole, with_field, with_parts, source),
        text_arguments,
        null_content,
        typed,
        last_tail=whole.rpartition(_A)[2],
        later_tail=after[1].partition(_Q)[0] if len(after) == 3 else "",
        mark=mark_in(source) or Dialect.mark,
        switch=_switch(render, question, source) if closed(prompt) else "",
    )


def _say(role: str, text: str, *, typed: bool = False) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if typed else text}


_SWITCHES = (
    ("enable_thinking", True), ("thinking", True), ("reasoning_effort", "high"),
    ("thinking_mode", "thinking"),
)  # fmt: skip


def _switch(render: RenderAll, question: dict[str, Any], source: str) -> str:
    """Return the argument with which the template's prompt does not close the thought."""
    known = [(name, value) for name, value in _SWITCHES if name in source]
    prompts = render([([{**question, VARIABLES: {name: value}}], True) for name, value in known])
    for (name, value), prompt in zip(known, prompts, strict=True):
        if isinstance(prompt, str) and not closed(prompt):
            return f"{name}={value if isinstance(value, str) else json.dumps(value)}"
    return ""


def _calls(content: str | None, text: bool) -> dict[str, Any]:
    arguments: Any = {"zkey": "zvalue"}
    function = {"name": "zfunction", "arguments": json.dumps(arguments) if text else arguments}
    call = {"id": _CALL_ID.format(1), "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _choose_calls(tries: Sequence[str | InputError]) -> tuple[bool, bool]:
    """Return null_content and text_arguments of the first way that works, of four in order."""
    for n, text in enumerate(tries):
        if isinstance(text, InputError) or "zvalue" not in text or "zfunction" not in text:
            continue
        call = text[text.rindex("zfunction") :]
        if "'zkey'" in text or '\\"zkey' in text or "None" in call:
            continue
        return n >= 2, bool(n % 2)
    return False, False


def _where_thoughts(
    prompt: str,
    whole: str,
    with_field: str | InputError,
    with_parts: str | InputError,
    source: str,
) -> Thoughts:
    if not isinstance(with_field, InputError) and _R in with_field:
        return Thoughts.FIELD
    # A list that was written as it is, not read, shows its keys.
    parts = "" if isinstance(with_parts, InputError) else with_parts
    if _R in parts and not re.search("""["']type["']""", parts):
        return Thoughts.PART
    if opened(prompt):
        return Thoughts.BUILT
    if closed(prompt):
        return Thoughts.NONE
    lead = whole[len(prompt) :].partition(_A)[0] if whole.startswith(prompt) else ""
    if empty_at_start(lead):
        return Thoughts.BUILT
    return Thoughts.BUILT if mark_in(source) else Thoughts.TEXT
