"""The table in docs/rows.md says what is so: each row of it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ggft.data.examples import RowReader
from ggft.data.files import Row
from ggft.system.errors import InputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rows.md"
LINE = re.compile(r"^\| ([^|]+) \| `(\{.*\})` \| (.+) \|$", re.M)
LINES = LINE.findall(PAGE.read_text(encoding="utf-8"))


def outcome(row: str) -> str:
    """Say in the page's words how a row is read; what is trained is bold."""
    reader = RowReader()
    try:
        example = next(
            iter(reader.examples(Row(json.loads(row.replace("\\|", "|")), Path("x"), 1)))
        )
    except InputError as error:
        return f"refused: {error.message}"
    if example.text is not None:
        parts = [f"text **{example.text}**"]
    else:
        parts = []
        for message in example.messages:
            learned = message["role"] == "assistant" and message.get("learn", True)
            text = " ⏎ ".join(filter(None, (message["content"], message.get("input"))))
            parts.append(f"{message['role']} {f'**{text}**' if learned else text}")
    unused = [f"not used: {name}" for name in reader.unused]
    return " · ".join([*parts, *unused])


def test_the_table_is_long() -> None:
    assert len(LINES) >= 30


@pytest.mark.parametrize(("who", "row", "told"), LINES)
def test_rows_are_read_as_the_page_says(who: str, row: str, told: str) -> None:
    assert told == outcome(row), who
