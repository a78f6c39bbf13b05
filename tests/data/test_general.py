"""The packaged general rows: what is mixed in, and what forgetting is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ggft

DATA = Path(ggft.__file__).parent / "data"


def rows(name: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return found


def is_chinese(row: dict[str, str]) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in row["instruction"])


@pytest.mark.parametrize(("name", "n"), [("general.json", 240), ("general_check.json", 40)])
def test_rows_are_complete_distinct_and_in_both_languages(name: str, n: int) -> None:
    found = rows(name)
    assert len(found) == n
    assert all(set(row) == {"instruction", "input", "output"} for row in found)
    assert all(row["instruction"] and row["output"] for row in found)
    assert len({(row["instruction"], row["input"]) for row in found}) == n
    assert 0.2 * n < sum(map(is_chinese, found)) < 0.5 * n


def test_forgetting_is_not_measured_on_what_is_mixed_in() -> None:
    mixed, checked = rows("general.json"), rows("general_check.json")
    assert not {row["instruction"].lower() for row in checked} & {
        row["instruction"].lower() for row in mixed if not row["input"]
    }
    assert not {row["output"] for row in checked} & {row["output"] for row in mixed}
