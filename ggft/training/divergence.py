"""Whether a run diverges: its losses rise, and by more than they differ from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto

MIN_STEPS, MAX_STEPS, MAX_BLOCKS = 4, 32, 40
NOISE = 4.0  # standard errors of a difference that may be chance
RISE = 0.1  # share of a loss, or of one nat if it is below, by which it must have risen
# Blocks in a row that must have risen; a loss still below its start is more likely to come down.
N_ABOVE_FIRST, N_ABOVE_BEST = 2, 3


class Trend(Enum):
    """What a block of steps says of a run."""

    BEST = auto()  # the lowest loss so far
    OPEN = auto()
    DIVERGES = auto()


@dataclass(frozen=True)
class Block:
    """Consecutive steps: mean loss per trained token with its standard error, and of its halves."""

    mean: float
    error: float
    halves: tuple[float, float]


@dataclass
class Watch:
    """The losses of a run, by blocks of steps.

    A block is an epoch where that is short, so that blocks have the same examples. A run diverges
    when a block is worse than chance though the first step was not, or when blocks in a row are
    worse than the best one before.

    Attributes:
        steps_per_epoch: Optimizer steps of an epoch.
        n_steps: Those of the run.
        chance: Loss of a guess that knows nothing, ln(vocabulary).
        is_rising: Whether the last block was worse than the best one before it.
    """

    steps_per_epoch: int
    n_steps: int
    chance: float
    is_rising: bool = False
    _steps: list[tuple[float, int]] = field(default_factory=list)
    _start: float = math.nan
    _first: Block | None = None
    _best: Block | None = None
    _n_above_first: int = 0
    _n_above_best: int = 0

    @property
    def block_steps(self) -> int:
        """Steps of a block."""
        epochs = math.ceil(MIN_STEPS / self.steps_per_epoch)
        return min(epochs * self.steps_per_epoch, max(MAX_STEPS, self.n_steps // MAX_BLOCKS))

    def add(self, loss: float, count: int) -> Trend:
        """Take in a step's mean loss over `count` tokens; a block's last step tells the trend."""
        if math.isnan(self._start):
            self._start = loss
        self._steps.append((loss, count))
        if len(self._steps) < self.block_steps:
            return Trend.OPEN
        block = _block(self._steps)
        self._steps.clear()
        return self._judge(block)

    def _judge(self, block: Block) -> Trend:
        first, best = self._first or block, self._best or block
        above_best, above_first = (_is_above(block, other) for other in (best, first))
        falls = not is_worse(block.halves[1], block.halves[0])
        self.is_rising = above_best
        self._n_above_best = self._n_above_best + 1 if above_best else 0
        self._n_above_first = self._n_above_first + 1 if above_first else 0
        self._first = first
        if self._start <= self.chance < block.mean:
            return Trend.DIVERGES
        if self._n_above_first >= N_ABOVE_FIRST or self._n_above_best >= N_ABOVE_BEST:
            return Trend.DIVERGES
        if block.mean > best.mean:
            return Trend.OPEN
        self._best = block
        return Trend.BEST if falls else Trend.OPEN


def is_worse(loss: float, than: float) -> bool:
    """Return whether a loss is so much higher that it has risen."""
    return loss > than + RISE * max(than, 1.0)


def _is_above(block: Block, other: Block) -> bool:
    """Return whether a block's loss has risen over another's, beyond what is chance."""
    noise = NOISE * math.hypot(block.error, other.error)
    return is_worse(block.mean, other.mean) and block.mean - other.mean > noise


def _block(steps: list[tuple[float, int]]) -> Block:
    """Return what is to be known of consecutive steps, given as mean losses and token counts."""
    half = len(steps) // 2
    mean = _mean(steps)
    squares = sum((count * (loss - mean)) ** 2 for loss, count in steps)
    total = sum(count for _, count in steps)
    error = math.sqrt(squares * len(steps) / (len(steps) - 1)) / total
    return Block(mean, error, (_mean(steps[:half]), _mean(steps[half:])))


def _mean(steps: list[tuple[float, int]]) -> float:
    return sum(loss * count for loss, count in steps) / sum(count for _, count in steps)
