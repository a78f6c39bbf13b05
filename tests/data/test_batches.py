"""Packing loses no token and mixes no example; batches follow from seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggft.data.batches import Batch, Batches, balance, pack
from ggft.data.store import StoreView, TokenStore


def store(lengths: list[int], *, memory_tokens: int = 1 << 20, seed: int = 0) -> TokenStore:
    """Return examples of distinct tokens, of which a random part is trained."""
    rng = np.random.default_rng(seed)
    made = TokenStore(memory_tokens=memory_tokens)
    start = 0
    for n in lengths:
        made.add(list(range(start, start + n)), (rng.random(n) < 0.6).tolist())
        start += n
    return made


def examples_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Return tokens and targets of every example of a batch."""
    found = []
    for tokens, positions, segments, targets in zip(*batch.values(), strict=True):
        used = segments >= 0
        assert (np.diff(segments[used]) >= 0).all()
        assert (tokens[~used] == 0).all()
        assert (targets[~used] == -1).all()
        for number in range(int(segments.max()) + 1):
            at = segments == number
            assert positions[at].tolist() == list(range(at.sum()))
            found.append((tokens[at].tolist(), targets[at].tolist()))
    return found


lengths_lists = st.lists(st.integers(1, 64), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=lengths_lists,
    n_tokens=st.integers(64, 200),
    rows=st.integers(1, 5),
    packing=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_no_token_is_lost_and_no_example_mixed(
    lengths: list[int], n_tokens: int, rows: int, packing: bool, shuffle: bool, epoch: int
) -> None:
    data = store(lengths)
    batches = Batches(data, rows=rows, n_tokens=n_tokens, packing=packing, shuffle=shuffle)
    seen = []
    for batch in batches.epoch(epoch):
        assert all(array.dtype == np.int32 for array in batch.values())  # type: ignore[attr-defined]
        assert batch["tokens"].shape[1] <= n_tokens
        assert 1 <= len(batch["tokens"]) <= rows
        seen += examples_of(batch)
    expected = []
    for i in range(len(lengths)):
        ids, trained = data.get(i)
        targets = [int(t) if k else -1 for t, k in zip(ids[1:], trained[1:], strict=True)]
        expected.append((ids.tolist(), [*targets, -1]))
    assert sorted(seen) == sorted(expected)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200), n_tokens=st.integers(50, 99))
def test_packing_is_tight(lengths: list[int], n_tokens: int) -> None:
    rows = pack(lengths, n_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= n_tokens
    # Best fit opens a row only for what fits nowhere, so no two rows could be one.
    assert sum(2 * n <= n_tokens for n in filled) <= 1
    assert pack(lengths, n_tokens) == rows


def test_rows_are_nearly_full_on_usual_lengths() -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5, 0.6, 5000).astype(int), 8, 512).tolist()
    assert sum(lengths) / (512 * len(pack(lengths, 512))) > 0.97


def test_rows_of_a_batch_are_evened_out() -> None:
    data = store([300, 200, 150, 90, 60])
    batches = Batches(data, rows=4, n_tokens=512, shuffle=False)
    assert [b["tokens"].shape for b in batches.epoch(0)] == [(2, 416)]
    assert [sorted(row) for row in balance([300, 200, 150, 90, 60], 2)] == [[0, 3], [1, 2, 4]]


def test_an_example_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row 10"):
        pack([3, 11], 10)


def test_order_follows_from_seed_and_epoch_and_resumes() -> None:
    data = store([5, 9, 20, 31, 7, 18, 40, 3, 11, 26] * 3)

    def tokens(seed: int, epoch: int, start: int = 0) -> list[list[list[int]]]:
        batches = Batches(data, rows=2, n_tokens=64, seed=seed)
        assert batches.n_batches(epoch) == len(list(batches.epoch(epoch)))
        return [b["tokens"].tolist() for b in batches.epoch(epoch, start)]

    assert tokens(1, 0) == tokens(1, 0)
    assert tokens(1, 0) != tokens(1, 1)
    assert tokens(1, 0) != tokens(2, 0)
    assert tokens(1, 3, start=2) == tokens(1, 3)[2:]


def test_rows_without_packing_are_as_long_as_the_longest() -> None:
    batches = Batches(store([3, 40, 5, 2]), rows=2, n_tokens=512, packing=False, shuffle=False)
    assert [b["tokens"].shape for b in batches.epoch(0)] == [(2, 40), (2, 8)]


@pytest.mark.parametrize("memory_tokens", [1, 50, 1 << 20])
def test_a_store_gives_back_what_it_got_from_memory_or_file(memory_tokens: int) -> None:
    lengths = [7, 1, 30, 12, 5] * 8
    small, large = store(lengths, memory_tokens=memory_tokens), store(lengths)
    assert small.lengths.tolist() == lengths
    for i in range(len(lengths)):
        for a, b in zip(small.get(i), large.get(i), strict=True):
            assert a.tolist() == b.tolist()
    small.add([1, 2], [False, True])
    assert small.get(len(lengths))[1].tolist() == [False, True]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trained=st.lists(st.booleans(), min_size=1, max_size=40), cut=st.integers(1, 45))
def test_trained_tokens_are_counted_after_cutting(trained: list[bool], cut: int) -> None:
    made = TokenStore(keep=False)
    made.add([3], [True])
    made.add([5] * len(trained), trained)
    assert made.n_trained(1, cut) == sum(trained[1:cut])


def test_a_view_cuts_and_chooses() -> None:
    view = StoreView(store([4, 9, 2]), np.array([1, 2]), 6)
    assert view.lengths.tolist() == [6, 2]
    assert view.get(0)[0].tolist() == [4, 5, 6, 7, 8, 9]
    assert len(view.get(0)[1]) == 6
    assert view.get(1)[0].tolist() == [13, 14]
