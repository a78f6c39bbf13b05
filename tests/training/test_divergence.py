from __future__ import annotations

import math
import random

import pytest

from ggft.training.divergence import Trend, Watch

CHANCE = math.log(49152)
# Losses of the default model on 24 rows of instructions, 4 a step, by learning rate.
FAR_TOO_LARGE = [1.68, 1.56, 2.7, 7.21, 12.89, 11.76, 37.46, 15.78, 39.57, 24.13, 24.68, 23.38]
TOO_LARGE = [
    1.68, 1.49, 2.26, 1.93, 2.52, 3.15, 4.51, 3.52, 6.42, 7.05, 16.04, 17.13, 24.65, 67.15, 17.17,
    13.91, 14.3, 25.36,
]  # fmt: skip
LARGE = [
    1.68, 1.5, 2.18, 1.55, 1.84, 2.02, 1.01, 1.16, 1.46, 1.23, 1.57, 1.27, 2.36, 1.71, 1.74, 1.77,
    1.33, 1.18, 0.61, 1.16, 1.09, 1.38, 0.76, 1.78, 0.79, 1.13, 0.93, 0.32, 0.83, 0.8, 0.55, 0.32,
    0.26, 0.45, 0.62, 1.37, 0.37, 0.33, 0.32, 0.19, 0.21, 0.17, 0.08, 0.06, 0.3, 0.35, 0.11, 0.23,
    0.13, 0.02, 0.01, 0.03, 0.1, 0.02, 0.01,
]  # fmt: skip


def diverges_at(losses: list[float], per_epoch: int = 6, chance: float = CHANCE) -> int | None:
    watch = Watch(per_epoch, len(losses), chance)
    for step, loss in enumerate(losses, 1):
        if watch.add(loss, 250) is Trend.DIVERGES:
            return step
    return None


@pytest.mark.parametrize(
    ("losses", "step"), [(FAR_TOO_LARGE, 12), (TOO_LARGE, 18), (LARGE, None), ([2.0] * 60, None)]
)
def test_recorded_runs(losses: list[float], step: int | None) -> None:
    assert diverges_at(losses) == step


def test_without_chance_two_blocks_worse_than_the_first_are_enough() -> None:
    assert diverges_at([2.0, 2.1] * 4 + [3.0, 3.1] * 8, per_epoch=8, chance=99) == 24


def test_a_rise_to_below_the_start_takes_three_blocks() -> None:
    falls, risen = [4.0, 4.1] * 4 + [1.0, 1.1] * 4, [2.0, 2.1] * 4
    assert diverges_at(falls + 2 * risen + [0.9, 1.0] * 8, per_epoch=8) is None
    assert diverges_at(falls + 3 * risen, per_epoch=8) == 40


def test_noise_is_not_taken_for_a_rise() -> None:
    """Falling, flat and memorising runs of any length, with steps that differ by half."""
    for seed in range(300):
        rng = random.Random(seed)
        n, last, per_epoch = rng.randint(20, 3000), rng.uniform(0.01, 3), rng.randint(1, 500)
        losses = [
            (last + (3 - last) * math.exp(-5 * i / n)) * rng.lognormvariate(0, 0.5)
            for i in range(n)
        ]
        assert diverges_at(losses, per_epoch) is None, seed


@pytest.mark.parametrize(
    ("per_epoch", "n_steps", "steps"),
    [(6, 60, 6), (1, 10, 4), (3, 30, 6), (500, 1000, 32), (5000, 10000, 250)],
)
def test_steps_of_a_block(per_epoch: int, n_steps: int, steps: int) -> None:
    assert Watch(per_epoch, n_steps, CHANCE).block_steps == steps


def test_a_block_that_rises_within_is_not_the_best() -> None:
    watch = Watch(6, 60, CHANCE)
    assert [watch.add(x, 1) for x in (1.7, 1.6, 2.7, 7.2, 9.0, 9.1)] == [Trend.OPEN] * 6
    assert [watch.add(1.6, 1) for _ in range(6)][-1] is Trend.BEST
