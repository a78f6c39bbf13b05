"""The outcome of a run, as data and as one HTML file that needs no network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ggft import __version__
from ggft.rundir import RunDirectory


@dataclass(frozen=True)
class Outcome:
    """All that a report is made of."""

    config: dict[str, Any]
    model: str
    n_steps: int
    plan: dict[str, Any]
    engine: dict[str, Any]
    state: dict[str, Any]
    metrics: list[dict[str, Any]]

    def verdict(self) -> str:
        """Return what was learned, in a sentence with its numbers."""
        losses = [record["loss"] for record in self.metrics if "loss" in record]
        return f"training loss {losses[0]:.3f} → {losses[-1]:.3f}"


def write_report(run: RunDirectory, outcome: Outcome) -> None:
    """Write report.json and report.html."""
    record = {"ggft": __version__, **asdict(outcome), "verdict": outcome.verdict()}
    run.write_text(run.report_json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
