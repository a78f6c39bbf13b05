"""Find equal and nearly equal rows, and split rows so that such stay on one side.

Nearly equal: the sets of five-character shingles overlap (Jaccard) by an estimated four fifths or
more, by MinHash signatures. Memory is about 150 bytes a row, whatever the rows' length.
Source: Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", ch. 3.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ggft.prompts.encoding import Tokens
from ggft.prompts.messages import Message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

N_HASHES = 64  # of 16 bits each; the estimate's standard deviation is at most 0.06
BANDS = 12  # of five hashes: rows that overlap by 0.8 meet in a band with probability 0.99
BAND_WIDTH = 5
NEAR = 0.8
SHINGLE = 5
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)  # of MurmurHash3's finalizer
PIECE = 1 << 15  # shingles that are hashed at a time, or one row's: 8 MB
MAX_CHARS = 20_000  # of a row's text that are compared
_ASCII_WORDS = {i: chr(i).lower() if chr(i).isalnum() else " " for i in range(128)}
MAX_BUCKET = 64  # rows that are compared with one another when more share a band


@dataclass(frozen=True)
class Duplicates:
    """What rows have to do with one another.

    Attributes:
        copy_of: For each row the first row that is equal to it, itself if none is; (N,).
        near: For each row an earlier row that is nearly equal, −1 if none is; (N,).
        group: For each row a number that it shares with all rows it must not be separated from:
            equal, nearly equal or asking the same; (N,).
        asked: For each row the first row that asks the same; (N,).
    """

    copy_of: npt.NDArray[np.int64]
    near: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    asked: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowHashes:
    """Hashes of some rows: of the whole row, of its question, and MinHash signatures.

    Attributes:
        row_hash: Hash of roles and texts; (N,).
        question_hash: Hash of the normalized questions; (N,).
        signatures: MinHash signatures of the normalized texts; (N, N_HASHES).
    """

    row_hash: npt.NDArray[np.uint64]
    question_hash: npt.NDArray[np.uint64]
    signatures: npt.NDArray[np.uint16]


def hash_rows(rows: Iterable[Sequence[Message] | str | Tokens]) -> RowHashes:
    """Hash rows: conversations, plain texts, or tokens."""
    import numpy as np

    row_hash, question_hash, texts = array("Q"), array("Q"), list[str]()
    for row in rows:
        if isinstance(row, Tokens):
            all_said = words = question = " ".join(map(str, row.ids))
        elif isinstance(row, str):
            all_said = words = question = row
        else:
            said = [(m["role"], _said(m)) for m in row]
            all_said = "\x1e".join(f"{role}\x1f{text}" for role, text in said)
            words = " ".join(text for _, text in said)
            question = " ".join(text for role, text in said if role != "assistant")
        row_hash.append(_hash(all_said))
        question_hash.append(_hash(normalized(question)))
        texts.append(normalized(words[:MAX_CHARS]))
    return RowHashes(
        row_hash=np.array(row_hash, np.uint64),
        question_hash=np.array(question_hash, np.uint64),
        signatures=_signatures(texts),
    )


def _said(message: Message) -> str:
    """Return all that a message says."""
    text = f"{message['content']}\x1f{message.get('input', '')}"
    if more := message.keys() - _PLAIN_KEYS:
        text += "".join(f"\x1f{json.dumps(message[key])}" for key in sorted(more))  # type: ignore[literal-required]
    return text


_PLAIN_KEYS = frozenset(("role", "content", "input", "learn"))


def _signatures(texts: Sequence[str]) -> npt.NDArray[np.uint16]:
    """Return the MinHash signatures of texts' shingles, (N, N_HASHES)."""
    import numpy as np

    factors, powers = _hash_functions()
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    data = "".join(padded).encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(data, np.uint32).astype(np.uint64)
    shingles = np.zeros_like(points)
    for i in range(SHINGLE):  # the last four of each text reach into the next and are not used
        shingles[: len(points) - i] += points[i:] * powers[i]
    for factor in _MIX:  # similar shingles must have unlike hashes
        shingles = (shingles ^ (shingles >> np.uint64(33))) * np.uint64(factor)
    mixed = (shingles >> np.uint64(32)).astype(np.uint32)
    ends = np.cumsum([len(text) for text in padded], dtype=np.int64)
    starts = ends - [len(text) for text in padded]
    bounds = np.stack([starts, ends - (SHINGLE - 1)], axis=1)
    signatures = np.empty((len(texts), N_HASHES), np.uint16)
    first = 0
    while first < len(texts):
        start = bounds[first, 0]
        last = max(first + 1, int(np.searchsorted(ends, start + PIECE, "right")))
        hashes = mixed[start : ends[last - 1]] * factors
        # reduceat reduces between every two neighbours in (start, end, start, end, …): the odd
        # results are of the unused shingles between two texts, and go.
        least = np.minimum.reduceat(hashes, (bounds[first:last] - start).ravel(), axis=1)[:, ::2]
        # The least of many hashes has small upper bits.
        signatures[first:last] = least.T & np.uint32(0xFFFF)
        first = last
    return signatures


