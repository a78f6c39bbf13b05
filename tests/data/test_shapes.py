"""Nothing of a row is dropped without a word: used, listed, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.data.examples import RowOptions, RowReader
from ggft.data.files import Row
from ggft.system.errors import InputError
from tests.data.shapes import READ, REFUSED
from tests.support.models import Spec, write_model

ROLES = ("role", "from", "type")


def read(row: dict[str, Any], **options: Any) -> tuple[str, list[str]]:
    """Return all that is rendered of a row, and what is said of it."""
    reader = RowReader(RowOptions(**options))
    example = reader.example(Row(row, Path("x"), 1))
    texts = [example.text] if example.text is not None else []
    texts += [f"{m['content']}\n{m.get('input', '')}" for m in example.messages]
    return "\n".join(texts), reader.notes()


def leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield every text and number of a field but roles, with the column it stands in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ROLES:
                yield from leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    elif value not in (None, "", True, False):
        yield str(value), name


@pytest.mark.parametrize("name", READ)
def test_all_of_a_row_is_rendered_or_listed(name: str) -> None:
    rendered, notes = read(READ[name])
    for column, value in READ[name].items():
        for text, where in leaves(value, column):
            said = any(f" {where}" in note for note in notes)
            assert said or text in rendered, f"{column}: {text}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rendered_is_refused_by_name(name: str) -> None:
    row, named = REFUSED[name]
    with pytest.raises(InputError) as refused:
        read(row)
    assert named in str(refused.value)
    assert refused.value.hint


def test_sixty_shapes() -> None:
    assert len(READ) + len(REFUSED) >= 60


def test_prepare_lists_what_it_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "tiny.gguf", Spec()).path
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(READ[name]) + "\n" for name in READ))
    arguments = ["prepare", "-m", str(model), "-d", str(data), "--val-split", "0", "--json"]
    assert run(cli, arguments) == 0
    out = capsys.readouterr().out
    unused = json.loads(out.splitlines()[-1])["unused"]
    assert unused["category"] == 4
    assert unused["prompt"] == 2
    assert unused["ctxs.id"] == unused["conversation.toxic"] == 1


@pytest.mark.parametrize(
    ("row", "options", "rendered"),
    [
        ({"q": "ask", "a": "say"}, {"columns": ["q=instruction", "a=output"]}, "ask\n\nsay\n"),
        ({"问": "ask", "答": "say"}, {}, "ask\n\nsay\n"),
        ({"question": "ask", "solution": "long", "answer": "say"},
         {"ignored": ["solution"]}, "ask\n\nsay\n"),
        ({"question": "ask", "solution": "long", "answer": "say"},
         {"columns": ["answer=output"]}, "ask\n\nsay\n"),
        ({"text": "whole", "label": "good"},
         {"columns": ["text=instruction", "label=output"]}, "whole\n\ngood\n"),
        ({"question": "ask", "choices": ["x"], "answer": "say"},
         {"columns": ["choices=ignore"]}, "ask\n\nsay\n"),
        ({"question": "ask", "choices": "x or y", "answer": "say"},
         {"columns": ["choices=input"]}, "ask\nx or y\nsay\n"),
    ],
)  # fmt: skip
def test_columns_are_what_the_user_says(
    row: dict[str, Any], options: dict[str, Any], rendered: str
) -> None:
    assert read(row, **options)[0] == rendered


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"columns": ["qestion=instruction"]}, "no row has a column"),
        ({"ignored": ["x"]}, "no row has a column"),
        ({"columns": ["question"]}, "NAME=ROLE"),
        ({"columns": ["question=ask"]}, "NAME=ROLE"),
        ({"columns": ["question=input", "question=output"]}, "twice"),
    ],
)
def test_columns_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read({"question": "ask", "answer": "say"}, **options)


def test_turns_in_a_table_are_json() -> None:
    text = json.dumps([{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}])
    assert read({"messages": text})[0] == "ask\n\nsay\n"


@pytest.mark.parametrize(
    ("mark", "trained"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False),
        ({"training": True}, True), ({"loss": False}, False), ({"loss_scale": 0.0}, False),
        ({"masked": True}, False), ({"masked": False}, True), ({"mask": 1}, False),
        ({"weight": None, "loss": None}, True), ({"learn": False, "masked": True}, False),
    ],
)  # fmt: skip
def test_marks_of_turns(mark: dict[str, Any], trained: bool) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", **mark},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    example = RowReader().example(Row({"messages": turns}, Path("x"), 1))
    assert example.messages[1].get("learn", True) is trained


@pytest.mark.parametrize(
    "mark", [{"weight": 0.5}, {"loss": "no"}, {"masked": 2}, {"weight": 1, "masked": True}]
)
def test_marks_that_are_neither(mark: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]
    with pytest.raises(InputError, match="turn 2: "):
        RowReader().example(Row({"messages": turns}, Path("x"), 1))
