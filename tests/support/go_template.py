"""The part of Go's text/template that exported Modelfiles use, evaluated as Go does.

Also what Ollama does around it: `collate` joins neighbouring messages of one role, and a Modelfile
keeps what stands between three quotes as it is.

Source: Go's text/template documentation; ollama's template/template.go and parser/parser.go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|=|\(|\)|[$.]?\w+)')
Nodes = list[Any]
Tokens = list[tuple[str, list[str]]]


def render(source: str, messages: Sequence[dict[str, Any]]) -> str:
    """Execute a template on `.Messages`."""
    nodes, rest = _parse(_lex(source))
    assert not rest
    out: list[str] = []
    _run(nodes, {}, {"Messages": collate(messages)}, out)
    return "".join(out)


def collate(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the messages as Ollama gives them to a template."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    return joined


def _lex(source: str) -> Tokens:
    """Return texts ("text", [text]) and actions ("action", words), blanks trimmed as told."""
    tokens: Tokens = []
    at, trim_next = 0, False
    for match in [*ACTION.finditer(source), None]:
        text = source[at : match.start() if match else len(source)]
        if trim_next:
            text = text.lstrip(" \t\r\n")
        if match and match[1]:
            text = text.rstrip(" \t\r\n")
        if text:
            tokens.append(("text", [text]))
        if match:
            words = WORD.findall(match[2])
            assert "".join(words) == re.sub(r'("(?:[^"\\]|\\.)*")|\s', r"\1", match[2])
            tokens.append(("action", words))
            at, trim_next = match.end(), bool(match[3])
    return tokens


def _parse(tokens: Tokens) -> tuple[Nodes, Tokens]:
    """Parse until `end` or `else`, which stay in the rest."""
    nodes: Nodes = []
    while tokens and not (tokens[0][0] == "action" and tokens[0][1][0] in ("end", "else")):
        (kind, words), *tokens = tokens
        if kind == "action" and words[0] in ("if", "range"):
            node, tokens = _parse_block(words, tokens)
            nodes.append(node)
        else:
            nodes.append((kind, words))
    return nodes, tokens


def _parse_block(words: list[str], tokens: Tokens) -> tuple[Any, Tokens]:
    """Parse the inside of an `if` or `range` with its `else` and `end`."""
    body, tokens = _parse(tokens)
    otherwise: Nodes = []
    (_, closing), *tokens = tokens
    if closing[:2] == ["else", "if"]:
        node, tokens = _parse_block(closing[1:], tokens)
        otherwise = [node]
    elif closing == ["else"]:
        otherwise, tokens = _parse(tokens)
        (_, closing), *tokens = tokens
        assert closing == ["end"]
    return (words[0], words[1:], body, otherwise), tokens


def _run(nodes: Nodes, variables: dict[str, str], dot: Any, out: list[str]) -> None:
    for node in nodes:
        if node[0] == "text":
            out.append(node[1][0])
        elif node[0] == "if":
            _, words, body, otherwise = node
            _run(body if _value(words, variables, dot) else otherwise, variables, dot, out)
        elif node[0] == "range":
            for item in _value(node[1], variables, dot):
                _run(node[2], variables, item, out)
        elif node[1][1:2] in ([":="], ["="]):
            assert (node[1][0] in variables) == (node[1][1] == "=")
            variables[node[1][0]] = _value(node[1][2:], variables, dot)
        else:
            out.append(_value(node[1], variables, dot))


def _value(words: list[str], variables: dict[str, str], dot: Any) -> Any:
    """Evaluate a pipeline: a value, or eq, ne or or of values."""
    values, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "(":
            end = rest.index(")")
            values.append(_value(rest[:end], variables, dot))
            del rest[: end + 1]
        elif word.startswith('"'):
            values.append(json.loads(word))
        elif word.startswith("$"):
            values.append(variables[word])
        elif word.startswith("."):
            values.append(dot[word[1:]])
        else:
            values.append(word)
    if len(values) == 1:
        return values[0]
    name, *arguments = values
    if name == "or":
        return any(arguments)
    return {"eq": arguments[0] == arguments[1], "ne": arguments[0] != arguments[1]}[name]


def read_modelfile(text: str) -> dict[str, list[str]]:
    """Return the values of each instruction of a Modelfile."""
    result: dict[str, list[str]] = {}
    pattern = re.compile(r'^(\w+) (?:"""(.*?)"""|(.*?))$', re.DOTALL | re.MULTILINE)
    at = 0
    while at < len(text):
        match = pattern.match(text, at)
        assert match, text[at : at + 80]
        value = match[2] if match[2] is not None else match[3]
        result.setdefault(match[1], []).append(value)
        at = match.end() + 1
    return result
