"""What a conversation is made of, before a template writes it.

Everything that a template may be given has a field here. The fields of a whole row, `tools` and
`documents`, stand on its first message, so that the beginning of a conversation has them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict


class _RequiredCall(TypedDict):
    name: str
    arguments: dict[str, Any] | str


class ToolCall(_RequiredCall, total=False):
    """A call of a function by the assistant.

    Attributes:
        name: The function.
        arguments: An object; a text only where the row's text is no JSON object.
        id: What its result refers to.
    """

    id: str


class _RequiredKeys(TypedDict):
    role: str
    content: str


class Message(_RequiredKeys, total=False):
    """One turn of a conversation; roles are system, user, assistant and tool.

    Attributes:
        content: The text, empty where there is none.
        input: The alpaca format's second field; templates that do not know it get it appended to
            the content by a newline.
        learn: False for an answer that is only context (OpenAI's `weight: 0`).
        reasoning: The thought before an answer. Absent where nothing is said of one.
        tool_calls: The functions that an assistant's turn calls, in order; never empty.
        name: Of a tool's result, the function.
        tool_call_id: Of a tool's result, the `id` of its call.
        tools: On the first message: the functions that may be called, as the row has them.
        documents: On the first message: texts that answers are to be found in.
    """

    input: str
    learn: bool
    reasoning: str
    tool_calls: list[ToolCall]
    name: str
    tool_call_id: str
    tools: list[dict[str, Any]]
    documents: list[dict[str, Any]]


def joined(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages with `input` appended to the content."""
    if not any(m.get("input") for m in messages):
        return messages
    return [
        {**m, "content": f"{m['content']}\n{m['input']}", "input": ""} if m.get("input") else m
        for m in messages
    ]
