"""Thoughts, tools, their calls and results, and documents of a row, for the template to render.

The spellings are OpenAI's, TRL's, LLaMA-Factory's, ms-swift's and those of reasoning models' APIs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from ggft.data.files import Row
from ggft.data.rows.columns import NAMES
from ggft.data.rows.values import content_of, is_empty, kind_of, text_of, wrong
from ggft.prompts.messages import Message, ToolCall

CALL_ROLES = frozenset(("function_call", "tool_call"))
CALL_KEYS = ("tool_calls", "function_call")
RESULT_KEYS = ("name", "tool_call_id")
REASONING_KEYS = NAMES["reasoning"]


def thought_of(row: Row, turn: Mapping[str, Any], where: str) -> str:
    """Return the thought of an assistant's turn, "" if it has none."""
    said = [key for key in REASONING_KEYS if not is_empty(turn.get(key))]
    if len(said) > 1 and len({str(turn[key]) for key in said}) > 1:
        raise wrong(row, f"{where}: two thoughts", " and ".join(said), "one of them")
    return text_of(row, turn[said[0]], f"{where}: {said[0]}") if said else ""


def thought_in_parts(row: Row, parts: Any, where: str) -> tuple[str, Any]:
    """Return the thought among an assistant's content parts, and the other parts."""
    if not isinstance(parts, list):
        return "", parts
    thoughts: list[str] = []
    rest: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            text = next((part[k] for k in (kind, "text", "content") if k in part), None)
            thoughts.append(content_of(row, text, where))
        else:
            rest.append(part)
    return "\n".join(thoughts), rest


def calls_of(row: Row, turn: Mapping[str, Any], where: str) -> list[ToolCall]:
    """Return the calls of an assistant's turn."""
    calls: list[ToolCall] = []
    for key in CALL_KEYS:
        value = from_json(turn.get(key))
        for call in value if isinstance(value, list) else [] if is_empty(value) else [value]:
            calls.append(_call(row, call, f"{where}: {key}"))
    return calls


def calls_in_text(row: Row, value: Any, where: str) -> list[ToolCall]:
    """Return the calls that are the value of a turn whose role says that it calls."""
    value = from_json(value)
    calls = value if isinstance(value, list) else [value]
    return [_call(row, call, where) for call in calls]


def _call(row: Row, value: Any, where: str) -> ToolCall:
    """Read a call: an object with name and arguments, alone or as `function` of another."""
    value = from_json(value)
    outer = value if isinstance(value, dict) else {}
    function = outer.get("function")
    inner: dict[str, Any] = function if isinstance(function, dict) else outer
    name = inner.get("name") or outer.get("name")
    if not isinstance(name, str) or not name:
        raise wrong(row, f"{where}: a call without a name", kind_of(value), "{name, arguments}")
    keys = ("arguments", "parameters", "input", "args")
    given: Any = next((inner[key] for key in keys if key in inner), {})
    arguments = from_json(given)
    if not isinstance(arguments, dict):
        if not isinstance(given, str):
            raise wrong(row, f"{where}: arguments are {kind_of(given)}", name, "an object or text")
        arguments = text_of(row, given, where)
    call: ToolCall = {"name": text_of(row, name, where), "arguments": arguments}
    if isinstance(identity := outer.get("id"), str) and identity:
        call["id"] = identity
    return call


def result_of(row: Row, value: Any, where: str) -> str:
    """Return the text of a tool's result, which may be an object."""
    if isinstance(value, dict) or (
        isinstance(value, list) and not all(isinstance(x, dict) and "text" in x for x in value)
    ):
        return json.dumps(value, ensure_ascii=False)
    return content_of(row, value, where)


def tools_of(row: Row, value: Any, where: str) -> list[dict[str, Any]]:
    """Return a row's tools: a list or its JSON text, of functions alone or as OpenAI wraps them."""
    value = from_json(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise wrong(row, f"{where} are no list of functions", kind_of(value), "a list of objects")
    tools: list[dict[str, Any]] = []
    for tool in value:
        wrapped = tool if "function" in tool else {"type": "function", "function": tool}
        function = wrapped["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(row, f"{where}: a function without a name", kind_of(function), "name")
        tools.append(wrapped)
    return tools


def documents_of(row: Row, value: Any, where: str) -> list[dict[str, Any]]:
    """Return a row's documents: a list, or its JSON text, of texts or of objects."""
    value = from_json(value)
    documents = value if isinstance(value, list) else [value]
    result: list[dict[str, Any]] = []
    for document in documents:
        if isinstance(document, str):
            result.append({"title": "", "text": text_of(row, document, where)})
        elif isinstance(document, dict) and document:
            result.append(document)
        else:
            raise wrong(row, f"{where}: {kind_of(document)}", "", "texts, or {title, text}")
    return result


def from_json(value: Any) -> Any:
    """Return what a JSON text holds; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def add_row_fields(
    row: Row, values: Mapping[str, Any], use: Callable[[str], str | None], messages: list[Message]
) -> None:
    """Put a row's tools and documents on its first message; `use` gives the column of a role."""
    if not messages:
        return
    if tools := use("tools"):
        messages[0] = {**messages[0], "tools": tools_of(row, values[tools], tools)}
    if documents := use("documents"):
        found = documents_of(row, values[documents], documents)
        messages[0] = {**messages[0], "documents": found}


def spelled(message: Message) -> dict[str, Any]:
    """Return the fields of a message beside role and content as rows spell them."""
    out: dict[str, Any] = {}
    if "reasoning" in message:
        out["reasoning_content"] = message["reasoning"]
    if "tool_calls" in message:
        out["tool_calls"] = [
            {k: v for k, v in call.items() if k == "id"}
            | {
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in message["tool_calls"]
        ]
    for key in RESULT_KEYS:
        if key in message:
            out[key] = message[key]  # type: ignore[literal-required]
    return out
