"""What a GGUF file consists of: value types, tensor types, tensors, and the parsed file.

Plain data without file access, so that the reader, the checks and the writer share one vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import overload

from ggft.system.files import sha256_of

ALIGNMENT_DEFAULT = 32
ALIGNMENT_MAX = 65536
MAX_DIMS = 4
MAX_NAME_BYTES = 63


class ValueType(IntEnum):
    """Type of a metadata value, as numbered in the file. Source: ggml's gguf.h."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct and array letters of the fixed-size value types.
VALUE_CODES: Mapping[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


class GGMLType(IntEnum):
    """Type of a tensor's elements; `name` is the usual spelling (Q4_K).

    Attributes:
        block_size: Elements per block.
        block_bytes: Bytes per block.

    Source: the type traits in ggml.c of the pinned llama.cpp.
    """

    block_size: int
    block_bytes: int

    def __new__(cls, number: int, block_size: int = 0, block_bytes: int = 0) -> GGMLType:
        """Make a member that carries its block's dimensions."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18


# Types that ggml only uses inside operators, or that hold no weights.
NOT_WEIGHT_TYPES = frozenset(
    {
        GGMLType.Q8_1,
        GGMLType.Q8_K,
        GGMLType.I8,
        GGMLType.I16,
        GGMLType.I32,
        GGMLType.I64,
        GGMLType.F64,
    }
)


class StringArray(Sequence[str]):
    """An array of strings, kept as bytes and decoded when asked: vocabularies are large.

    Bytes that are not UTF-8 come back as surrogate escapes, so nothing is lost.
    """

    def __init__(self, data: bytes, ends: array[int]) -> None:
        """Wrap the records `u64 length, bytes`; `ends[i]` is where record i ends in `data`."""
        self._data = data
        self._ends = ends

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one string, or a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """Yield every string."""
        for text in self._texts():
            yield text.decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        """Compare by content with any sequence of strings."""
        if isinstance(other, StringArray):
            return self._data == other._data
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _texts(self) -> Iterator[bytes]:
        begin = 8
        data = self._data
        for end in self._ends:
            yield data[begin:end]
            begin = end + 8

    def raw(self, index: int) -> bytes:
        """Return the bytes of one string."""
        if index < 0:
            index += len(self._ends)
        end = self._ends[index]
        begin = 8 if index == 0 else self._ends[index - 1] + 8
        return self._data[begin:end]

    def records(self) -> bytes:
        """Return all records as they stand in a file."""
        return self._data

    def first_duplicate(self) -> tuple[int, int] | None:
        """Return the indices of the first string that stands twice for llama.cpp, or None.

        llama.cpp reads C strings, which end at a NUL, and calls empty ones [EMPTY_i].
        """
        seen: dict[bytes, int] = {}
        texts = [record.partition(b"\0")[0] for record in self._texts()]
        if len(set(texts)) == len(texts) and b"" not in texts:
            return None
        for i, text in enumerate(texts):
            first = seen.setdefault(text or b"[EMPTY_%d]" % i, i)
            if first != i:
                return first, i
        return None

    def find(self, text: str) -> int:
        """Return the index of the first string equal to `text`, or -1."""
        wanted = text.encode("utf-8", "surrogateescape")
        record = len(wanted).to_bytes(8, "little") + wanted
        if record not in self._data:
            return -1
        return next((i for i in range(len(self)) if self.raw(i) == wanted), -1)


# Number arrays are array.array, booleans a list, strings a StringArray.
Scalar = int | float | bool | str
Value = Scalar | Sequence[int] | Sequence[float] | Sequence[bool] | Sequence[str]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
        shape: In ggml's order: shape[0] is the length of a row.
        path: The file (shard) that holds it.
        offset: Absolute position in `path`, bytes.
        n_bytes: Size of its data, without padding.
        header_offset: Where `path` describes it, bytes.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int
    header_offset: int = 0

    @property
    def n_elements(self) -> int:
        """Return the number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return self.shape[0] // self.type.block_size * self.type.block_bytes

    @property
    def n_rows(self) -> int:
        """Return the number of rows."""
        return self.n_elements // self.shape[0] if self.shape[0] else 0


@dataclass(frozen=True)
class GGUFFile:
    """A parsed and checked GGUF file, or all shards of one model.

    Attributes:
        path: The file, or the first shard.
        paths: All shards in order.
        metadata: Keys and values of the first shard.
        types: Type of each value; for arrays, the type of its elements.
        tensors: By name, in file order.
        data_offset: Where tensor data starts in `path`, bytes.
        warnings: What is odd but harmless.
        value_offsets: Where each metadata value starts in `path`, bytes.
    """

    path: Path
    paths: tuple[Path, ...]
    version: int
    alignment: int
    metadata: dict[str, Value]
    types: dict[str, ValueType]
    tensors: dict[str, TensorInfo]
    data_offset: int
    warnings: tuple[str, ...] = ()
    value_offsets: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _hashes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def architecture(self) -> str:
        """Return `general.architecture`, or "" where the file has none."""
        value = self.metadata.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    @property
    def file_bytes(self) -> int:
        """Return the size of all shards."""
        return sum(path.stat().st_size for path in self.paths)

    def get(self, key: str, default: Value | None = None) -> Value | None:
        """Return a metadata value."""
        return self.metadata.get(key, default)

    def text(self, key: str) -> str | None:
        """Return a metadata value that is text, U+FFFD for what is not UTF-8; None without."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            return None
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def sha256(self) -> str:
        """Return the SHA-256 of the file (of the shards, one after another), read in pieces."""
        if "sha256" not in self._hashes:
            self._hashes["sha256"] = sha256_of(self.paths)
        return self._hashes["sha256"]

    def note_sha256(self, sha256: str) -> None:
        """Keep the SHA-256 of the file, which somebody who read all of it has taken."""
        self._hashes["sha256"] = sha256
