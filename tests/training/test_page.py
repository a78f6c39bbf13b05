from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ggft.recipes.report import report
from ggft.settings.commands import ReportConfig
from ggft.system.errors import InputError
from ggft.system.machine import peak_rss_bytes
from ggft.training.outcome import Outcome
from ggft.training.page import html, write_report
from ggft.training.run_directory import RunDirectory


def step(number: int, loss: float, count: int = 10) -> dict[str, Any]:
    return {
        "step": number, "epoch": number / 10, "loss": loss, "lr": 1e-3, "grad_norm": 1.0,
        "trained_tokens": count, "tokens_seen": 100 * number, "tokens_per_s": 50.0,
        "elapsed_s": 2.0 * number,
    }  # fmt: skip


def outcome(losses: list[float], held_out: list[float] | None = None, **changes: Any) -> Outcome:
    metrics = [step(i + 1, loss) for i, loss in enumerate(losses)]
    metrics += [{"step": i, "val_loss": x, "val_tokens": 9} for i, x in enumerate(held_out or [])]
    values: dict[str, Any] = {
        "settings": {"lr": 1e-3, "data": ["a.json"], "memory": None},
        "model": "tiny",
        "plan": {
            "total_bytes": 3 << 20,
            "parts_bytes": {"weights (mapped)": 1 << 20, "scratch": 2 << 20, "program": 7},
        },
        "engine": {"device": "CPU", "buffers": {"weights": 1 << 20, "compute": 1 << 20}},
        "account": {"n_rows": 3, "warnings": []},
        "state": {"ended": "all steps done"},
        "metrics": metrics,
        "peak_bytes": 5 << 20,
        "n_held_out": 30,
        "samples": [],
    }
    return Outcome(**{**values, **changes})


@pytest.mark.parametrize(
    ("losses", "held_out", "kind"),
    [
        ([3.0] * 5 + [1.0] * 15, [3.0, 2.0, 1.5], "learned"),
        ([3.0] * 5 + [1.0] * 15, [3.0, 3.1, 3.5], "memorised"),
        ([3.0] * 20, [3.0, 2.99, 2.98], "too little"),
        ([3.0] * 5 + [0.01] * 15, None, "memorised"),
    ],
)
def test_verdicts(losses: list[float], held_out: list[float] | None, kind: str) -> None:
    assert outcome(losses, held_out).verdict().kind == kind


def test_losses_are_weighted_by_tokens() -> None:
    made = outcome([])
    made.metrics.extend([step(1, 4.0, 1), step(2, 1.0, 3)])
    # One step is the start; the last epoch holds both.
    assert made.losses().train_before == 4.0
    assert made.losses().train_after == pytest.approx((4.0 + 3 * 1.0) / 4)


def test_speed_leaves_out_the_first_step() -> None:
    assert outcome([1.0] * 5).tokens_per_s() == pytest.approx(50.0)
    assert outcome([1.0]).tokens_per_s() == 50.0


def test_memory_is_compared_part_by_part() -> None:
    rows = {part: (planned, used) for part, planned, used in outcome([1.0]).memory()}
    assert rows["scratch"] == (2 << 20, 1 << 20)
    assert rows["program"] == (7, None)
    assert rows["peak of the process"] == (3 << 20, 5 << 20)


HOSTILE = '<script>alert("1")</script>&'


def test_the_page_is_whole_and_needs_no_network() -> None:
    samples = [{"question": HOSTILE, "before": "a\nb", "after": HOSTILE}]
    made = outcome(
        [2.0, 1.0], [2.0, 1.0], model=HOSTILE, samples=samples,
        account={"n_rows": 3, "warnings": [HOSTILE]}, settings={"template": HOSTILE},
    )  # fmt: skip
    page = html(made)
    assert "<script" not in page
    assert not re.search(r"(src|href)=|https?:|url\(|@import", page)
    assert page.count("<table") == page.count("</table")
    for part in ("held out", "Answers before and after", "&lt;script&gt;", "2.0 MiB"):
        assert part in page


def test_both_files_are_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_report(run, outcome([2.0, 1.0]))
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["verdict"]["kind"] == "learned"
    assert record["steps"] == 2
    assert "metrics" not in record
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_a_run_is_reported_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    samples = [{"question": "who?", "before": "x\x1b[2J", "after": "me"}]
    made = outcome([2.0, 1.0], samples=samples)
    write_report(run, made)
    lines = [json.dumps(record) for record in made.metrics]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"torn']))
    page = run.report_html.read_text()
    run.report_html.unlink()
    text = report(str(tmp_path), ReportConfig())
    assert text.startswith("learned: training loss 2.000 → 1.500")
    assert "\x1b" not in text
    assert run.report_html.read_text() == page
    assert json.loads(report(str(tmp_path), ReportConfig(json=True)))["samples"] == samples


def test_a_run_on_a_read_only_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(RunDirectory(tmp_path), outcome([2.0, 1.0]))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1, 2.0)) + "\n")

    def fail(*_: object) -> None:
        raise InputError("cannot write here: Read-only file system")

    monkeypatch.setattr(RunDirectory, "write_text", fail)
    assert "page      not written: cannot write here" in report(str(tmp_path), ReportConfig())


@pytest.mark.parametrize("damage", ["missing", "torn", "foreign"])
def test_what_is_no_run_is_named(tmp_path: Path, damage: str) -> None:
    if damage != "missing":
        (tmp_path / "report.json").write_text('{"model": 1}' if damage == "foreign" else "{")
        (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        report(str(tmp_path), ReportConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss", "x"), ("step", None), ("epoch", math.nan), ("tokens_seen", []), ("lr", {})],
)
def test_damaged_metrics_are_named(tmp_path: Path, key: str, value: object) -> None:
    made = outcome([2.0, 1.0])
    write_report(RunDirectory(tmp_path), made)
    lines = [json.dumps({**record, key: value}) for record in made.metrics]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="not as ggft wrote it"):
        report(str(tmp_path), ReportConfig())


@pytest.mark.parametrize("key", ["plan", "settings", "engine", "account", "state", "samples"])
def test_a_damaged_record_is_named(tmp_path: Path, key: str) -> None:
    made = outcome([2.0, 1.0])
    write_report(RunDirectory(tmp_path), made)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, made.metrics)))
    record = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**record, key: 3}))
    with pytest.raises(InputError, match="not as ggft wrote it"):
        report(str(tmp_path), ReportConfig())


def test_peak_size_of_this_process() -> None:
    assert 10 << 20 < peak_rss_bytes() < 1 << 40
