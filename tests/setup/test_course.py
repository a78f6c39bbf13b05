"""What general rows are told to predict: what the model would say itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from ggft.data.batches import Course
from ggft.data.store import Chain, Retold, TokenStore
from ggft.setup.course import draw, draw_general, nats_of

N_VOCAB = 5


class Sure:
    """A model that says one more than the token before, and counts what it is asked."""

    n_asked = 0

    def logits(self, batch: Any) -> Any:
        self.n_asked += 1
        after = (batch["tokens"] + 1) % N_VOCAB
        return np.where(np.arange(N_VOCAB) == after[..., None], 50.0, 0.0).astype(np.float32)


def store(*rows: tuple[list[int], list[int]]) -> TokenStore:
    found = TokenStore()
    for ids, trained in rows:
        found.add(ids, trained)
    return found


def test_tokens_are_drawn_by_their_probability() -> None:
    p = np.array([0.5, 0.0, 0.125, 0.375])
    logits = np.log(p + 1e-30).astype(np.float32)
    drawn = [draw(logits, u) for u in (np.arange(800) + 0.5) / 800]
    assert (np.bincount(drawn, minlength=4) / 800).tolist() == p.tolist()
    assert draw(logits, 1.0) == 3


def test_general_rows_predict_what_the_model_says_and_rows_what_they_say() -> None:
    rows = store(([0, 3, 3, 1], [0, 0, 1, 1]))
    general = store(([1, 1, 4, 0], [0, 0, 1, 1]), ([2, 2, 2], [0, 1, 1]), ([3, 0], [0, 1]))
    course = Course(Chain.of(rows, general), n_rows=1, n_general=1, seed=3)
    model: Any = Sure()
    checks: list[int] = []
    examples = draw_general(model, course, 2, lambda: checks.append(1))
    assert model.n_asked == len(checks) == 2, "only those that two epochs use"
    assert examples.lengths.tolist() == course.examples.lengths.tolist()
    assert examples.targets(0)[1].tolist() == [-1, 3, 1, -1]
    used = [int(course.epoch(epoch)[1]) for epoch in (0, 1)]
    for index in (1, 2, 3):
        ids, targets = examples.targets(index)
        own = course.examples.targets(index)[1]
        said = np.where(own >= 0, (ids + 1) % N_VOCAB, -1)
        assert targets.tolist() == (said if index in used else own).tolist()
        assert (examples.get(index)[1] == course.examples.get(index)[1]).all()


def test_a_short_answer_that_the_model_finds_likely_is_kept() -> None:
    rows = store(([0, 1], [0, 1]))
    likely, unlikely, long = [1, 2, 3], [1, 4, 1], [i % N_VOCAB for i in range(40)]
    general = store((likely, [0, 1, 1]), (unlikely, [0, 1, 1]), (long, [0] + [1] * 39))
    course = Course(Chain.of(rows, general), n_rows=1, n_general=3)
    model: Any = Sure()
    examples = draw_general(model, course, 1, lambda: None)
    assert isinstance(examples, Retold)
    assert sorted(examples.other) == [2, 3]


def test_the_loss_of_targets() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])).astype(np.float32)
    nats = nats_of(logits, np.array([1, 2], np.int32))
    assert abs(nats + (np.log(0.25) + np.log(0.8)) / 2) < 1e-6


def test_a_row_that_is_used_again_is_told_anew() -> None:
    class Unsure:
        def logits(self, batch: Any) -> Any:
            return np.zeros((*batch["tokens"].shape, N_VOCAB), np.float32)

    general = store(([i % N_VOCAB for i in range(60)], [0] + [1] * 59))
    parts = [store(([0, 1], [0, 1])), general, general, general]
    course = Course(Chain.of(*parts), n_rows=1, n_general=1, n_copies=3)
    model: Any = Unsure()
    examples = draw_general(model, course, 3, lambda: None)
    told = {tuple(examples.targets(index)[1].tolist()) for index in (1, 2, 3)}
    assert len(told) == 3
