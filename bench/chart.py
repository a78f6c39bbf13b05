"""The README's chart: two columns of bars as an SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

OURS, PEER, INK, FAINT = "#0969da", "#8c959f", "#1f2328", "#59636e"
ROW, BAR, LABEL, PANEL, GAP, TOP = 26, 16, 190, 250, 90, 58


class Bar(NamedTuple):
    """A row of the chart."""

    label: str
    ours: bool
    tokens_per_s: float
    peak_rss_bytes: float


def _text(x: float, y: float, text: str, size: int = 12, fill: str = INK, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"'
    return f"<text {place} {more}>{escape(text)}</text>"


def draw(title: str, bars: Sequence[Bar], note: str) -> str:
    """Return the SVG: tokens per second on the left, peak memory on the right."""
    width = LABEL + 2 * (PANEL + GAP)
    height = TOP + ROW * len(bars) + 34
    columns = (
        ("tokens per second", LABEL, [b.tokens_per_s for b in bars], "{:.0f}", 1.0),
        ("peak memory, MB", LABEL + PANEL + GAP, [b.peak_rss_bytes for b in bars], "{:.0f}", 1e6),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(16, 24, title, 15, INK, 'font-weight="600"'),
    ]
    for heading, left, values, form, unit in columns:
        parts.append(_text(left, TOP - 10, heading, 12, FAINT))
        largest = max(values)
        for i, (bar, value) in enumerate(zip(bars, values, strict=True)):
            y = TOP + ROW * i
            length = max(1.0, PANEL * value / largest)
            fill = OURS if bar.ours else PEER
            size = f'width="{length:.1f}" height="{BAR}" rx="2"'
            parts.append(f'<rect x="{left}" y="{y}" {size} fill="{fill}"/>')
            parts.append(_text(left + length + 6, y + 13, form.format(value / unit)))
    for i, bar in enumerate(bars):
        weight = 'text-anchor="end"' + (' font-weight="600"' if bar.ours else "")
        parts.append(_text(LABEL - 10, TOP + ROW * i + 13, bar.label, 12, INK, weight))
    parts.append(_text(16, height - 12, note, 11, FAINT))
    return "\n".join([*parts, "</svg>", ""])
