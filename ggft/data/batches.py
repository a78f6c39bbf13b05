"""Pack examples into rows, shuffle them, and cut them into micro-batches.

Everything follows from (seed, epoch): the same call gives the same batches, and a position
(epoch, index) is all that a checkpoint needs to resume.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from ggft.data.store import Examples, Subset

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ggft.data.store import IntArray

_GENERAL = 1  # of seeds: the order of general rows, beside that of epochs
ROW_MULTIPLE = 8  # rows are padded to this: coarser, padding shows in the speed of short rows


class Batch(TypedDict):
    """A micro-batch; all arrays are int32 of shape (B, T).

    `segments` numbers the examples within a row, −1 is padding; `positions` restart at each;
    `targets` holds the token to be predicted at this position, −1 where none is learned.
    """

    tokens: IntArray
    positions: IntArray
    segments: IntArray
    targets: IntArray


def pack(lengths: Sequence[int], n_tokens: int) -> list[list[int]]:
    """Distribute examples over rows of `n_tokens`, best fit, the longer half-rows first.

    Examples longer than half a row go first, in descending order; the others fill the gaps in
    the order given, each into the fullest row that has room. Every example is in exactly one row.

    Args:
        lengths: Tokens of each example, each ≤ n_tokens.
        n_tokens: Room of a row.

    Returns:
        Rows as lists of indexes into `lengths`.
    """
    big = sorted((i for i, n in enumerate(lengths) if 2 * n > n_tokens), key=lambda i: -lengths[i])
    small = [i for i, n in enumerate(lengths) if 2 * n <= n_tokens]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), ascending
    for i in [*big, *small]:
        n = lengths[i]
        if n > n_tokens:
            raise ValueError(f"example {i} has {n} tokens, a row {n_tokens}")
        at = bisect_left(free, (n, -1))
        if at == len(free):
            rows.append([i])
            room, row = n_tokens - n, len(rows) - 1
        else:
            room, row = free.pop(at)
            rows[row].append(i)
            room -= n
        if room > 1:
            insort(free, (room, row))
    return rows


def balance(lengths: Sequence[int], n_rows: int) -> list[list[int]]:
    """Distribute examples over `n_rows` rows so that the longest row is short.

    Each goes into the emptiest row, in descending order of length, which keeps the longest row
    within 4/3 of the best. Source: Graham, "Bounds on multiprocessing timing anomalies" (1969).

    Args:
        lengths: Tokens of each example.
        n_rows: How many rows, at most as many as examples.

    Returns:
        Rows as lists of indexes into `lengths`.
    """
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    filled = [(0, row) for row in range(n_rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n, row = heapq.heappop(filled)
        rows[row].append(i)
        heapq.heappush(filled, (n + lengths[i], row))
    return rows


class Batches:
    """Micro-batches of an epoch.

    Args:
        examples: The tokenized examples.
        rows: Rows per micro-batch, B.
        n_tokens: Longest row, T; no example may be longer.
        packing: Whether several examples share a row. Without, each has its own row, and rows
            are padded to the micro-batch's longest.
        shuffle: Whether the order changes with the epoch; without, it is that of the data.
        seed: Seed of the order.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        rows: int,
        n_tokens: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.examples = examples
        self.rows = rows
        self.n_tokens = n_tokens
        self.packing = packing
        self.shuffle = shuffle
        self.seed = seed
        self._planned: tuple[int, list[list[int]]] | None = None

    def n_batches(self, epoch: int) -> int:
        """Return the number of micro-batches of an epoch; the last may have fewer rows."""
        return -(-len(self._rows(epoch)) // self.rows)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch from number `start` on."""
        rows = self._rows(epoch)
        for at in range(start * self.rows, len(rows), self.rows):
            yield self._batch(rows[at : at + self.rows])

    def _rows(self, epoch: int) -> list[list[int]]:
        import numpy as np

        epoch = epoch if self.shuffle else 0
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        lengths = self.examples.lengths
        order = np.arange(len(lengths))
        rng = np.random.default_rng((self.seed, epoch))
        if self.shuffle:
            rng.shuffle(order)
        indexes = order.tolist()
        rows = [[i] for i in indexes]
        if self.packing:
            packed = pack(lengths[order].tolist(), self.n_tokens)
            rows = [[indexes[i] for i in row] for row in packed]
            if self.shuffle:
                rows = [rows[i] for i in rng.permutation(len(rows))]
        self._planned = (epoch, rows)
        return rows

    def _batch(self, rows: list[list[int]]) -> Batch:
        import numpy as np

        lengths = self.examples.lengths
        longest = max(int(lengths[row].sum()) for row in rows)
        indexes = [i for row in rows for i in row]
        even = balance(lengths[indexes].tolist(), len(rows))
        even_rows = [[indexes[i] for i in row] for row in even]
        even_longest = max(int(lengths[row].sum()) for row in even_rows)
        if even_longest < longest:  # best fit fills rows one by one, and the last one hardly
            rows, longest = even_rows, even_longest
        width = min(self.n_tokens, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE)
        shape = (len(rows), width)
        tokens = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int32)
        segments = np.full(shape, -1, np.int32)
        targets = np.full(shape, -1, np.int32)
        for b, row in enumerate(rows):
            at = 0
            for s, index in enumerate(row):
                ids, wanted = self.examples.targets(index)
                n = len(ids)
                tokens[b, at : at + n] = ids
                positions[b, at : at + n] = np.arange(n)
                segments[b, at : at + n] = s
                targets[b, at : at + n] = wanted
                at += n
        return {"tokens": tokens, "positions": positions, "segments": segments, "targets": targets}


