"""Parses the header of one GGUF file and refuses whatever is wrong with it.

Accepts what the pinned llama.cpp accepts and no more, and also compares every extent with the size
of the file, which upstream's header parser leaves out. The header is read with plain reads, never
mapped: a file that shrinks meanwhile gives an error and not a SIGBUS.

Source of the format: ggml's gguf.h; of the faults: the advisories about parsers of it.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from array import array
from functools import partial
from pathlib import Path

from ggft.gguf.cursor import Cursor
from ggft.gguf.kinds import GGUF_MAGIC, HEAD_BYTES, identify
from ggft.gguf.types import (
    ALIGNMENT_DEFAULT,
    ALIGNMENT_MAX,
    MAX_DIMS,
    MAX_NAME_BYTES,
    VALUE_CODES,
    GGMLType,
    GGUFFile,
    TensorInfo,
    Value,
    ValueType,
)
from ggft.system.errors import InputError
from ggft.system.files import require_regular_file

VERSIONS = (2, 3)
MAX_KEY_BYTES = 65535
MAX_STRING_BYTES = 1 << 30
MAX_SIZE = (1 << 63) - 1
# Far above what any model has, so that a large file of nothing but entries cannot keep us busy.
MAX_ENTRIES = 1 << 20
MAX_STRINGS = 1 << 24

# The fewest bytes a metadata entry (length, 1-byte key, type, 1-byte value) and a tensor entry
# (length, 1-byte name, dimensions, type, offset) can take.
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


def read_header(path: Path) -> GGUFFile:
    """Read one file, whether or not it is a shard of a model.

    Raises:
        InputError: The file cannot be used; says where, what was found and what was expected.
    """
    file_bytes = require_regular_file(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot open the file: {error.strerror}", path=path) from None
    try:
        return parse_header(Cursor(path, file_bytes, partial(os.pread, descriptor)))
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", path=path) from None
    finally:
        os.close(descriptor)


def parse_header(cursor: Cursor) -> GGUFFile:
    """Parse a header in file order: counts, metadata, tensor entries.

    Raises:
        InputError: As `read_header`.
    """
    version, n_tensors, n_kv = _parse_counts(cursor)
    metadata: dict[str, Value] = {}
    types: dict[str, ValueType] = {}
    value_offsets: dict[str, int] = {}
    for i in range(n_kv):
        key = _parse_key(cursor, i, metadata)
        value_offsets[key], types[key], metadata[key] = _parse_value(cursor, key)
    alignment = _alignment(cursor, metadata, types, value_offsets)
    entries = _parse_tensors(cursor, n_tensors)
    data_offset = cursor.pos
    if n_tensors:
        data_offset += -data_offset % alignment
    tensors, end = _place_tensors(cursor, entries, data_offset, alignment)
    warnings = []
    trailing = cursor.file_bytes - (end + -end % alignment)
    if trailing > 0:
        warnings.append(f"{trailing} bytes follow the last tensor; they are ignored")
    return GGUFFile(
        path=cursor.path,
        paths=(cursor.path,),
        version=version,
        alignment=alignment,
        metadata=metadata,
        types=types,
        tensors=tensors,
        data_offset=data_offset,
        warnings=tuple(warnings),
        value_offsets=value_offsets,
    )


def _parse_counts(cursor: Cursor) -> tuple[int, int, int]:
    """Parse magic, version and counts; return version, n_tensors, n_kv."""
    head = cursor.take(min(HEAD_BYTES, cursor.file_bytes), "the header")
    cursor.pos = 0
    if head[:4] != GGUF_MAGIC:
        kind = identify(head)
        raise cursor.fail(
            "not a GGUF file", found=kind.description, expected="the magic GGUF", hint=kind.hint
        )
    cursor.pos = 4
    version = cursor.u32("the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = f"{version}"
        hint = "convert the model again with a current llama.cpp"
        if swapped in VERSIONS:
            found = f"version {swapped} in big-endian byte order"
            hint = "only little-endian GGUF can be read; convert the model for this machine"
        elif version > VERSIONS[-1]:
            hint = "the file is newer than this ggft; update it"
        raise cursor.fail(
            "unsupported GGUF version", offset=4, found=found, expected="2 or 3", hint=hint
        )
    n_tensors = cursor.u64("the number of tensors")
    n_kv = cursor.u64("the number of metadata entries")
    left = cursor.file_bytes - cursor.pos
    for count, offset, least, what in (
        (n_tensors, 8, _MIN_TENSOR_BYTES, "tensors"),
        (n_kv, 16, _MIN_KV_BYTES, "metadata entries"),
    ):
        if count > left // least:
            raise cursor.fail(
                f"the number of {what} exceeds the file",
                offset=offset,
                found=f"{count}",
                expected=f"≤ {left // least} in the {left} bytes left",
            )
        if count > MAX_ENTRIES:
            raise cursor.fail(
                f"too many {what}", offset=offset, found=count, expected=f"≤ {MAX_ENTRIES}"
            )
    return version, n_tensors, n_kv


def _parse_key(cursor: Cursor, index: int, seen: dict[str, Value]) -> str:
    """Parse a metadata key."""
    at = cursor.pos
    raw = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
    if not raw:
        raise cursor.fail(f"metadata key {index} is empty", offset=at, expected="a name")
    if _CONTROL.search(raw):
        raise cursor.fail(
            f"metadata key {index} has control characters",
            offset=at,
            found=ascii(raw[:80]),
            expected="printable text",
        )
    key = raw.decode("utf-8", "surrogateescape")
    if key in seen:
        raise cursor.fail(
            "metadata key stands twice", offset=at, found=ascii(key), expected="unique keys"
        )
    return key


def _value_type(cursor: Cursor, key: str) -> ValueType:
    """Parse the type of a value or of an array's elements."""
    at = cursor.pos
    number = cursor.u32(f"the type of {key!a}")
    try:
        return ValueType(number)
    except ValueError:
        raise cursor.fail(
            f"unknown value type of {key!a}", offset=at, found=f"{number}", expected="0 to 12"
        ) from None


