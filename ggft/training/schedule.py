"""The learning rate at each step, and the intervals that a short run needs smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_WARMUP = 50


def lr_at(step: int, *, n_steps: int, warmup_steps: int, peak_lr: float, kind: str) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Warm-up rises linearly and reaches `peak_lr` with its last step; the first step is never 0.
    Then `cosine` and `linear` fall towards 0, which the step after the last one would have, and
    `constant` stays.

    Source: cosine annealing without restarts, Loshchilov and Hutter 2017, equation 5.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    if kind == "constant":
        return peak_lr
    share = min(1.0, (step - warmup_steps) / max(1, n_steps - warmup_steps))
    if kind == "linear":
        return peak_lr * (1.0 - share)
    return peak_lr * 0.5 * (1.0 + math.cos(math.pi * share))


def choose_warmup(given: int | None, n_steps: int) -> int:
    """Return the warm-up: as given, else a tenth of the steps, so that short runs train on."""
    return min(MOST_WARMUP, n_steps // 10) if given is None else min(given, n_steps)


def safe_interval(interval: int, n_steps: int) -> int:
    """Return a logging interval that gives a short run at least twenty lines, if it has as many."""
    return max(1, min(interval, n_steps // 20))


def total_steps(per_epoch: int, epochs: int, max_steps: int | None) -> int:
    """Return the optimizer steps of the run."""
    steps = epochs * per_epoch
    return steps if max_steps is None else min(steps, max_steps)


# Circumstances that a longer run of the same rows and settings has otherwise. Where questions are
# varied, more epochs have more wordings of the same rows.
_OF_LENGTH = ("epochs", "max_steps", "steps")


def extended(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's circumstances as they would be, were it as long from the beginning."""
    same_rows = then.get("rows_sha256") == now["rows_sha256"]
    names = (*_OF_LENGTH, "data_sha256") if same_rows else _OF_LENGTH
    return {**then, **{name: now[name] for name in names}}
