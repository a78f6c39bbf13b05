"""The outcome of a run, as data and as one HTML file that needs no network."""

from __future__ import annotations

import json
from pathlib import Path

from ggft.settings.commands import ReportConfig
from ggft.system.errors import GgftError
from ggft.system.text import printable
from ggft.training.outcome import _DAMAGE, Outcome, _damaged, read_outcome
from ggft.training.page import html, size_cell
from ggft.training.run_directory import RunDirectory


def report(path: str, config: ReportConfig) -> str:
    """Return the report of a run as text, or as JSON, and write its page anew.

    Raises:
        InputError: as `read_outcome`.
    """
    outcome = read_outcome(path)
    run = RunDirectory(Path(path))
    try:
        page, lines = html(outcome), _lines(outcome)
        record = json.dumps(outcome.record(), ensure_ascii=False)
    except _DAMAGE as error:
        raise _damaged(run, error) from error
    where = str(run.report_html)
    try:
        run.write_text(run.report_html, page)
    except GgftError as error:
        # What came of a run can be said of an archive, too.
        where = f"not written: {error.message}"
    return record if config.json else printable("\n".join([*lines, f"page      {where}"]))


def _lines(outcome: Outcome) -> list[str]:
    """Return the report as lines for a terminal."""
    lines = [outcome.verdict().text, ""]
    lines += [f"{'memory':<30}{'predicted':>14}{'used':>14}"]
    lines += [
        f"  {part:<28}{size_cell(a):>14}{size_cell(b):>14}" for part, a, b in outcome.memory()
    ]
    lines += [
        "",
        f"steps     {len(outcome.steps)}, {outcome.tokens_per_s():.1f} tokens/s",
        f"ended     {outcome.state.get('ended')}",
    ]
    for sample in outcome.samples:
        lines += ["", *(f"{name + ':':<10}{text}" for name, text in sample.items())]
    return [*lines, ""]