def _parse_value(cursor: Cursor, key: str) -> tuple[int, ValueType, Value]:
    """Parse a value; return where it starts, its (element) type, and itself."""
    value_type = _value_type(cursor, key)
    if value_type is not ValueType.ARRAY:
        at = cursor.pos
        if value_type is ValueType.STRING:
            raw = cursor.string(f"the value of {key!a}", MAX_STRING_BYTES)
            return at, value_type, raw.decode("utf-8", "surrogateescape")
        code = "<" + VALUE_CODES[value_type]
        (number,) = struct.unpack(code, cursor.take(struct.calcsize(code), f"value of {key!a}"))
        return at, value_type, bool(number) if value_type is ValueType.BOOL else number
    at_type = cursor.pos
    value_type = _value_type(cursor, key)
    if value_type is ValueType.ARRAY:
        raise cursor.fail(
            f"array of arrays in {key!a}", offset=at_type, found="type 9", expected="a plain type"
        )
    at = cursor.pos
    count = cursor.u64(f"the length of {key!a}")
    left = cursor.file_bytes - cursor.pos
    size = 8 if value_type is ValueType.STRING else struct.calcsize("<" + VALUE_CODES[value_type])
    if count > left // size:
        raise cursor.fail(
            f"the array {key!a} exceeds the file",
            offset=at,
            found=f"{count} elements",
            expected=f"≤ {left // size} in the {left} bytes left",
        )
    if value_type is ValueType.STRING:
        if count > MAX_STRINGS:
            raise cursor.fail(
                f"too many strings in {key!a}", offset=at, found=count, expected=f"≤ {MAX_STRINGS}"
            )
        return at, value_type, cursor.strings(count, f"{key!a}")
    numbers = array(VALUE_CODES[value_type])
    numbers.frombytes(cursor.take(count * size, f"the array {key!a}"))
    if sys.byteorder == "big":
        numbers.byteswap()
    return at, value_type, [x != 0 for x in numbers] if value_type is ValueType.BOOL else numbers


def _alignment(
    cursor: Cursor,
    metadata: dict[str, Value],
    types: dict[str, ValueType],
    value_offsets: dict[str, int],
) -> int:
    """Return the alignment of tensor data in bytes."""
    key = "general.alignment"
    value = metadata.get(key, ALIGNMENT_DEFAULT)
    if key in types and (types[key] is not ValueType.UINT32 or not isinstance(value, int)):
        raise cursor.fail(
            f"{key} has the wrong type",
            offset=value_offsets[key],
            found=types[key].name if isinstance(value, int) else "an array or text",
            expected="UINT32",
        )
    if not isinstance(value, int) or not 0 < value <= ALIGNMENT_MAX or value & (value - 1):
        raise cursor.fail(
            f"bad {key}",
            offset=value_offsets[key],
            found=f"{value}",
            expected=f"a power of two up to {ALIGNMENT_MAX}",
        )
    return value


