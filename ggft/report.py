"""The outcome of a run, as data and as one HTML file that needs no network."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from ggft import __version__
from ggft.chart import chart
from ggft.errors import GgftError, InputError
from ggft.options import option
from ggft.recipe import Losses, Verdict, judge
from ggft.rundir import RunDirectory
from ggft.terminal import printable

# What computing with a record of the wrong form raises.
_DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
# Which of the engine's buffers each part of a plan becomes.
_BUFFERS = {
    "weights (mapped)": ("weights",),
    "LoRA, gradients, moments": ("lora",),
    "saved for the backward pass": ("saved",),
    "prepacked weights": ("prepacked",),
    "scratch": ("compute", "inputs"),
}
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


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `ggft report`."""

    json: bool = option("--json", default=False, help="Print the report as JSON")


@dataclass(frozen=True)
class Outcome:
    """All that a report is made of.

    Attributes:
        settings: The run's config.yaml.
        model: The base model's name.
        plan: What was planned, as `Plan.record` gives it.
        engine: What `Engine.info` says.
        account: What became of the rows of the data.
        state: The run's last state.
        metrics: The lines of metrics.jsonl.
        samples: Questions with the answers of base and adapter.
        peak_bytes: The process's largest resident size.
        n_held_out: Held-out examples.
    """

    settings: dict[str, Any]
    model: str
    plan: dict[str, Any]
    engine: dict[str, Any]
    account: dict[str, Any]
    state: dict[str, Any]
    metrics: list[dict[str, Any]]
    peak_bytes: int
    n_held_out: int
    samples: list[dict[str, str]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Metrics of optimizer steps."""
        return [record for record in self.metrics if "loss" in record]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Metrics of evaluations on held-out examples."""
        return [record for record in self.metrics if "val_loss" in record]

    def losses(self) -> Losses:
        """Return the losses that a verdict rests on."""
        steps, held_out = self.steps, [record["val_loss"] for record in self.evaluations]
        few = max(1, len(steps) // 20)
        epoch = [s for s in steps if s["epoch"] > steps[-1]["epoch"] - 1]
        return Losses(
            train_before=_mean_loss(steps[:few]),
            train_after=_mean_loss(epoch),
            val_before=held_out[0] if len(held_out) > 1 else None,
            val_best=min(held_out[1:]) if len(held_out) > 1 else None,
            val_last=held_out[-1] if len(held_out) > 1 else None,
            n_val=self.n_held_out,
        )

    def verdict(self) -> Verdict:
        """Return what was learned, with its numbers."""
        return judge(self.losses())

    def tokens_per_s(self) -> float:
        """Return tokens of the data trained per second, over all steps but the first."""
        steps = self.steps
        if len(steps) < 2:
            return float(steps[0]["tokens_per_s"]) if steps else 0.0
        seconds = steps[-1]["elapsed_s"] - steps[0]["elapsed_s"]
        return float((steps[-1]["tokens_seen"] - steps[0]["tokens_seen"]) / max(seconds, 1e-9))

    def memory(self) -> list[tuple[str, int, int | None]]:
        """Return (part, predicted bytes, bytes of the engine's buffers) of the plan."""
        buffers: Mapping[str, int] = self.engine.get("buffers", {})
        rows: list[tuple[str, int, int | None]] = []
        for part, predicted in self.plan["parts_bytes"].items():
            names = _BUFFERS.get(part, ())
            actual = sum(int(buffers.get(name, 0)) for name in names) if names else None
            rows.append((part, predicted, actual))
        rows.append(("peak of the process", self.plan["total_bytes"], self.peak_bytes))
        return rows

    def record(self) -> dict[str, Any]:
        """Return the report as plain data; the metrics stay in metrics.jsonl."""
        data = asdict(self)
        del data["metrics"]
        verdict = self.verdict()
        return {
            "ggft": __version__,
            "verdict": {"kind": verdict.kind, "text": verdict.text},
            "losses": asdict(self.losses()),
            "steps": len(self.steps),
            "tokens_per_s": round(self.tokens_per_s(), 1),
            **data,
        }


def _mean_loss(steps: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss per trained token over steps."""
    count = sum(step["trained_tokens"] for step in steps)
    return float(sum(step["loss"] * step["trained_tokens"] for step in steps) / count)


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_report(run: RunDirectory, outcome: Outcome) -> None:
    """Write report.json and report.html."""
    text = json.dumps(outcome.record(), indent=1, ensure_ascii=False)
    run.write_text(run.report_json, text + "\n")
    run.write_text(run.report_html, html(outcome))


def read_outcome(path: str | Path) -> Outcome:
    """Return the outcome that a run directory holds.

    Raises:
        InputError: it is no run directory, or its run has not ended.
    """
    run = RunDirectory(Path(path))
    try:
        record = json.loads(run.report_json.read_text(encoding="utf-8"))
        values = {
            name.name: record[name.name] for name in fields(Outcome) if name.name != "metrics"
        }
        return Outcome(**values, metrics=run.read_metrics())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            "no finished run here", path=path, found=f"no {Path(error.filename).name}",
            expected="a directory that `ggft finetune` wrote to its end",
            hint="a run that was stopped is finished with ggft finetune --resume",
        ) from None  # fmt: skip
    except _DAMAGE as error:
        raise _damaged(run, error) from error


def _damaged(run: RunDirectory, error: Exception) -> InputError:
    return InputError(
        "the report is not as ggft wrote it", path=run.report_json, found=repr(error)[:200]
    )


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
    lines += [f"  {part:<28}{_mib(a):>14}{_mib(b):>14}" for part, a, b in outcome.memory()]
    lines += [
        "",
        f"steps     {len(outcome.steps)}, {outcome.tokens_per_s():.1f} tokens/s",
        f"ended     {outcome.state.get('ended')}",
    ]
    for sample in outcome.samples:
        lines += ["", *(f"{name + ':':<10}{text}" for name, text in sample.items())]
    return [*lines, ""]


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
        *_samples(outcome),
        "<h2>Memory, predicted and used</h2>",
        _table(
            [(part, _mib(planned), _mib(used)) for part, planned, used in outcome.memory()],
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


def _mib(n: int | None) -> str:
    return "" if n is None else f"{n / 2**20:,.0f} MiB"


def _table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """Return a table; one with a head holds numbers behind the first column."""

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}><pre>{escape(t)}</pre></{tag}>" for t in texts) + "</tr>"

    lines = [line("th", head)] if head else []
    lines += [line("td", row) for row in rows]
    kind = ' class="numbers"' if head else ""
    return f"<table{kind}>" + "\n".join(lines) + "</table>"
