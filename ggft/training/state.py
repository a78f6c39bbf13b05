"""Where a run is, besides what the engine holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class State:
    """Where a run is, besides matrices, moments and the optimizer's step.

    Attributes:
        best_step: Where the adapter that is kept is from; 0 if none is.
        kept_sha256: The hash of its file; None before it is written.
        start_loss: What the base makes of the first rows.
        chance: Loss of a guess among all tokens.
        smaller_lr: The rate to try next, if the run has diverged.
        last_val: The last held-out loss.
        kept_last: Whether the last adapter was kept, and the one of the best held-out loss beside.
    """

    epoch: int = 0
    index: int = 0
    tokens_seen: int = 0
    elapsed_s: float = 0.0
    interval_nats: float = 0.0
    interval_count: int = 0
    evaluated_step: int = -1
    base_val: float | None = None
    best_val: float | None = None
    best_step: int = 0
    bad_evals: int = 0
    kept_sha256: str | None = None
    start_loss: float | None = None
    chance: float | None = None
    smaller_lr: float | None = None
    last_val: float | None = None
    kept_last: bool = False
    ended: str | None = None
    metrics_bytes: int = 0

    def extend(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Let a run that has ended go on if it is to be longer than it was; return whether it is.

        One that diverged is not: it would go on from there.
        """
        if not self.ended or self.smaller_lr or now["steps"] <= then["steps"]:
            return False
        self.ended, self.bad_evals, self.kept_last = None, 0, False
        return True