def _parse_tensors(
    cursor: Cursor, n_tensors: int
) -> list[tuple[str, GGMLType, tuple[int, ...], int, int]]:
    """Parse tensor entries: name, type, shape, offset within the data, position of the entry."""
    entries = []
    seen: set[str] = set()
    for i in range(n_tensors):
        at = cursor.pos
        raw = cursor.string(f"the name of tensor {i}", MAX_NAME_BYTES)
        if not raw or _CONTROL.search(raw):
            raise cursor.fail(
                f"bad name of tensor {i}",
                offset=at,
                found=ascii(raw) if raw else "an empty name",
                expected="printable text",
            )
        name = raw.decode("utf-8", "surrogateescape")
        if name in seen:
            raise cursor.fail(
                "tensor name stands twice", offset=at, found=ascii(name), expected="unique names"
            )
        seen.add(name)
        shape = _parse_shape(cursor, name)
        tensor_type = _parse_tensor_type(cursor, name, shape)
        entries.append((name, tensor_type, shape, cursor.u64(f"the offset of {name!a}"), at))
    return entries


def _parse_shape(cursor: Cursor, name: str) -> tuple[int, ...]:
    """Parse the dimensions of a tensor; a scalar gets the shape (1,)."""
    at = cursor.pos
    n_dims = cursor.u32(f"the dimensions of {name!a}")
    if n_dims > MAX_DIMS:
        raise cursor.fail(
            f"too many dimensions of {name!a}", offset=at, found=n_dims, expected=f"≤ {MAX_DIMS}"
        )
    shape = struct.unpack(f"<{n_dims}q", cursor.take(8 * n_dims, f"the shape of {name!a}"))
    product = 1
    for size in shape:
        if size < 0:
            raise cursor.fail(
                f"negative dimension of {name!a}", offset=at + 4, found=size, expected="≥ 0"
            )
        product *= size
        if product > MAX_SIZE:
            raise cursor.fail(
                f"the size of {name!a} overflows",
                offset=at + 4,
                found=" × ".join(map(str, shape)) + " elements",
                expected="< 2^63",
            )
    return shape or (1,)


def _parse_tensor_type(cursor: Cursor, name: str, shape: tuple[int, ...]) -> GGMLType:
    """Parse the type of a tensor and check its rows against the type's block."""
    at = cursor.pos
    number = cursor.u32(f"the type of {name!a}")
    try:
        tensor_type = GGMLType(number)
    except ValueError:
        raise cursor.fail(
            f"unknown type of tensor {name!a}",
            offset=at,
            found=f"{number}",
            expected="a current ggml type",
            hint="types 4, 5 and 31 to 38 were removed from ggml; convert the original model again",
        ) from None
    if shape[0] % tensor_type.block_size:
        raise cursor.fail(
            f"the rows of {name!a} are not whole blocks",
            offset=at,
            found=f"{shape[0]} elements per row of {tensor_type.name}",
            expected=f"a multiple of {tensor_type.block_size}",
        )
    return tensor_type


def _place_tensors(
    cursor: Cursor,
    entries: list[tuple[str, GGMLType, tuple[int, ...], int, int]],
    data_offset: int,
    alignment: int,
) -> tuple[dict[str, TensorInfo], int]:
    """Check that the tensors follow one another within the file; return them and their end."""
    tensors: dict[str, TensorInfo] = {}
    end = data_offset if entries else cursor.pos
    for name, tensor_type, shape, offset, at in entries:
        n_elements = 1
        for size in shape:
            n_elements *= size
        n_bytes = n_elements // tensor_type.block_size * tensor_type.block_bytes
        begin = end + (data_offset - end) % alignment
        if data_offset + offset != begin:
            raise cursor.fail(
                f"wrong offset of tensor {name!a}: {_misplaced(offset, begin, data_offset, end)}",
                offset=at,
                found=offset,
                expected=begin - data_offset,
            )
        end = begin + n_bytes
        if end > cursor.file_bytes:
            raise cursor.fail(
                f"tensor {name!a} reaches past the end of the file",
                offset=begin,
                found=f"{max(0, cursor.file_bytes - begin)} bytes left",
                expected=f"{n_bytes} bytes",
                hint="the file is cut off or damaged; download it again",
            )
        tensors[name] = TensorInfo(name, tensor_type, shape, cursor.path, begin, n_bytes, at)
    return tensors, end


def _misplaced(offset: int, begin: int, data_offset: int, end: int) -> str:
    """Say in which way an offset is wrong."""
    if data_offset + offset < end:
        return "it overlaps the tensor before"
    if data_offset + offset < begin:
        return "it is not aligned"
    return "it leaves a gap or lies past the end"
