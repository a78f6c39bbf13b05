"""Reads GGUF files: the one door through which every command sees a model or an adapter.

`read_gguf` checks the file (or all shards of a split model) before any native code sees it;
`check_model` then checks hyper-parameters and vocabulary against the tensors; `read_array` and
`dequantize` give the data, a few rows at a time where asked. Only these two need NumPy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.gguf.architectures import SUPPORTED_ARCHITECTURES
from ggft.gguf.cursor import read_bytes
from ggft.gguf.header import read_header
from ggft.gguf.hparams import DecoderInfo, ModelInfo, as_decoder, check_decoder, check_model
from ggft.gguf.types import (
    NOT_WEIGHT_TYPES,
    GGMLType,
    GGUFFile,
    StringArray,
    TensorInfo,
    Value,
    ValueType,
)
from ggft.system.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "NOT_WEIGHT_TYPES",
    "SUPPORTED_ARCHITECTURES",
    "DecoderInfo",
    "GGMLType",
    "GGUFFile",
    "ModelInfo",
    "StringArray",
    "TensorInfo",
    "Value",
    "ValueType",
    "as_decoder",
    "check_decoder",
    "check_model",
    "dequantize",
    "read_array",
    "read_gguf",
]

MAX_SHARDS = 99999
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def read_gguf(path: str | Path) -> GGUFFile:
    """Read and check a GGUF file; given one shard of a split model, read all of them.

    Raises:
        InputError: The file cannot be used; says where, what was found and what was expected.
    """
    file = read_header(Path(path))
    if "split.count" not in file.metadata:
        return file
    count = _split_value(file, "split.count", 1, MAX_SHARDS)
    return file if count == 1 else _read_shards(file, count)


def _split_value(file: GGUFFile, key: str, low: int, high: int) -> int:
    """Return a whole number that describes the splitting."""
    value = file.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise InputError(
        f"bad {key}",
        path=file.path,
        offset=file.value_offsets.get(key),
        found="nothing" if value is None else ascii(value)[:80],
        expected=f"a whole number from {low} to {high}",
    )


def _read_shards(given: GGUFFile, count: int) -> GGUFFile:
    """Read all shards of the model to which `given` belongs, and join them."""
    match = _SHARD_NAME.fullmatch(given.path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            "one shard of a split model, but its name does not lead to the others",
            path=given.path,
            found=ascii(given.path.name),
            expected=f"NAME-00001-of-{count:05}.gguf",
            hint="give the shards their original names",
        )
    names = (f"{match[1]}-{i + 1:05}-of-{count:05}.gguf" for i in range(count))
    shards = [_read_shard(given, name, i, count) for i, name in enumerate(names)]
    first = shards[0]
    return GGUFFile(
        path=first.path,
        paths=tuple(shard.path for shard in shards),
        version=first.version,
        alignment=first.alignment,
        metadata=first.metadata,
        types=first.types,
        tensors=_join_tensors(shards),
        data_offset=first.data_offset,
        warnings=tuple(w for shard in shards for w in shard.warnings),
        value_offsets=first.value_offsets,
    )


def _read_shard(given: GGUFFile, name: str, number: int, count: int) -> GGUFFile:
    """Read shard `number` of `count`, counted from 0, unless it is the given one."""
    path = given.path.with_name(name)
    if not path.exists():
        raise InputError(
            f"shard {number + 1} of {count} is missing",
            path=path,
            found="no such file",
            expected=path.name,
            hint="download all shards into one folder",
        )
    shard = given if path == given.path else read_header(path)
    for key, expected in (("split.no", number), ("split.count", count)):
        found = _split_value(shard, key, 0, MAX_SHARDS)
        if found != expected:
            raise InputError(
                f"wrong {key}: a shard repeated or of another model",
                path=path,
                offset=shard.value_offsets[key],
                found=found,
                expected=expected,
            )
    return shard


def _join_tensors(shards: list[GGUFFile]) -> dict[str, TensorInfo]:
    """Return the tensors of all shards, each of which must be in one only."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise InputError(
                    f"tensor {name!a} is in two shards",
                    path=shard.path,
                    offset=tensor.header_offset,
                    found=f"also in {tensors[name].path.name}",
                    expected="each tensor once",
                )
            tensors[name] = tensor
    first = shards[0]
    if "split.tensors.count" in first.metadata:
        expected = _split_value(first, "split.tensors.count", 0, 1 << 31)
        if expected != len(tensors):
            raise InputError(
                "the shards do not hold all tensors",
                path=first.path,
                offset=first.value_offsets["split.tensors.count"],
                found=f"{len(tensors)} tensors",
                expected=f"{expected}",
            )
    return tensors


def read_array(
    tensor: TensorInfo, first_row: int = 0, n_rows: int | None = None
) -> npt.NDArray[np.uint8]:
    """Read rows of a tensor as they stand in the file.

    Args:
        tensor: Which tensor.
        first_row: The first row; rows are counted over all higher dimensions.
        n_rows: How many rows; None for all that follow.

    Returns:
        Bytes, shape (n_rows, bytes per row).

    Raises:
        InputError: The file became shorter, or cannot be read.
    """
    rows = tensor.n_rows - first_row if n_rows is None else n_rows
    offset = tensor.offset + first_row * tensor.row_bytes
    data = read_bytes(tensor.path, offset, rows * tensor.row_bytes, f"tensor {tensor.name!a}")
    return data.reshape(rows, tensor.row_bytes)


def dequantize(
    tensor: TensorInfo, first_row: int = 0, n_rows: int | None = None
) -> npt.NDArray[np.float32]:
    """Return rows of a tensor as float32.

    Args:
        tensor: Which tensor.
        first_row: The first row; rows are counted over all higher dimensions.
        n_rows: How many rows; None for all that follow.

    Returns:
        Values in NumPy's order, the row length last: the tensor's reversed shape when the whole
        tensor is asked for, else (n_rows, row length).

    Raises:
        InputError: The file ends before the data does, or the type holds no weights.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    if tensor.type in NOT_WEIGHT_TYPES:
        raise InputError(
            f"tensor {tensor.name!a} holds no weights",
            path=tensor.path,
            offset=tensor.header_offset,
            found=tensor.type.name,
        )
    data = read_array(tensor, first_row, n_rows)
    if tensor.type is GGMLType.F32:
        values = data.view(np.float32)
    elif tensor.type is GGMLType.F16:
        values = data.view(np.float16).astype(np.float32)
    else:
        values = quants.dequantize(data, GGMLQuantizationType(int(tensor.type)))
    if first_row == 0 and n_rows is None:
        values = values.reshape(tensor.shape[::-1])
    return np.ascontiguousarray(values, dtype=np.float32)
