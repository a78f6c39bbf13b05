from __future__ import annotations

import math

import pytest

from ggft.data.batches import steps_per_epoch
from ggft.training.schedule import choose_warmup, lr_at, safe_interval, total_steps


def rates(kind: str, n_steps: int, warmup_steps: int) -> list[float]:
    return [
        lr_at(i, n_steps=n_steps, warmup_steps=warmup_steps, peak_lr=1.0, kind=kind)
        for i in range(n_steps)
    ]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("n_steps", "warmup_steps"), [(1, 0), (3, 0), (10, 1), (200, 20)])
def test_every_rate_is_usable(kind: str, n_steps: int, warmup_steps: int) -> None:
    lr = rates(kind, n_steps, warmup_steps)
    assert all(0 < x <= 1 for x in lr)
    assert max(lr) == 1.0
    assert lr[warmup_steps:] == sorted(lr[warmup_steps:], reverse=True)


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates("linear", 100, 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_shapes() -> None:
    assert rates("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", 4, 0)[2] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates("constant", 4, 0) == [1.0] * 4


@pytest.mark.parametrize(("n_steps", "expected"), [(1, 0), (9, 0), (10, 1), (499, 49), (9999, 50)])
def test_warmup_is_a_tenth_unless_it_is_given(n_steps: int, expected: int) -> None:
    assert choose_warmup(None, n_steps) == expected
    assert choose_warmup(20, n_steps) == min(20, n_steps)
    assert choose_warmup(0, n_steps) == 0


@pytest.mark.parametrize(("n_steps", "expected"), [(1, 1), (39, 1), (40, 2), (9999, 10)])
def test_short_runs_log_more_often(n_steps: int, expected: int) -> None:
    assert safe_interval(10, n_steps) == expected


@pytest.mark.parametrize(
    ("rows", "per_step", "expected"), [(1, 4, 1), (3, 4, 1), (4, 4, 1), (5, 4, 2), (23, 4, 6)]
)
def test_the_partial_batch_counts(rows: int, per_step: int, expected: int) -> None:
    assert steps_per_epoch(rows, per_step) == expected


def test_total_steps() -> None:
    assert total_steps(6, 3, None) == 18
    assert total_steps(6, 3, 5) == 5
    assert total_steps(6, 1, 500) == 6
