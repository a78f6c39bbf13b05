"""Turns of a conversation, however they are written, to messages.

What others use to say which turns are trained is honoured here, or refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ggft.data.files import Row
from ggft.data.rows.columns import is_telling
from ggft.data.rows.tools import (
    CALL_KEYS,
    CALL_ROLES,
    REASONING_KEYS,
    RESULT_KEYS,
    calls_in_text,
    calls_of,
    from_json,
    result_of,
    thought_in_parts,
    thought_of,
)
from ggft.data.rows.values import content_of, is_empty, kind_of, text_of, wrong
from ggft.prompts.messages import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "系统": "system",
    "用户": "user",
    "助手": "assistant",
}
ROLE_KEYS = ("role", "from", "角色")
CONTENT_KEYS = ("content", "value", "text", "parts", "内容")
# Whether a turn is trained: in the words of OpenAI and Mistral, axolotl, ms-swift.
TRAIN_KEYS = ("weight", "train", "training", "trainable", "learn", "loss", "loss_scale")
MASKED_KEYS = ("masked", "mask", "is_masked")
# What cannot be trained, or only in part, and so never dropped.
REFUSED_KEYS = {
    "train_detail": "a turn is trained as a whole",
    "training_detail": "a turn is trained as a whole",
    "refusal": "a refusal is written as content",
    "prefix": "an answer is trained from its beginning",
}
# Fields beside role and content that are used, by role.
_FIELDS = {"assistant": (*REASONING_KEYS, *CALL_KEYS), "tool": RESULT_KEYS}
PAIR = ({"human": "user", "user": "user"}, {"assistant": "assistant", "gpt": "assistant"})


class Turns:
    """Reads lists of turns, and counts fields that are not used.

    Args:
        unused: Rows by field; a turn's field is counted as `messages.NAME`.
    """

    def __init__(self, unused: Counter[str]) -> None:
        self._unused = unused

    def read(self, row: Row, turns: list[Any], key: str) -> list[Message]:
        """Return the messages of turns that stand in the column `key`."""
        if not turns:
            raise wrong(row, f"{key} is empty", "no turns", "at least one question and one answer")
        messages: list[Message] = []
        unused: set[str] = set()
        for n, turn in enumerate(turns, 1):
            where = f"{key}, turn {n}"
            if not isinstance(turn, dict):
                raise wrong(row, f"{where}: not an object", kind_of(turn), "{role, content}")
            pair = None if "role" in turn or "from" in turn else _pair(turn)
            if pair is None:
                message = self._message(row, turn, where, unused)
                if _goes_on_calling(messages, message):
                    messages[-1]["tool_calls"] += message["tool_calls"]
                else:
                    messages.append(message)
            else:
                messages += [
                    {"role": role, "content": content_of(row, turn[name], f"{where}: {name}")}
                    for name, role in pair.items()
                ]
        self._unused.update(f"{key}.{name}" for name in unused)
        return messages

    def _message(self, row: Row, turn: dict[str, Any], where: str, unused: set[str]) -> Message:
        role_key = next((k for k in ROLE_KEYS if k in turn), ROLE_KEYS[0])
        name = turn.get(role_key)
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            found = repr(name) if isinstance(name, str) else kind_of(name)
            raise wrong(row, f"{where}: unknown {role_key}", found, "system, user, assistant, tool")
        content_key = next((k for k in CONTENT_KEYS if turn.get(k) is not None), CONTENT_KEYS[0])
        value = turn.get(content_key)
        calls = str(name).strip().lower() in CALL_ROLES and not isinstance(from_json(value), str)
        message = self._said(row, turn, role, value, where, calls=calls)
        if len(turn) > 2 or content_key not in turn:
            used = {role_key, content_key, *_FIELDS.get(role, ())}
            self._check_fields(row, turn, where, used, unused)
        if len(turn) > 2:
            learn = _is_trained(row, turn, where)
            if learn is False and role == "assistant":
                message["learn"] = False
            elif learn and role != "assistant":
                raise wrong(
                    row, f"{where}: a turn of the {role} cannot be trained", str(name),
                    "a mark on the assistant's turns",
                    "remove the mark, or train all turns with --train-on-prompt",
                )  # fmt: skip
        return message

    def _said(
        self, row: Row, turn: dict[str, Any], role: str, value: Any, where: str, *, calls: bool
    ) -> Message:
        """Return what a turn says: its content, and a thought, calls or a result's origin."""
        if role == "tool":
            result: Message = {"role": role, "content": result_of(row, value, f"{where}: content")}
            for key in RESULT_KEYS:
                if not is_empty(turn.get(key)):
                    result[key] = text_of(row, turn[key], f"{where}: {key}")  # type: ignore[literal-required]
            return result
        if role != "assistant" or (not calls and isinstance(value, str) and len(turn) == 2):
            return {"role": role, "content": content_of(row, value, f"{where}: content")}
        made = calls_in_text(row, value, where) if calls else calls_of(row, turn, where)
        thought, value = thought_in_parts(row, "" if calls else value, f"{where}: content")
        value = "" if made and value is None else value
        message: Message = {"role": role, "content": content_of(row, value, f"{where}: content")}
        if thought := thought or thought_of(row, turn, where):
            message["reasoning"] = thought
        if made:
            message["tool_calls"] = made
        return message

    def _check_fields(
        self,
        row: Row,
        turn: Mapping[str, Any],
        where: str,
        used: set[str],
        unused: set[str],
    ) -> None:
        """Refuse a field that must not be dropped; remember the others that are not used."""
        for name, value in turn.items():
            if name in used or name in TRAIN_KEYS or name in MASKED_KEYS or is_empty(value):
                continue
            if name in REFUSED_KEYS and value is not False:
                raise wrong(
                    row, f"{where}: {name!r} cannot be trained on", kind_of(value),
                    REFUSED_KEYS[name], "take the field out of the row, or the row out of the data",
                )  # fmt: skip
            if is_telling(name):
                raise wrong(
                    row, f"{where}: {name!r} would be lost", kind_of(value),
                    "fields that are rendered: " + ", ".join(CONTENT_KEYS[:3]),
                    "write it into the content, or take it out of the row",
                )  # fmt: skip
            unused.add(name)


def _goes_on_calling(messages: list[Message], message: Message) -> bool:
    """Whether a turn only calls, as the one before it did: calls at a time are one turn."""
    return bool(messages) and all(
        "tool_calls" in m and not m["content"] and "reasoning" not in m
        for m in (messages[-1], message)
    )


def _pair(turn: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the roles of a turn that holds a question and its answer, as ms-swift has them."""
    roles = {name: roles[name] for roles in PAIR for name in turn if name in roles}
    return roles if len(roles) == 2 and len(turn) == 2 else None


def _is_trained(row: Row, turn: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a turn is trained by what it says, None if it says nothing."""
    said: bool | None = None
    for keys, if_true in ((TRAIN_KEYS, True), (MASKED_KEYS, False)):
        for key in keys:
            value = turn.get(key)
            if value is None:
                continue
            if value not in (0, 1):
                raise wrong(
                    row, f"{where}: {key!r} is neither 0 nor 1", repr(value)[:40],
                    "0 or false: context only; 1 or true: trained",
                    "turns are trained or not; there are no weights between",
                )  # fmt: skip
            trained = bool(value) is if_true
            if said is not None and said is not trained:
                raise wrong(row, f"{where}: {key!r} contradicts another mark", repr(value), "one")
            said = trained
    return said
