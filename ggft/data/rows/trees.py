"""Trees of replies, as oasst has them, to conversations: one for each way from root to leaf."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ggft.data.files import Row
from ggft.data.rows.turns import ROLES
from ggft.data.rows.values import is_empty, kind_of, text_of, wrong
from ggft.prompts.messages import Message

MAX_DEPTH = 200
_TURN_KEYS = {"message_id", "parent_id", "role", "text"}  # of a row that is one turn
_USED_KEYS = {*_TURN_KEYS, "rank"}


def is_tree(value: Any) -> bool:
    """Whether a field is the root of a tree of replies."""
    return isinstance(value, dict) and "role" in value and "replies" in value


def conversations_of(row: Row, root: dict[str, Any]) -> Iterator[list[Message]]:
    """Yield the conversations of a tree; an answer that several share is learned in the first."""
    yield from _below(row, root, [])


def joined(rows: Iterator[Row], unused: Counter[str]) -> Iterator[Row]:
    """Yield rows; where each is one turn of a tree, yield the trees that they make instead.

    Args:
        rows: Of one file.
        unused: Counts the fields of turns that are not used, and turns whose parents are missing.
    """
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain((first,), rows)
    if not (isinstance(first.value, dict) and set(first.value) >= _TURN_KEYS):
        yield from rows
        return
    nodes: dict[str, tuple[Row, dict[str, Any]]] = {}
    for row in rows:
        value = row.value if isinstance(row.value, dict) else {}
        node = {key: value.get(key) for key in ("role", "text", "parent_id", "rank")}
        nodes[str(value.get("message_id"))] = (row, {**node, "replies": []})
        unused.update(k for k, v in value.items() if k not in _USED_KEYS and not is_empty(v))
    roots: list[tuple[Row, dict[str, Any]]] = []
    for row, node in nodes.values():
        if is_empty(node["parent_id"]):
            roots.append((row, node))
        elif str(node["parent_id"]) in nodes:
            nodes[str(node["parent_id"])][1]["replies"].append(node)
        else:
            unused["turns whose parent is not in the file"] += 1
    for row, root in roots:
        yield Row({"prompt": root}, row.path, row.line)


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
    for n, reply in enumerate(sorted(replies, key=_rank)):
        yield from _below(row, reply, messages)
        if n == 0:
            messages = [{**m, "learn": False} if _answers(m) else m for m in messages]


def _rank(node: Any) -> float:
    """Return which reply comes first: the one that people found best."""
    rank = node.get("rank") if isinstance(node, dict) else None
    return float(rank) if isinstance(rank, int) else math.inf


def _answers(message: Message) -> bool:
    return message["role"] == "assistant"