def steps_per_epoch(n_examples: int, examples_per_step: int) -> int:
    """Return the optimizer steps of one pass; the last, partial one counts."""
    return -(-n_examples // examples_per_step)


@dataclass(frozen=True)
class Course:
    """What each epoch trains: every row once, and some general rows against forgetting.

    A row may have several wordings, of which an epoch takes one. General rows come in an order of
    their own, a new piece of it in each epoch, and begin anew when all have been trained.

    Attributes:
        examples: All examples that any epoch has: the rows in their first wording, in the next,
            and so on, then the general ones.
        n_rows: How many rows there are.
        n_wordings: Wordings of each row.
        n_general: General examples of an epoch.
        seed: Seed of the general examples' order.
        n_copies: How often `examples` has each general one, for each to be told anew.
    """

    examples: Examples
    n_rows: int
    n_wordings: int = 1
    n_general: int = 0
    seed: int = 0
    n_copies: int = 1

    @property
    def n_examples(self) -> int:
        """Examples of an epoch."""
        return self.n_rows + self.n_general

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the indexes of an epoch's examples, (n_examples,)."""
        import numpy as np

        rows = np.arange(self.n_rows) + epoch % self.n_wordings * self.n_rows
        if not self.n_general:
            return rows
        n_worded = self.n_rows * self.n_wordings
        n = (len(self.examples.lengths) - n_worded) // self.n_copies
        order = np.random.Generator(np.random.PCG64([self.seed, _GENERAL])).permutation(n)
        at = np.arange(self.n_general) + epoch * self.n_general
        copy = at // n % self.n_copies
        return np.concatenate([rows, n_worded + copy * n + order[at % n]])


class Steps:
    """The optimizer steps of every epoch.

    Args:
        course: What each epoch trains; no example is longer than `n_tokens`.
        examples_per_step: Examples of a step.
        n_tokens: How long rows may be, if the examples fill them.
        packing: Whether examples of a step share rows.
        seed: Seed of the order and of dropout.

    Attributes:
        row_tokens: How long rows need to be: the shortest that a micro-batch may have, T.
    """

    def __init__(
        self,
        course: Course,
        *,
        examples_per_step: int,
        n_tokens: int,
        packing: bool,
        seed: int,
    ) -> None:
        self.course = course
        self.examples = course.examples
        self.lengths = self.examples.lengths
        self.examples_per_step = examples_per_step
        self.packing = packing
        self.seed = seed
        self.per_epoch = steps_per_epoch(course.n_examples, examples_per_step)
        self.row_tokens = self._row_tokens(n_tokens)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def _row_tokens(self, n_tokens: int) -> int:
        """Return how long rows need to be: no longer than all of the largest step in one row."""
        longest = int(self.lengths.max())
        needed = self.largest_step_tokens if self.packing else _round_up(longest)
        return max(longest, min(n_tokens, needed))

    @property
    def largest_step_tokens(self) -> int:
        """Tokens that a step can have at most, and the padding of a row's end."""
        import numpy as np

        n = min(self.examples_per_step, self.course.n_examples)
        return _round_up(int(np.partition(self.lengths, len(self.lengths) - n)[-n:].sum()))

    @property
    def max_rows(self) -> int:
        """Rows that the largest step can need.

        Best fit leaves at most one row not more than half full, so rows are fewer than twice the
        tokens by the row length, plus one.
        """
        most = min(self.examples_per_step, self.course.n_examples)
        if not self.packing:
            return most
        total = self.largest_step_tokens
        if total <= self.row_tokens:
            return 1
        return min(most, 2 * total // self.row_tokens + 1)

    def step(self, epoch: int, index: int, n_rows: int, n_tokens: int) -> list[Batch]:
        """Return step `index` of an epoch as micro-batches of at most (n_rows, n_tokens)."""
        first = index * self.examples_per_step
        chosen = self._epoch_order(epoch)[first : first + self.examples_per_step]
        batches = Batches(
            Subset(self.examples, chosen, self.lengths[chosen]),
            rows=n_rows,
            n_tokens=n_tokens,
            packing=self.packing,
            shuffle=False,
        )
        return list(batches.epoch(0))

    def dropout_seed(self, step: int, micro_batch: int) -> int:
        """Return the dropout seed of a micro-batch, never 0, which would mean no dropout."""
        text = f"{self.seed}/{step}/{micro_batch}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1 or 1

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        import numpy as np

        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = epoch, rng.permutation(self.course.epoch(epoch))
        return self._order[1]


def _round_up(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
