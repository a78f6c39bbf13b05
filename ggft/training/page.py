"""The outcome as one HTML page with its curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ggft import __version__
from ggft.system.text import format_bytes
from ggft.training.outcome import Outcome
from ggft.training.run_directory import RunDirectory

# The account of the rows, in words.
_ROWS = {
    "n_rows": "rows read",
    "n_kept": "kept for training",
    "n_held_out": "held out",
    "n_duplicates": "dropped as duplicates",
    "n_near": "nearly equal to another",
    "n_truncated": "cut to the longest length",
    "n_untrainable": "dropped, with nothing to learn",
    "n_tokens": "tokens to train with",
    "n_trained": "of them in answers",
    "val_share": "share to hold out",
    "row_kind": "what the rows are",
    "n_wordings": "rows for each answer",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #8c959f; --line: #d0d7de;
  --a: #0969da; --b: #bc4c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --faint: #7d8590; --line: #30363d; --a: #4493f8;
    --b: #f0883e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 56rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { border-left: 4px solid var(--a); padding: .5rem 1rem; background: #8882; }
table { border-collapse: collapse; } td, th { padding: .2rem 1rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child { overflow-wrap: anywhere; }
table.numbers :is(td, th) + :is(td, th) pre { white-space: nowrap; }
table.numbers :is(td, th) + :is(td, th) { text-align: right; font-variant-numeric: tabular-nums; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem 1.5rem; padding: .7rem 0;
  border-bottom: 1px solid var(--line); }
.answers > * { min-width: 0; }
.answers > .asked { grid-column: 1 / -1; font-weight: 600; }
.answers b { display: block; color: var(--faint); font-weight: 400; font-size: .85rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 12px; }
pre { white-space: pre-wrap; margin: 0; font: inherit; }
@media (max-width: 40rem) { .answers { grid-template-columns: 1fr; } svg text { font-size: 20px; } }
"""


def write_report(run: RunDirectory, outcome: Outcome) -> None:
    """Write report.json and report.html."""
    text = json.dumps(outcome.record(), indent=1, ensure_ascii=False)
    run.write_text(run.report_json, text + "\n")
    run.write_text(run.report_html, html(outcome))


