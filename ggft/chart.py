"""Lines over training steps as SVG, coloured by the page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

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
