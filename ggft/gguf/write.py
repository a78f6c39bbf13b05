"""Writes files that are either whole or not there, and GGUF files tensor by tensor.

Upstream's writer opens the final path and ignores errors on closing. Here data goes to a temporary
file beside the target, is flushed to the disk, and only then takes the target's name. A GGUF is
written header first; the data of each tensor is produced when its turn comes, so that memory stays
small for any model.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ggft.gguf.kinds import GGUF_MAGIC
from ggft.gguf.types import (
    ALIGNMENT_DEFAULT,
    MAX_NAME_BYTES,
    VALUE_CODES,
    GGMLType,
    StringArray,
    Value,
    ValueType,
)
from ggft.system.errors import InputError
from ggft.system.files import atomic_output

VERSION = 3


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        shape: In ggml's order: shape[0] is the length of a row.
        chunks: Gives the data in order, in pieces of any size; called once, when it is needed.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @property
    def n_bytes(self) -> int:
        """Return the size of the data."""
        n_elements = 1
        for size in self.shape:
            n_elements *= size
        return n_elements // self.type.block_size * self.type.block_bytes


def gguf_bytes(
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorSource],
    *,
    types: Mapping[str, ValueType] | None = None,
) -> int:
    """Return the size in bytes of the GGUF that `write_gguf` would write."""
    header, alignment = _header(metadata, tensors, types or {})
    return len(header) + sum(t.n_bytes + -t.n_bytes % alignment for t in tensors)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorSource],
    *,
    types: Mapping[str, ValueType] | None = None,
    inputs: Sequence[Path] = (),
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a GGUF file as a whole or not at all.

    Args:
        path: The output file.
        metadata: Values by key, in the order to be written.
        tensors: What to write, in order.
        types: Type of a value, or of an array's elements, where it should not follow from the
            Python type (bool BOOL; int UINT32, else the smallest that holds it; float FLOAT32;
            str STRING; list of int INT32; array.array its own).
        inputs: Files that the tensors' data comes from; the output must be none of them.
        progress: Called with the number of bytes written so far.

    Raises:
        InputError: The output cannot be used, or a name is too long.
        ResourceError: The disk is full, or writing failed.
        ValueError: A tensor gives more or fewer bytes than its shape says.
    """
    header, alignment = _header(metadata, tensors, types or {})
    size = len(header) + sum(t.n_bytes + -t.n_bytes % alignment for t in tensors)
    with (
        atomic_output(path, expected_bytes=size, inputs=inputs) as temporary,
        temporary.open("wb", buffering=1 << 20) as file,
    ):
        file.write(header)
        done = len(header)
        for tensor in tensors:
            for written in _write_tensor(file, tensor, alignment):
                done += written
                if progress is not None:
                    progress(done)


def _write_tensor(file: BinaryIO, tensor: TensorSource, alignment: int) -> Iterator[int]:
    """Write one tensor and its padding; yield the size of each piece."""
    n_bytes = 0
    for chunk in tensor.chunks():
        length = memoryview(chunk).nbytes
        n_bytes += length
        if n_bytes > tensor.n_bytes:
            break
        file.write(chunk)
        yield length
    if n_bytes != tensor.n_bytes:
        raise ValueError(f"{tensor.name}: {n_bytes} bytes produced, {tensor.n_bytes} expected")
    padding = -n_bytes % alignment
    file.write(bytes(padding))
    yield padding


def _header(
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorSource],
    types: Mapping[str, ValueType],
) -> tuple[bytes, int]:
    """Return the padded header and the alignment."""
    alignment = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
    if not isinstance(alignment, int):
        raise ValueError("general.alignment must be a whole number")
    out = bytearray(GGUF_MAGIC)
    out += struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _string(key) + _value(value, types.get(key))
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode("utf-8", "surrogateescape")
        if len(name) > MAX_NAME_BYTES:
            raise InputError("tensor name is too long", found=ascii(tensor.name))
        if tensor.shape[0] % tensor.type.block_size:
            raise ValueError(f"{tensor.name}: rows of {tensor.shape[0]} are not whole blocks")
        out += _string(tensor.name)
        out += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        out += struct.pack("<IQ", tensor.type, offset)
        offset += tensor.n_bytes + -tensor.n_bytes % alignment
    out += bytes(-len(out) % alignment)
    return bytes(out), alignment


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value, value_type: ValueType | None) -> bytes:
    """Return a value with its type, as it stands in a file."""
    if isinstance(value, (bool, int, float, str)):
        kind = _scalar_type(value) if value_type is None else value_type
        return struct.pack("<I", kind) + _scalar(value, kind)
    kind = _element_type(value) if value_type is None else value_type
    head = struct.pack("<IIQ", ValueType.ARRAY, kind, len(value))
    if isinstance(value, StringArray):
        return head + value.records()
    if kind is ValueType.STRING:
        return head + b"".join(_string(str(text)) for text in value)
    numbers = array(VALUE_CODES[kind], value)
    if sys.byteorder == "big":
        numbers.byteswap()
    return head + numbers.tobytes()


def _scalar(value: bool | int | float | str, kind: ValueType) -> bytes:
    if kind is ValueType.STRING:
        return _string(str(value))
    return struct.pack("<" + VALUE_CODES[kind], value)


def _scalar_type(value: bool | int | float | str) -> ValueType:
    """Return the type in which a single value is written."""
    if isinstance(value, str):
        return ValueType.STRING
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, float):
        return ValueType.FLOAT32
    if value < 0:
        return ValueType.INT32 if value >= -(1 << 31) else ValueType.INT64
    return ValueType.UINT32 if value < 1 << 32 else ValueType.UINT64


def _element_type(value: Sequence[object]) -> ValueType:
    """Return the type in which an array's elements are written."""
    if isinstance(value, array):
        return next(kind for kind, code in VALUE_CODES.items() if code == value.typecode)
    if isinstance(value, StringArray) or (len(value) and isinstance(value[0], str)):
        return ValueType.STRING
    if len(value) and isinstance(value[0], bool):
        return ValueType.BOOL
    if any(isinstance(x, float) for x in value):
        return ValueType.FLOAT32
    return ValueType.INT32
