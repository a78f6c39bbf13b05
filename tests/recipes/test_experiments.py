"""The runs behind the table of recipes: kept as lines, found again by their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bench.recipes as experiments
from bench.recipes import Asker, Experiment, append, find, ratio, read_results, run_missing, table
from ggft.data.advice import recipes

SETTINGS = {
    "epochs": 12,
    "lr": 1e-3,
    "rank": 8,
    "alpha": 32.0,
    "mix_share": 0.25,
    "mix_as_base": False,
}


class FakeBench:
    """Notes what is run."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []

    def base(self) -> dict[str, Any]:
        return {"experiment": "base", "general_questions": 20, "foreign": 2.0}

    def load(self, x: Experiment, seed: int) -> Any:
        return x.rows.name

    def settle(self, x: Experiment, data: Any) -> dict[str, Any]:
        return {**SETTINGS, **x.given}

    def run(self, x: Experiment, data: Any, seed: int) -> dict[str, Any]:
        self.runs.append((data, seed))
        return {"exact": seed / 4, "general": 1.0, "foreign": 2.0, "verdict": "learned"}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "recipes.jsonl")
    return FakeBench()


def test_a_series_goes_on_where_it_was_stopped(bench: Any) -> None:
    chosen = {"a": Experiment(Path("a.json")), "b": Experiment(Path("b.json"))}
    run_missing(bench, chosen, [1], {})
    assert bench.runs == [("a.json", 1), ("b.json", 1)]
    run_missing(bench, chosen, [1, 2], {})
    assert bench.runs[2:] == [("a.json", 2), ("b.json", 2)]
    run_missing(bench, {"a": chosen["a"]}, [1], {"alpha": 16.0})
    assert bench.runs[4:] == [("a.json", 1)], "other settings are another run"
    assert [r.get("seed") for r in read_results()] == [None, 1, 1, 2, 2, 1]


def test_the_table_has_a_line_for_each_recipe_and_the_medians_of_its_seeds(bench: Any) -> None:
    run_missing(bench, {"a": Experiment(Path("a.json"))}, [1, 2, 4], {})
    append({"experiment": "a", "seed": 1, "settings": {**SETTINGS, "rank": 64}, "verdict": "x"})
    *_, plain, high = table(read_results())
    assert "| 3 | 50% |" in plain
    assert "1.000" in plain
    assert "rank 64" in high


def test_answers_are_judged_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ""
    monkeypatch.setattr(Asker, "answers", lambda *_: (said[: n + 1] for n in range(len(said))))
    asker: Any = Asker(None, None)  # type: ignore[arg-type]
    for said, row, right in (
        ("It opens at 6:40.", {"accept": ["6:40"]}, True),
        ("It opens at seven.", {"accept": ["6:40"]}, False),
        ('{"item": "nails", "count": 3}', {"output": '{"item": "screws", "count": 9}'}, True),
        ("three nails", {"output": '{"item": "screws", "count": 9}'}, False),
        ("A line.\nSo sings the clock.", {}, True),
        ("A line.", {}, False),
    ):
        assert asker.is_right(row) is right, said
    assert ratio(1, 4) == 0.25
    assert ratio(0, 0) is None


def test_every_recipe_names_runs_that_were_made() -> None:
    """With the settings that the table has today, or it says that it was not measured."""
    made = read_results()
    for rule in (*recipes()["recipe"], recipes()["scale"], recipes()["hold_out"]):
        if rule["experiment"] in ("rule of thumb", "not yet measured"):
            continue
        given = {key: rule[key] for key in ("batch_size", "lr", "mix_share") if key in rule}
        if "rows_seen" not in rule and "epochs" in rule:
            given["epochs"] = rule["epochs"]
        for name in rule["experiment"].split():
            settings = [r["settings"] for r in made if r["experiment"] == name]
            assert find(settings, given), f"{name} was not run with {given}"


def test_results_are_of_an_experiment_and_a_seed() -> None:
    for record in read_results():
        assert record["experiment"] == "base" or record["seed"]
