"""Tokenized examples in little memory, however many they are."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    IntArray = npt.NDArray[np.int32]
    BoolArray = npt.NDArray[np.bool_]

N_SHOWN = 3  # rows named in a warning
MEMORY_TOKENS = 1 << 24  # tokens that a store keeps in memory before it writes a file


class Examples(Protocol):
    """A sequence of tokenized examples: a `TokenStore`, or some of its examples."""

    @property
    def lengths(self) -> IntArray:
        """Tokens of each example, (N,)."""
        ...

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        ...

    def targets(self, index: int) -> tuple[IntArray, IntArray]:
        """Return ids of an example, and what is to be predicted at each; −1 where nothing is."""
        ...


class TokenStore:
    """Tokenized examples: 4 bytes a token and 16 to 24 an example.

    Beyond 64 MB the tokens go to a temporary file without a name, which is read by mapping it.

    Args:
        keep: Whether to keep the tokens; without, only lengths and trained spans are.
        memory_tokens: Tokens to keep in memory.
    """

    def __init__(self, *, keep: bool = True, memory_tokens: int = MEMORY_TOKENS) -> None:
        self._keep = keep
        self._memory_tokens = memory_tokens
        self._ids = array("i")  # tokens that are not in the file
        self._ends = array("q", [0])
        self._spans = array("i")  # start and end of each run of trained tokens
        self._span_ends = array("q", [0])
        self._file: IO[bytes] | None = None
        self._filed = 0  # tokens in the file
        self._map: IntArray | None = None

    def add(self, ids: Sequence[int], trained: Sequence[int]) -> None:
        """Append an example; `trained[i]` is 1 if token i is learned, else 0."""
        if self._keep:
            self._ids.extend(ids)
            if len(self._ids) > self._memory_tokens:
                self._spill()
        self._ends.append(self._ends[-1] + len(ids))
        flags = bytes(trained)
        start = flags.find(1)
        while start >= 0:
            end = flags.find(0, start)
            end = len(flags) if end < 0 else end
            self._spans.extend((start, end))
            start = flags.find(1, end)
        self._span_ends.append(len(self._spans))

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="ggft-tokens-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        self._ids.tofile(self._file)
        self._filed += len(self._ids)
        self._ids = array("i")
        self._map = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._ends) - 1

    @property
    def lengths(self) -> IntArray:
        """Tokens of each example, (N,)."""
        import numpy as np

        return np.diff(np.array(self._ends, np.int64)).astype(np.int32)

    def n_trained(self, index: int, max_length: int) -> int:
        """Return how many tokens the loss counts in an example cut to `max_length` tokens.

        The first token is not counted: nothing comes before it.
        """
        spans = self._spans[self._span_ends[index] : self._span_ends[index + 1]]
        return sum(
            max(0, min(end, max_length) - max(start, 1))
            for start, end in zip(spans[::2], spans[1::2], strict=True)
        )

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        import numpy as np

        start, end = self._ends[index], self._ends[index + 1]
        if start >= self._filed:
            ids = np.array(self._ids[start - self._filed : end - self._filed], np.int32)
        else:
            ids = np.array(self._mapped()[start:end])
        trained = np.zeros(end - start, np.bool_)
        spans = self._spans[self._span_ends[index] : self._span_ends[index + 1]]
        for first, last in zip(spans[::2], spans[1::2], strict=True):
            trained[first:last] = True
        return ids, trained

    def targets(self, index: int) -> tuple[IntArray, IntArray]:
        """Return ids of an example, and what is to be predicted at each: the next token, or −1."""
        return next_tokens(*self.get(index))

    def _mapped(self) -> IntArray:
        import numpy as np

        if self._map is None:
            assert self._file is not None
            self._file.flush()
            self._map = np.memmap(self._file, np.int32, "r", shape=(self._filed,))
        return self._map


class StoreView:
    """Some of a store's examples, cut to a length.

    Args:
        store: The examples.
        indexes: Which of them, in order; (N,).
        max_length: Longest that an example may be, in tokens.
    """

    def __init__(self, store: TokenStore, indexes: npt.NDArray[np.int64], max_length: int) -> None:
        import numpy as np

        self._store = store
        self._indexes = indexes
        self._max_length = max_length
        self.lengths: IntArray = np.minimum(store.lengths[indexes], max_length)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._indexes)

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        ids, trained = self._store.get(int(self._indexes[index]))
        return ids[: self._max_length], trained[: self._max_length]

    def targets(self, index: int) -> tuple[IntArray, IntArray]:
        """Return ids of an example, and what is to be predicted at each: the next token, or −1."""
        return next_tokens(*self.get(index))


def next_tokens(ids: IntArray, trained: BoolArray) -> tuple[IntArray, IntArray]:
    """Return ids, and at each the token that comes next if that is trained, else −1."""
    import numpy as np

    targets = np.full(len(ids), -1, np.int32)
    targets[:-1] = np.where(trained[1:], ids[1:], -1)
    return ids, targets


@dataclass(frozen=True)
class Subset:
    """Some of the examples, in the order of `indexes`; `lengths` are theirs."""

    examples: Examples
    indexes: npt.NDArray[np.int64]
    lengths: IntArray

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        return self.examples.get(int(self.indexes[index]))

    def targets(self, index: int) -> tuple[IntArray, IntArray]:
        """Return ids of an example, and what is to be predicted at each."""
        return self.examples.targets(int(self.indexes[index]))


@dataclass(frozen=True)
class Chain:
    """Examples of several sources, one after another; `lengths` are theirs."""

    parts: tuple[Examples, ...]
    lengths: IntArray

    @staticmethod
    def of(*parts: Examples) -> Chain:
        """Return the chain of some sources."""
        import numpy as np

        return Chain(parts, np.concatenate([part.lengths for part in parts]))

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        part, index = self._find(index)
        return part.get(index)

    def targets(self, index: int) -> tuple[IntArray, IntArray]:
        """Return ids of an example, and what is to be predicted at each."""
        part, index = self._find(index)
        return part.targets(index)

    def _find(self, index: int) -> tuple[Examples, int]:
        """Return the source of an example, and its number there."""
        for part in self.parts:
            if index < len(part.lengths):
                return part, index
            index -= len(part.lengths)
        raise IndexError(index)


@dataclass(frozen=True)
class Retold:
    """Examples some of which are to predict something else than their own next tokens.

    Attributes:
        examples: The examples.
        other: What is to be predicted at each token, by the example's index.
    """

    examples: Examples
    other: Mapping[int, IntArray]

    @property
    def lengths(self) -> IntArray:
        """Tokens of each example, (N,)."""
        return self.examples.lengths

    def get(self, index: int) -> tuple[IntArray, BoolArray]:
        """Return ids and trained mask of an example."""
        return self.examples.get(index)

    def targets(self, index: int) -> tuple[IntArray, IntArray]:
        """Return ids of an example, and what is to be predicted at each."""
        ids, targets = self.examples.targets(index)
        return ids, self.other.get(index, targets)


class RowTable:
    """Where each row is, in 12 bytes a row."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._file = array("i")
        self._line = array("q")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._file)

    def add(self, file: int, line: int) -> None:
        """Append a row of file number `file`."""
        self._file.append(file)
        self._line.append(line)

    def files(self) -> npt.NDArray[np.int32]:
        """Return the number of each row's file, (N,)."""
        import numpy as np

        return np.array(self._file, np.int32)

    def where(self, row: int) -> str:
        """Return `file:line` of a row."""
        return f"{self.paths[self._file[row]].name}:{self._line[row]}"

    def places(self, rows: Sequence[int]) -> str:
        """Name the first few of some rows."""
        names = ", ".join(map(self.where, rows[:N_SHOWN]))
        return names + (", …" if len(rows) > N_SHOWN else "")
