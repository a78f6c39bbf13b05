"""Every container and every schema: the same rows, whatever they come in."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggft.data.examples import Example, RowOptions, RowReader
from ggft.data.files import Row, read_rows
from ggft.data.sources.find import find_files
from ggft.prompts.messages import Message
from ggft.system.errors import InputError


def first(row: Row, format_name: str = "auto") -> Example:
    """Return the first example of a row."""
    return next(iter(RowReader(RowOptions(format_name)).examples(row)))


ROWS = [
    {"instruction": "say «hi»", "input": "", "output": "hi\nthere"},
    {"instruction": "多少？", "input": 'a, "b"', "output": "三;\t四"},
    {"instruction": "last", "input": "x", "output": "y \\ z"},
]


def table(rows: list[dict[str, str]], **how: Any) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **how)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CONTAINERS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "compact array": ("x.json", lambda rows: json.dumps(rows).encode()),
    "pretty array": (
        "x.json",
        lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    ),
    "CRLF": ("x.json", lambda rows: json.dumps(rows, indent=1).replace("\n", "\r\n").encode()),
    "BOM": ("x.json", lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode()),
    "data": ("x.json", lambda rows: json.dumps({"version": [1], "data": rows, "n": 3}).encode()),
    "train": ("x.json", lambda rows: json.dumps({"train": rows}, indent=1).encode()),
    "JSONL": ("x.jsonl", jsonl),
    "JSONL with BOM and blanks": (
        "x.jsonl",
        lambda rows: b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\r\n\r\n"),
    ),
    "JSONL without a last line end": ("x.jsonl", lambda rows: jsonl(rows).rstrip()),
    "JSONL called json": ("x.json", jsonl),
    "array called jsonl": ("x.jsonl", lambda rows: json.dumps(rows, indent=1).encode()),
    "objects": (
        "x.json",
        lambda rows: b"\n\n".join(json.dumps(r, indent=1).encode() for r in rows),
    ),
    "no suffix": ("data", lambda rows: json.dumps(rows).encode()),
    "gzip": ("x.jsonl.gz", lambda rows: gzip.compress(jsonl(rows))),
    "gzip by content": ("x.json", lambda rows: gzip.compress(json.dumps(rows).encode())),
    "CSV": ("x.csv", table),
    "CSV with semicolons": ("x.csv", lambda rows: table(rows, delimiter=";")),
    "TSV": ("x.tsv", lambda rows: table(rows, delimiter="\t")),
    "CSV with CRLF and BOM": (
        "x.csv",
        lambda rows: b"\xef\xbb\xbf" + table(rows, lineterminator="\r\n"),
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_containers_hold_the_same_rows(
    name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write = CONTAINERS[name]
    path = tmp_path / file
    path.write_bytes(write(ROWS))
    # What is read first decides what a file is, so only later reads can be tiny.
    if name in ("pretty array", "CRLF", "data", "train", "objects", "JSONL", "CSV", "TSV"):
        monkeypatch.setattr("ggft.data.files.CHUNK_BYTES", max(chunk, 64))
    assert [row.value for row in read_rows(path)] == ROWS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.dictionaries(st.text(min_size=1, max_size=4), json_values, max_size=4),
        min_size=1,
        max_size=8,
    ),
    indent=st.none() | st.integers(0, 3),
    chunk=st.sampled_from([1, 7, 50]),
    ascii_only=st.booleans(),
)
def test_any_json_survives_being_read_in_pieces(
    rows: list[dict[str, Any]],
    indent: int | None,
    chunk: int,
    ascii_only: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ggft.data.files.CHUNK_BYTES", chunk)
        read = list(read_rows(path))
    assert [row.value for row in read] == rows
    if indent is not None and all(rows):
        lines = text.split("\n")
        assert all(lines[row.line - 1].strip().startswith("{") for row in read)


def test_lines_are_where_rows_begin(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(table([*ROWS[:1], *ROWS]))
    assert [row.line for row in read_rows(path)] == [2, 4, 6, 7]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert [row.line for row in read_rows(path)] == [2, 7, 12]
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n\n\n three\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ggft.data.files.PART_CHARS", 5)
        parts = [(row.line, row.value, row.ends) for row in read_rows(path)]
    assert parts == [(1, "one\ntwo\n\n", False), (5, " three", True)]


Q: Message = {"role": "user", "content": "q"}
A: Message = {"role": "assistant", "content": "a"}
S: Message = {"role": "system", "content": "s"}
SCHEMAS: list[tuple[dict[str, Any], list[Message] | str]] = [
    ({"instruction": "q", "output": "a"}, [Q, A]),
    ({"instruction": "q", "input": "i", "output": "a"}, [{**Q, "input": "i"}, A]),
    ({"instruction": "", "input": "q", "output": "a"}, [Q, A]),
    ({"input": "q", "output": "a"}, [Q, A]),
    ({"prompt": "q", "response": "a"}, [Q, A]),
    ({"question": "q", "answer": "a"}, [Q, A]),
    ({"query": "q", "response": "a", "id": 7}, [Q, A]),
    ({"instruction": "q", "output": "a", "text": "whole"}, [Q, A]),
    ({"instruction": "q", "output": "a", "system": "s"}, [S, Q, A]),
    ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [Q, A, Q, A]),
    ({"prompt": "q", "completion": "a"}, [Q, A]),
    ({"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
    ({"messages": [S, Q, A]}, [S, Q, A]),
    ({"messages": [Q, A], "system": "s"}, [S, Q, A]),
    ({"messages": [{"role": "developer", "content": "s"}, Q, A]}, [S, Q, A]),
    ({"messages": [Q, {**A, "weight": 0}, Q, A]}, [Q, {**A, "learn": False}, Q, A]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [Q, A]),
    ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q, A]),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "a"},
                {"from": "observation", "value": "t"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [S, Q, A, {"role": "tool", "content": "t"}, A],
    ),
    ({"conversations": [Q, A], "id": "x"}, [Q, A]),
    ({"text": "whole"}, "whole"),
]


@pytest.mark.parametrize(("row", "expected"), SCHEMAS)
def test_schemas_are_recognized(row: dict[str, Any], expected: list[Message] | str) -> None:
    example = first(Row(row, Path("x"), 1))
    assert (example.messages or example.text) == expected


def test_a_format_overrides_what_a_row_looks_like() -> None:
    row = Row({"instruction": "q", "output": "a", "text": "whole"}, Path("x"), 1)
    assert first(row, "text").text == "whole"
    with pytest.raises(InputError, match="without a conversation"):
        first(row, "chat")


def test_folders_and_several_files(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "notes.pdf"):
        (tmp_path / name).write_bytes(jsonl(ROWS[:1]))
    files = find_files([tmp_path])
    assert [p.name for p in files.train] == ["train.jsonl"]
    assert [p.name for p in files.valid] == ["valid.jsonl"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.json").write_bytes(jsonl(ROWS[1:2]))
    (other / "b.csv").write_bytes(table(ROWS[2:]))
    examples = [e for path in find_files([tmp_path, other]).train for e in RowReader().read(path)]
    assert [e.messages[-1]["content"] for e in examples] == [r["output"] for r in ROWS]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
words = texts.filter(str.strip)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"instruction": words, "output": texts}, optional={"input": texts})
        | st.fixed_dictionaries({"prompt": words, "completion": texts})
        | st.fixed_dictionaries({"text": texts})
        | st.builds(
            lambda turns: {"messages": [{"role": r, "content": c} for r, c in turns]},
            st.lists(
                st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), texts),
                min_size=1,
            ),
        ),
        min_size=1,
    ),
)
def test_any_mix_of_rows_round_trips(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    (folder / "a.jsonl").write_bytes(jsonl(rows))
    (folder / "b.json").write_text(json.dumps({"data": rows}, indent=1))
    for name in ("a.jsonl", "b.json"):
        examples = list(RowReader().read(folder / name))
        assert len(examples) == len(rows)
        for row, example in zip(rows, examples, strict=True):
            if "text" in row:
                assert example.text == row["text"]
            elif "messages" in row:
                assert example.messages == row["messages"]
            else:
                assert example.messages[-1]["content"] == row.get("output", row.get("completion"))
                assert example.messages[0]["content"] == row.get("instruction", row.get("prompt"))


@pytest.mark.parametrize("packed", [False, True])
def test_lines_that_end_with_cr_alone(tmp_path: Path, packed: bool) -> None:
    table = b'instruction,output\rask,say\r"two\rlines",yes\r' + b"q,a\r" * 100_000
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    path.write_bytes(gzip.compress(table) if packed else table)
    rows = list(read_rows(path))
    assert len(rows) == 100_002
    assert rows[1].value == {"instruction": "two\nlines", "output": "yes"}
    assert (rows[0].line, rows[2].line) == (2, 5)


BLANK = b" \n" * 300_000  # more than is read at a time


@pytest.mark.parametrize(
    ("name", "first", "second", "line"),
    [
        ("x.jsonl", b'{"a": 1}\n', b'{"a": 2}', 300_002),
        ("x.json", b'[{"a": 1},\n', b'{"a": 2}]', 300_002),
        ("x.csv", b"a\n1\n", b"2\n", 300_003),
        ("x.txt", b"a\n", b"b\n", 300_002),
    ],
)
def test_many_blank_lines(
    tmp_path: Path,
    name: str,
    first: bytes,
    second: bytes,
    line: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ggft.data.files.PART_CHARS", 0)
    path = tmp_path / name
    blank = b"\n" * 300_000 if name == "x.csv" else BLANK
    path.write_bytes(first + blank + second)
    assert [row.line for row in read_rows(path)] == [line - 300_001, line]
    if name != "x.csv":
        path.write_bytes(BLANK + first + second)
        assert next(read_rows(path)).line == 300_001


def test_blank_lines_in_a_quoted_field_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'a\n1\n\n\n"2\n\n\n3"\n\n\n4\n')
    assert [row.value["a"] for row in read_rows(path)] == ["1", "2\n\n\n3", "4"]  # type: ignore[index]
