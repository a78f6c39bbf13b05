"""Which examples an optimizer step learns from, as micro-batches.

A step is `examples_per_step` examples of the epoch's order, the last step of an epoch what is left.
With packing they share as few rows as they need, so packing changes the speed and not the step.
Order and dropout follow from the seed and the position alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggft.batching import ROW_MULTIPLE, Batch, Batches, Examples
from ggft.schedule import steps_per_epoch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ggft.batching import BoolArray, IntArray


@dataclass(frozen=True)
class Subset:
    """Some of the examples, in the order of `indexes`; `lengths` are theirs."""

    examples: Examples
    indexes: npt.NDArray[np.int64]
    lengths: IntArray

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        return self.examples.get(int(self.indexes[index]))


class Steps:
    """The optimizer steps of every epoch.

    Args:
        examples: The tokenized examples, none longer than `n_tokens`.
        examples_per_step: Examples of a step.
        n_tokens: How long rows may be, if the examples fill them.
        packing: Whether examples of a step share rows.
        seed: Seed of the order and of dropout.

    Attributes:
        row_tokens: How long rows need to be: the shortest that a micro-batch may have, T.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        examples_per_step: int,
        n_tokens: int,
        packing: bool,
        seed: int,
    ) -> None:
        self.examples = examples
        self.lengths = examples.lengths
        self.examples_per_step = examples_per_step
        self.packing = packing
        self.seed = seed
        self.per_epoch = steps_per_epoch(len(self.lengths), examples_per_step)
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

        n = min(self.examples_per_step, len(self.lengths))
        return _round_up(int(np.partition(self.lengths, len(self.lengths) - n)[-n:].sum()))

    @property
    def max_rows(self) -> int:
        """Rows that the largest step can need.

        Best fit leaves at most one row not more than half full, so rows are fewer than twice the
        tokens by the row length, plus one.
        """
        most = min(self.examples_per_step, len(self.lengths))
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
            self._order = epoch, rng.permutation(len(self.lengths))
        return self._order[1]


def _round_up(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
