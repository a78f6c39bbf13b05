"""What came of a run, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ggft import __version__
from ggft.engine.memory import BUFFERS
from ggft.system.errors import InputError
from ggft.training.run_directory import RunDirectory
from ggft.training.verdict import Losses, Tally, Verdict, judge

# What computing with a record of the wrong form raises.
_DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
_LATER = ("asked", "measured")  # which reports of older runs lack


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
        asked: Rows with the answers expected and given.
        measured: Losses of trained and of general rows, before and after.
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
    asked: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Metrics of optimizer steps."""
        return [record for record in self.metrics if "loss" in record]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Metrics of evaluations on held-out examples."""
        return [record for record in self.metrics if "val_loss" in record]

    def losses(self) -> Losses:
        """Return the losses that a verdict rests on.

        They are those of the adapter that was kept, but of a run that diverged those of its steps:
        what was kept is from before the loss rose.
        """
        steps, held_out = self.steps, [record["val_loss"] for record in self.evaluations]
        few = max(1, len(steps) // 20)
        diverged = self.state.get("smaller_lr") is not None
        end = [s for s in steps if s["epoch"] > steps[-1]["epoch"] - 1]
        end = steps[-few:] if diverged else end
        measured = {} if diverged else self.measured
        return Losses(
            train_before=measured.get("rows_before") or _mean_loss(steps[:few]),
            train_after=measured.get("rows_after") or _mean_loss(end),
            val_before=held_out[0] if len(held_out) > 1 else None,
            val_best=self._best_held_out(),
            val_last=held_out[-1] if len(held_out) > 1 else None,
            n_val=self.n_held_out,
            smaller_lr=self.state.get("smaller_lr"),
            is_kept=self.state.get("best_step") != 0,
            chance=self.state.get("chance"),
        )

    def _best_held_out(self) -> float | None:
        """Return the held-out loss of the adapter that was kept."""
        if self.state.get("smaller_lr"):
            best: float | None = self.state["best_val"]
            return best
        return min((record["val_loss"] for record in self.evaluations[1:]), default=None)

    def verdict(self) -> Verdict:
        """Return what was learned, with its numbers."""
        general = [self.measured.get(f"general_{when}") for when in ("before", "after")]
        facts = self.account.get("row_kind") == "facts" and not self.n_held_out
        facts = facts or self.state.get("kept_last", False)
        return judge(self.losses(), by_answers=facts, asked=self.tally(), general=general)

    def tally(self) -> Tally:
        """Return how many of the rows that were asked were answered as they say."""
        trained = [record["as_given"] for record in self.asked if not record["held_out"]]
        held_out = [record["as_given"] for record in self.asked if record["held_out"]]
        return Tally(sum(trained), len(trained), sum(held_out), len(held_out))

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
            names = BUFFERS.get(part, ())
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


def read_outcome(path: str | Path) -> Outcome:
    """Return the outcome that a run directory holds.

    Raises:
        InputError: it is no run directory, or its run has not ended.
    """
    run = RunDirectory(Path(path))
    try:
        record = json.loads(run.report_json.read_text(encoding="utf-8"))
        values = {
            name.name: record[name.name]
            for name in fields(Outcome)
            if name.name != "metrics" and (name.name in record or name.name not in _LATER)
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
