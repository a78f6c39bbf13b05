"""Trees of replies, as oasst has them, to conversations: one for each way from root to leaf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ggft.data.files import Row
from ggft.data.rows.turns import ROLES
from ggft.data.rows.values import kind_of, text_of, wrong
from ggft.prompts.messages import Message

MAX_DEPTH = 200


def is_tree(value: Any) -> bool:
    """Whether a field is the root of a tree of replies."""
    return isinstance(value, dict) and "role" in value and "replies" in value


def conversations_of(row: Row, root: dict[str, Any]) -> Iterator[list[Message]]:
    """Yield the conversations of a tree; an answer that several share is learned in the first."""
    yield from _below(row, root, [])


def _below(row: Row, node: Any, before: list[Message]) -> Iterator[list[Message]]:
    if not isinstance(node, dict):
        raise wrong(row, "a reply is not an object", kind_of(node), "{role, text, replies}")
    if len(before) > MAX_DEPTH:
        raise wrong(row, "a tree is too deep", f"{MAX_DEPTH} turns", "a conversation")
    role = ROLES.get(str(node.get("role")).lower())
    if role is None:
        raise wrong(row, "a reply's role is unknown", repr(node.get("role")), "prompter, assistant")
    here: Message = {"role": role, "content": text_of(row, node.get("text"), "a reply's text")}
    messages = [*before, here]
    replies = node.get("replies") or []
    if not replies or not isinstance(replies, list):
        if any(m["role"] == "assistant" and m.get("learn", True) for m in messages):
            yield messages
        return
    for n, reply in enumerate(replies):
        yield from _below(row, reply, messages)
        if n == 0:
            messages = [{**m, "learn": False} if _answers(m) else m for m in messages]


def _answers(message: Message) -> bool:
    return message["role"] == "assistant"