def html(outcome: Outcome) -> str:
    """Return the report as a page without scripts or links to anything outside."""
    verdict = outcome.verdict()
    losses = [("training", "--a", [(s["step"], s["loss"]) for s in outcome.steps])]
    if outcome.evaluations:
        held_out = [(e["step"], e["val_loss"]) for e in outcome.evaluations]
        losses.append(("held out", "--b", held_out))
    speed = [(s["step"], s["tokens_per_s"]) for s in outcome.steps]
    rates = [(s["step"], s["lr"]) for s in outcome.steps]
    sections = [
        f"<h1>{escape(outcome.model)}</h1>",
        f'<p class="verdict">{escape(verdict.text)}</p>',
        "<h2>Loss (nats per trained token)</h2>",
        chart(losses),
        *_asked(outcome),
        *_samples(outcome),
        "<h2>Memory, predicted and used</h2>",
        _table(
            [
                (part, size_cell(planned), size_cell(used))
                for part, planned, used in outcome.memory()
            ],
            head=("part", "predicted", "used"),
        ),
        f"<h2>Speed (tokens per second; {outcome.tokens_per_s():.1f} on average)</h2>",
        chart([("tokens/s", "--a", speed)], height=130),
        "<h2>Learning rate</h2>",
        chart([("lr", "--a", rates)], height=130),
        "<h2>Data</h2>",
        _table(_plain({_ROWS.get(key, key): value for key, value in outcome.account.items()})),
        "<h2>Settings</h2>",
        _table(_plain(outcome.settings)),
        "<h2>Engine</h2>",
        _table(_plain({"ggft": __version__, **outcome.engine})),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>ggft: {escape(outcome.model)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _asked(outcome: Outcome) -> list[str]:
    """Return rows that were asked, what they say beside what was answered; wrong ones first."""
    if not outcome.asked:
        return []
    parts = ["<h2>Rows asked at the end</h2>", f"<p>{escape(outcome.tally().text())}</p>"]
    for record in sorted(outcome.asked, key=lambda r: (r["held_out"], r["as_given"])):
        asked, expected, given = (
            f"<pre>{escape(record[name])}</pre>" for name in ("question", "expected", "given")
        )
        mark = "as given" if record["as_given"] else "otherwise"
        side = "held out, " if record["held_out"] else ""
        parts.append(
            f'<div class="answers"><div class="asked">{asked}</div>'
            f"<div><b>expected</b>{expected}</div><div><b>{side}{mark}</b>{given}</div></div>"
        )
    return parts


def _samples(outcome: Outcome) -> list[str]:
    """Return questions, each with its answers side by side (one below the other on a phone)."""
    if not outcome.samples:
        return []
    parts = ["<h2>Answers before and after</h2>"]
    for sample in outcome.samples:
        asked, before, after = (
            f"<pre>{escape(sample[name])}</pre>" for name in ("question", "before", "after")
        )
        parts.append(
            f'<div class="answers"><div class="asked">{asked}</div>'
            f"<div><b>before</b>{before}</div><div><b>after</b>{after}</div></div>"
        )
    return parts


def _plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the entries that say something in a cell."""
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in values.items()
        if value not in (None, [], {}) and not isinstance(value, dict)
    ]


def size_cell(n: int | None) -> str:
    """Return a size, or nothing where it is not known."""
    return "" if n is None else format_bytes(n)


def _table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """Return a table; one with a head holds numbers behind the first column."""

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}><pre>{escape(t)}</pre></{tag}>" for t in texts) + "</tr>"

    lines = [line("th", head)] if head else []
    lines += [line("td", row) for row in rows]
    kind = ' class="numbers"' if head else ""
    return f"<table{kind}>" + "\n".join(lines) + "</table>"


Points = Sequence[tuple[float, float]]


def chart(series: Sequence[tuple[str, str, Points]], *, height: int = 240) -> str:
    """Return an SVG of lines (name, colour variable, points) over steps.

    The vertical axis begins at 0, so that a loss that hardly moved looks it.
    """
    width, left, right, bottom = 800, 72, 10, 30
    top = 28 if len(series) > 1 else 10
    series = [(name, colour, _finite(line)) for name, colour, line in series]
    points = [point for _, _, line in series for point in line]
    if not points:
        return "<p>no data</p>"
    x_first, x_last = min(x for x, _ in points), max(x for x, _ in points)
    largest = max(y for _, y in points) or 1.0
    unit = _round_unit(largest / (height // 60))
    n_lines = math.ceil(largest / unit - 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - x_first) / ((x_last - x_first) or 1)
        return (
            round(left + share * (width - left - right), 1),
            round(height - bottom - y / (n_lines * unit) * (height - bottom - top), 1),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for i in range(n_lines + 1):
        y = at(x_first, unit * i)[1]
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y + 5}" text-anchor="end">{_label(unit * i)}</text>'
        )
    below = [(left, "start", f"{x_first:g}"), ((left + width) // 2, "middle", "step")]
    below += [(width - right, "end", f"{x_last:g}")] if x_last > x_first else []
    for x, anchor, text in below:
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{text}</text>')
    for number, (name, colour, line) in enumerate(series):
        spots = [at(*point) for point in _thin(line)]
        path = " ".join(f"{x},{y}" for x, y in spots)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var({colour})" stroke-width="1.5" '
            'vector-effect="non-scaling-stroke"/>'
        )
        if len(spots) == 1:
            parts.append(
                f'<circle cx="{spots[0][0]}" cy="{spots[0][1]}" r="4" fill="var({colour})"/>'
            )
        if len(series) > 1:
            end = width - right - 110 * (len(series) - 1 - number)
            parts.append(
                f'<text x="{end}" y="18" text-anchor="end" style="fill:var({colour})">'
                f"{escape(name)}</text>"
            )
    return "".join(parts) + "</svg>"


def _round_unit(least: float) -> float:
    """Return the smallest of …, 0.5, 1, 2, 2.5, 5, 10, … that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least * (1 - 1e-9))


def _label(value: float) -> str:
    """Return a number for an axis, in few characters."""
    if not 0 < value < 0.01:
        return f"{value:.4g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _finite(line: Points) -> Points:
    """Return the points that have a place: a run that was stopped at NaN is drawn up to there."""
    return [(x, y) for x, y in line if math.isfinite(y) and y >= 0]


def _thin(line: Points, n_max: int = 800) -> Points:
    """Return at most about `n_max` points: means over equal stretches."""
    size = -(-len(line) // n_max)
    if size <= 1:
        return line
    blocks = [line[i : i + size] for i in range(0, len(line), size)]
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]
