from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from ggft.data.batches import Course, Steps
from ggft.data.store import Chain, TokenStore


def store(lengths: list[int]) -> TokenStore:
    """Return examples whose first token is their number and whose others are distinct."""
    result = TokenStore()
    for number, n in enumerate(lengths):
        result.add([number, *range(1000, 1000 + n - 1)], [False] + [True] * (n - 1))
    return result


def steps(lengths: list[int], per_step: int = 4, *, packing: bool = True, seed: int = 1) -> Steps:
    course = Course(store(lengths), len(lengths))
    return Steps(course, examples_per_step=per_step, n_tokens=64, packing=packing, seed=seed)


def examples_of(
    made: Steps, epoch: int, index: int, n_rows: int, n_tokens: int | None = None
) -> list[int]:
    """Return the numbers of the examples of a step, in any order."""
    n_tokens = n_tokens or made.row_tokens
    found = []
    for batch in made.step(epoch, index, n_rows, n_tokens):
        assert batch["tokens"].shape[0] <= n_rows
        assert batch["tokens"].shape[1] <= n_tokens
        starts = (batch["positions"] == 0) & (batch["segments"] >= 0)
        found += batch["tokens"][starts].tolist()
    return sorted(found)


LENGTHS = [5, 60, 33, 31, 8, 9, 64, 12, 3, 40, 22]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("n_rows", [1, 2, 9])
def test_an_epoch_has_every_example_once(packing: bool, n_rows: int) -> None:
    made = steps(LENGTHS, packing=packing)
    for epoch in (0, 1):
        per_step = [examples_of(made, epoch, i, n_rows) for i in range(made.per_epoch)]
        assert [len(numbers) for numbers in per_step] == [4, 4, 3]
        assert sorted(chain.from_iterable(per_step)) == list(range(len(LENGTHS)))


def test_packing_does_not_change_a_step() -> None:
    packed, plain = steps(LENGTHS), steps(LENGTHS, packing=False)
    for epoch in range(3):
        for index in range(packed.per_epoch):
            assert examples_of(packed, epoch, index, 2) == examples_of(plain, epoch, index, 2)


def test_every_target_is_counted_whatever_the_micro_batches() -> None:
    made = steps(LENGTHS)
    for n_rows in (1, 2, 4):
        batches = [
            b for i in range(made.per_epoch) for b in made.step(0, i, n_rows, made.row_tokens)
        ]
        trained = sum(int((b["targets"] >= 0).sum()) for b in batches)
        assert trained == sum(LENGTHS) - len(LENGTHS)


def test_order_changes_with_epoch_and_seed_and_nothing_else() -> None:
    orders = {
        (seed, epoch): tuple(steps(LENGTHS, seed=seed)._epoch_order(epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert tuple(steps(LENGTHS)._epoch_order(1)) == orders[1, 1]


@pytest.mark.parametrize(
    ("lengths", "per_step"), [([3], 4), ([5, 5, 5], 4), (LENGTHS, 1), (LENGTHS, 100), ([64] * 9, 4)]
)
def test_the_engine_is_opened_large_enough(lengths: list[int], per_step: int) -> None:
    for packing in (True, False):
        made = steps(lengths, per_step, packing=packing)
        for index in range(made.per_epoch):
            for batch in made.step(0, index, 10**6, made.row_tokens):
                assert batch["tokens"].shape[0] <= made.max_rows
                assert batch["tokens"].shape[1] <= made.row_tokens


def test_a_row_of_a_whole_step_pads_only_its_end() -> None:
    made = steps(LENGTHS)
    for index in range(made.per_epoch):
        (batch,) = made.step(0, index, 1, made.largest_step_tokens)
        padding = int((batch["segments"] < 0).sum())
        assert batch["tokens"].shape[0] == 1
        assert 0 <= padding < 8
        assert examples_of(made, 0, index, 1, made.largest_step_tokens) == examples_of(
            made, 0, index, 1
        )


def test_short_steps_get_short_rows() -> None:
    assert steps([5, 5, 5, 5]).row_tokens == 24
    assert steps([5, 5, 5, 5]).max_rows == 1
    assert steps([64] * 4).row_tokens == 64


def test_dropout_seeds_differ_and_are_never_zero() -> None:
    made, other = steps(LENGTHS), steps(LENGTHS, seed=2)
    seeds = Counter(
        s.dropout_seed(i, j) for s in (made, other) for i in range(50) for j in range(4)
    )
    assert max(seeds.values()) == 1
    assert min(seeds) > 0
    assert max(seeds) < 2**63
    assert np.uint64(max(seeds)) > 2**60


def test_general_examples_are_new_in_each_epoch_until_all_were_trained() -> None:
    rows, general = store([5] * 7), store([9] * 10)
    course = Course(Chain.of(rows, general), 7, n_general=4, seed=3)
    epochs = [course.epoch(e).tolist() for e in range(5)]
    assert all(epoch[:7] == list(range(7)) for epoch in epochs)
    chosen = [i for epoch in epochs for i in epoch[7:]]
    assert Counter(chosen) == dict.fromkeys(range(7, 17), 2)
    assert sorted(chosen[:10]) == list(range(7, 17))
    again = Course(Chain.of(rows, general), 7, n_general=4, seed=3)
    assert again.epoch(4).tolist() == epochs[4]
    assert Course(course.examples, 7, n_general=4, seed=4).epoch(0).tolist() != epochs[0]


def test_steps_count_and_hold_general_examples() -> None:
    rows, general = store([5, 6, 7]), store([60, 40])
    course = Course(Chain.of(rows, general), 3, n_general=2, seed=1)
    made = Steps(course, examples_per_step=2, n_tokens=64, packing=True, seed=1)
    assert made.per_epoch == 3
    assert made.row_tokens == 64
    trained = sum(
        int((batch["targets"] >= 0).sum())
        for index in range(3)
        for batch in made.step(0, index, 1, made.row_tokens)
    )
    assert trained == 4 + 5 + 6 + 59 + 39


def test_a_chain_gives_the_examples_of_its_parts() -> None:
    chain = Chain.of(store([5, 6]), store([7]), store([3, 4]))
    assert chain.lengths.tolist() == [5, 6, 7, 3, 4]
    assert [len(chain.get(i)[0]) for i in range(5)] == [5, 6, 7, 3, 4]
    with pytest.raises(IndexError):
        chain.get(5)


def test_each_epoch_asks_every_row_in_one_wording() -> None:
    worded, general = store([5] * 6), store([9] * 2)  # two rows in three wordings
    course = Course(Chain.of(worded, general), 2, n_wordings=3, n_general=1, seed=1)
    assert [course.epoch(e)[:2].tolist() for e in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert {int(course.epoch(e)[2]) for e in range(2)} == {6, 7}
    assert course.n_examples == 3