@cache
def _hash_functions() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    """Return the factors of the hash functions, (N_HASHES, 1), and a shingle's, (SHINGLE,)."""
    import numpy as np

    rng = np.random.default_rng(20240726)  # any fixed seed
    # Odd, so that each is a permutation of the 32-bit numbers.
    factors = rng.integers(0, 2**31, (N_HASHES, 1), np.uint32) * np.uint32(2) + np.uint32(1)
    powers = np.array([pow(0x9E3779B97F4A7C15, n, 2**64) for n in range(SHINGLE)], np.uint64)
    return factors, powers


class HashTable:
    """The hashes of all rows, collected batch by batch, to be compared at the end."""

    def __init__(self) -> None:
        self._row_hash = array("Q")
        self._question_hash = array("Q")
        self._signatures = array("H")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._row_hash)

    def extend(self, hashes: RowHashes) -> None:
        """Add the next rows."""
        self._row_hash.frombytes(hashes.row_hash.tobytes())
        self._question_hash.frombytes(hashes.question_hash.tobytes())
        self._signatures.frombytes(hashes.signatures.tobytes())

    def duplicates(self) -> Duplicates:
        """Compare all rows."""
        import numpy as np

        n = len(self)
        row_hash = np.frombuffer(self._row_hash, np.uint64) if n else np.zeros(0, np.uint64)
        question_hash = np.frombuffer(self._question_hash, np.uint64) if n else row_hash
        copy_of = _first_of(row_hash)
        union = _Union(n)
        asked = _first_of(question_hash)
        for first in (copy_of, asked):
            for i in np.flatnonzero(first != np.arange(n)).tolist():
                union.join(i, int(first[i]))
        near = self._near(copy_of)
        for i in np.flatnonzero(near >= 0).tolist():
            union.join(i, int(near[i]))
        return Duplicates(copy_of, near, union.groups(), asked)

    def _near(self, copy_of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return for each row that is no copy an earlier nearly equal row, or −1."""
        import numpy as np

        n = len(self)
        near = np.full(n, -1, np.int64)
        rows = np.flatnonzero(copy_of == np.arange(n))
        if len(rows) < 2:
            return near
        signatures = np.frombuffer(self._signatures, np.uint16).reshape(n, N_HASHES)
        weights = np.array(
            [pow(0xD1B54A32D192ED03, i + 1, 2**64) for i in range(BAND_WIDTH)], np.uint64
        )
        for band in range(BANDS):
            keys = np.zeros(len(rows), np.uint64)
            for i in range(BAND_WIDTH):
                keys += signatures[rows, band * BAND_WIDTH + i].astype(np.uint64) * weights[i]
            order = np.argsort(keys, kind="stable")
            ordered = keys[order]
            starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            ends = np.r_[starts[1:], len(ordered)]
            for i in np.flatnonzero(ends - starts > 1).tolist():
                _compare(signatures, rows[order[starts[i] : ends[i]]], near)
        return near


def _compare(
    signatures: npt.NDArray[np.uint16],
    rows: npt.NDArray[np.int64],
    near: npt.NDArray[np.int64],
) -> None:
    """Enter into `near` which of the rows of a bucket, in ascending order, are nearly equal."""
    for at in range(1, len(rows)):
        if near[rows[at]] >= 0:
            continue
        before = rows[max(0, at - MAX_BUCKET) : at]
        alike = (signatures[before] == signatures[rows[at]]).mean(axis=1) >= NEAR
        if alike.any():
            near[rows[at]] = before[int(alike.argmax())]


class _Union:
    """Disjoint sets of numbers."""

    def __init__(self, n: int) -> None:
        self._parent = array("q", range(n))

    def _root(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        """Put two numbers into one set."""
        i, j = self._root(i), self._root(j)
        self._parent[max(i, j)] = min(i, j)

    def groups(self) -> npt.NDArray[np.int64]:
        """Return the least member of each number's set."""
        import numpy as np

        return np.array([self._root(i) for i in range(len(self._parent))], np.int64)


def _first_of(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return for each key the index at which it occurs first."""
    import numpy as np

    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def normalized(text: str) -> str:
    """Return a text without case, width, punctuation and differences of blanks."""
    if text.isascii():
        return " ".join(text.translate(_ASCII_WORDS).split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def split(
    group: npt.NDArray[np.int64], usable: npt.NDArray[np.bool_], n_held_out: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Choose about `n_held_out` rows for validation, whole groups at a time.

    Args:
        group: Rows with the same number stay together; (N,).
        usable: Rows that may be chosen; (N,).
        n_held_out: How many rows; a group that would exceed it by more than half is passed over.
        seed: Seed of the choice.

    Returns:
        True for the rows held out, (N,).
    """
    import numpy as np

    held_out = np.zeros(len(group), np.bool_)
    rows = np.flatnonzero(usable)
    if n_held_out <= 0 or not len(rows):
        return held_out
    names, sizes = np.unique(group[rows], return_counts=True)
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    room = n_held_out + n_held_out // 2
    chosen: list[int] = []
    taken = 0
    for i in order.tolist():
        if taken >= n_held_out:
            break
        if taken + sizes[i] <= room and taken + sizes[i] < len(rows):
            chosen.append(int(names[i]))
            taken += int(sizes[i])
    held_out[rows] = np.isin(group[rows], chosen)
    return held_out
