"""Data that cannot be trained on: exit code 2, file and line, what was found, what to do."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ggft.cli import cli
from ggft.command import run
from tests.support.models import CHATML, Spec, write_model

GOOD = b'{"instruction": "a", "output": "b"}\n'


def rows(*values: Any) -> bytes:
    return b"".join(json.dumps(v).encode() + b"\n" for v in values)


def chat(*turns: Any) -> bytes:
    return GOOD + rows({"messages": list(turns)})


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
# (name, file name, content, line, what the message says)
CASES: list[tuple[str, str, bytes, int | None, list[str]]] = [
    ("empty", "x.json", b"", 1, ["the file is empty"]),
    ("blanks", "x.jsonl", b" \n\n", 1, ["the file is empty"]),
    ("empty array", "x.json", b"[]", None, ["the file has no rows"]),
    ("empty table", "x.csv", b"instruction,output\n", None, ["the file has no rows"]),
    ("malformed line", "x.jsonl", GOOD + b'{"instruction": "a",\n', 2, ["malformed JSON"]),
    ("no comma", "x.json", b"[" + GOOD + GOOD + b"]", 2, ["expected ','"]),
    (
        "trailing comma",
        "x.json",
        b"[" + GOOD.strip() + b",\n]",
        2,
        ["Expecting value", "found ']'"],
    ),
    ("cut array", "x.json", b"[" + GOOD.strip() + b',\n{"a', 2, ["Unterminated string"]),
    ("unclosed", "x.json", b'[{"instruction": "a", "output": "b"}', 1, ["the end of the file"]),
    ("after the array", "x.json", b"[" + GOOD.strip() + b"] tail", 1, ["found 'tail'"]),
    ("single quotes", "x.jsonl", b"{'instruction': 'a'}\n", 1, ["malformed JSON", "quotes"]),
    ("raw newline", "x.json", b'[{"output": "a\nb"}]', 1, ["Invalid control character"]),
    ("repeated key", "x.jsonl", b'{"output": "a", "output": "b"}\n', 1, ["'output' is repeated"]),
    ("NaN", "x.jsonl", b'{"output": NaN}\n', 1, ["NaN is not a JSON value"]),
    ("deep", "x.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", 1, ["nested too deeply"]),
    ("deep array", "x.json", b"[" * 100_000, 1, ["nested too deeply"]),
    ("not JSON", "x.json", b"hello", 1, ["`[` or `{`"]),
    ("string row", "x.jsonl", GOOD + b'"text"\n', 2, ["found a string"]),
    ("array row", "x.json", b"[[1, 2]]", 1, ["found an array"]),
    ("null row", "x.json", b"[null]", 1, ["found null"]),
    ("UTF-16", "x.json", "[{}]".encode("utf-16"), 1, ["UTF-16"]),
    ("bad UTF-8", "x.jsonl", GOOD + b'{"output": "\xff\xfe"}\n', 2, ["not UTF-8", "ff fe"]),
    ("Latin-1", "x.json", b'[\n{"output": "caf\xe9 ol"}]', 2, ["not UTF-8", "e9"]),
    ("zip", "x.json", b"PK\x03\x04xx", 1, ["a zip archive"]),
    ("parquet", "x.jsonl", b"PAR1xx", None, ["Parquet file"]),
    ("web page", "x.json", b"<!DOCTYPE html>", 1, ["an HTML page"]),
    ("LFS", "x.json", b"version https://git-lfs.github.com/spec/v1\n", 1, ["Git LFS pointer"]),
    ("model", "x.json", b"GGUF\x03\0\0\0", 1, ["a GGUF model"]),
    ("damaged gzip", "x.json.gz", gzip.compress(GOOD * 99)[:-9], None, ["damaged gzip"]),
    ("unknown kind", "x.docx", b"hello", 1, ["unknown kind of data file"]),
    ("ragged table", "x.csv", b"instruction,output\na,b\na\n", 3, ["found 1", "expected 2"]),
    ("open quote", "x.csv", b'instruction,output\na,"b\n', 2, ["malformed table"]),
    ("no header", "x.csv", b"what is it,a thing\n", None, ["the file has no rows"]),
    ("odd header", "x.csv", b"a,b\n1,2\n", 2, ["no known format", "found a, b"]),
    ("same columns", "x.tsv", b"output\toutput\na\tb\n", 1, ["repeated columns"]),
    ("no output", "x.jsonl", GOOD + rows({"instruction": "a"}), 2, ["without an answer"]),
    ("null output", "x.jsonl", rows({"instruction": "a", "output": None}), 1, ["output is not"]),
    ("number", "x.jsonl", rows({"instruction": "a", "output": 4}), 1, ["found a number"]),
    ("no question", "x.jsonl", rows({"instruction": "", "output": "b"}), 1, ["a question"]),
    ("two answers", "x.jsonl", rows({"prompt": "a", "output": "b", "answer": "c"}), 1, ["one of"]),
    ("no fields", "x.jsonl", GOOD + b"{}\n", 2, ["no known format", "found no fields"]),
    ("preferences", "x.jsonl", rows({"chosen": "a", "rejected": "b"}), 1, ["preference pairs"]),
    ("bad history", "x.jsonl", rows({"query": "a", "answer": "b", "history": ["c"]}), 1, ["pairs"]),
    ("no turns", "x.jsonl", chat(), 2, ["messages is empty"]),
    ("turns text", "x.jsonl", rows({"messages": "hi"}), 1, ["not a list", "a string"]),
    ("bad role", "x.jsonl", chat(U, {"role": "robot", "content": "b"}), 2, ["turn 2", "'robot'"]),
    ("no role", "x.jsonl", chat({"content": "b"}), 2, ["turn 1: unknown role"]),
    ("turn text", "x.jsonl", chat(U, "hi"), 2, ["turn 2: not an object"]),
    ("null content", "x.jsonl", chat(U, {"role": "assistant", "content": None}), 2, ["turn 2"]),
    ("picture", "x.jsonl", chat({**U, "content": [{"type": "image_url"}]}), 2, ["'image_url'"]),
    ("tool call", "x.jsonl", chat(U, {"role": "assistant", "tool_calls": [1]}), 2, ["tool_calls"]),
    (
        "bad from",
        "x.jsonl",
        rows({"conversations": [{"from": 3, "value": ""}]}),
        1,
        ["found a num"],
    ),
    ("NUL", "x.jsonl", rows({"instruction": "a\0", "output": "b"}), 1, ["NUL", "\\u0000"]),
    ("surrogate", "x.jsonl", b'{"instruction": "\\ud800", "output": "b"}\n', 1, ["\\ud800"]),
    ("no answers", "x.jsonl", rows({"messages": [U]}), None, ["nothing to train on", "1 without"]),
    ("empty answers", "x.jsonl", rows({"prompt": "a", "answer": " "}), None, ["nothing to train"]),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf").path


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one message of a refused command that leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    assert run(cli, arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before
    assert err.count("ggft: ") == 1
    return err[err.index("ggft: ") :]


@pytest.mark.parametrize(
    ("file", "content", "line", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_data_is_refused_with_file_and_line(
    file: str,
    content: bytes,
    line: int | None,
    says: list[str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    arguments = ["prepare", "-m", str(tiny), "-d", str(path), "--out", str(tmp_path / "out")]
    message = refused(arguments, tmp_path, capsys)
    assert message.startswith(f"ggft: {path}:{line}: " if line else f"ggft: {path}: ")
    for part in says:
        assert part in message
    assert "found" in message or "expected" in message
    assert "→" in message
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "{folder}/none.json"], "No such file"),
        (["-d", "/dev/zero"], "not a regular file"),
        (["-d", "{folder}/fifo"], "not a regular file"),
        (["-d", "{folder}"], "no training data in this folder"),
        (["-d", "a\0b"], "cannot read the data"),
        ([], "no training data given"),
        (["-d", "{folder}/x.jsonl", "--format", "csv"], "no such format"),
        (["-d", "{folder}/x.jsonl", "--format", "sharegpt"], "without a conversation"),
        (["-d", "{folder}/x.jsonl", "--template", "nope"], "no such template"),
        (["-d", "{folder}/x.jsonl", "--val-split", "1"], "--val-split is out of range"),
        (["-d", "{folder}/x.jsonl", "--preview", "-1"], "--preview is out of range"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str],
    says: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    if says != "no training data in this folder":
        (folder / "x.jsonl").write_bytes(GOOD)
    filled = [a.replace("{folder}", str(folder)) for a in arguments]
    assert says in refused(["prepare", "-m", str(tiny), *filled], tmp_path, capsys)


TEMPLATES = [
    ("{% for m in messages %}", "does not compile"),
    ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("{{ raise_exception('I am not for you \x1b[31m') }}", "I am not for you"),
    ("{{ 'x' * 10**10 }}", "too long a text"),
]


@pytest.mark.parametrize(("template", "says"), TEMPLATES)
def test_bad_templates_are_refused(
    template: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m.gguf", Spec(chat_template=template)).path
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD)
    message = refused(["prepare", "-m", str(model), "-d", str(path)], tmp_path, capsys)
    assert says in message
    assert "\x1b" not in message
    assert "→" in message


def test_a_template_that_refuses_a_row_names_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
    model = write_model(tmp_path / "m.gguf", Spec(chat_template=strict)).path
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + rows({"messages": [{"role": "system", "content": "s"}, U, A]}))
    message = refused(["prepare", "-m", str(model), "-d", str(path)], tmp_path, capsys)
    assert message.startswith(f"ggft: {path}:2: the chat template refuses")
    assert "no system" in message


def test_a_giant_line_is_refused(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ggft.data.files.MAX_ROW_BYTES", 1000)
    for name, content in (
        ("x.jsonl", GOOD + b'{"instruction": "' + b"a" * 5000),
        ("y.json", b'[{"instruction": "' + b"a" * 2_000_000),
        ("z.txt", b"a" * 5000),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert "long" in refused(["prepare", "-m", str(tiny), "-d", str(path)], tmp_path, capsys)
