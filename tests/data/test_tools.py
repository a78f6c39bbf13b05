"""Thoughts, tools, calls, results and documents, as others spell them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggft.data.duplicates import hash_rows
from ggft.data.examples import RowReader
from ggft.prompts.messages import Message
from ggft.recipes.prepare import cleaned
from ggft.system.errors import InputError

Q = {"role": "user", "content": "Weather in Paris?"}
TOOL = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}
CALL: dict[str, Any] = {"name": "weather", "arguments": {"city": "Paris"}}
AS_TEXT = {"name": "weather", "arguments": json.dumps(CALL["arguments"])}


def read(tmp_path: Path, row: dict[str, Any]) -> list[Message]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (example,) = RowReader().read(path)
    assert cleaned(example)
    return example.messages


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_of_a_turn(tmp_path: Path, key: str) -> None:
    row = {"messages": [Q, {"role": "assistant", "content": "Mild.", key: "It is May."}]}
    assert read(tmp_path, row)[1] == {
        "role": "assistant", "content": "Mild.", "reasoning": "It is May.",
    }  # fmt: skip


def test_a_thought_in_a_column_or_in_a_part(tmp_path: Path) -> None:
    column = {"question": "2+2?", "cot": "Two and two.", "answer": "4"}
    assert read(tmp_path, column)[1].get("reasoning") == "Two and two."
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "4"}]
    row = {"messages": [Q, {"role": "assistant", "content": parts}]}
    assert read(tmp_path, row)[1] == {"role": "assistant", "content": "4", "reasoning": "Hm."}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "a1", "function": CALL}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "a1", "function": AS_TEXT}]}],
        [{"role": "assistant", "tool_calls": json.dumps([{"id": "a1", **CALL}])}],
    ],
)
def test_calls_of_a_turn(tmp_path: Path, turns: list[dict[str, Any]]) -> None:
    result = {"role": "tool", "content": {"degrees": 21}, "tool_call_id": "a1", "name": "weather"}
    answer = {"role": "assistant", "content": "Mild."}
    row = {"tools": json.dumps([TOOL]), "messages": [Q, *turns, result, answer]}
    asked, call, given, _ = read(tmp_path, row)
    assert asked["tools"] == [WRAPPED]
    assert call["tool_calls"] == [{**CALL, "id": "a1"}]
    assert call["content"] == ""
    assert given["content"] == '{"degrees": 21}'
    assert given["tool_call_id"] == "a1"


def test_calls_by_role_and_calls_at_a_time(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps({**CALL, "name": "other"})},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "Mild."},
    ]
    messages = read(tmp_path, {"conversations": turns, "tools": [WRAPPED]})
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert [call["name"] for call in messages[1]["tool_calls"]] == ["weather", "other"]


def test_documents(tmp_path: Path) -> None:
    row = {"messages": [Q, {"role": "assistant", "content": "Mild."}], "documents": ["May."]}
    assert read(tmp_path, row)[0]["documents"] == [{"title": "", "text": "May."}]


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"role": "assistant", "tool_calls": [1]}, "a call without a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}, "arguments are"),
        ({"role": "assistant", "content": "a", "thinking": "b", "reasoning": "c"}, "two thoughts"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "not only text"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, turn: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path, {"messages": [Q, turn]})


def test_rows_that_differ_in_a_thought_only_are_two() -> None:
    rows: list[list[Message]] = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": r}]
        for r in "cd"
    ]
    first, second = hash_rows(rows).row_hash
    assert first != second
