"""Reads and writes safetensors files: a length, a JSON header, and the tensors' data.

The whole file is described by its header; what it leaves out, describes twice or places beyond the
end is refused.

Source of the format: the safetensors README.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ggft.gguf.cursor import read_bytes
from ggft.system.errors import InputError
from ggft.system.files import atomic_output, require_regular_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float32]

MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class SafeTensor:
    """A tensor in a file; `shape` in NumPy's order."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> FloatArray:
        """Return its values as float32."""
        import numpy as np

        n_bytes = math.prod(self.shape) * _SIZES[self.dtype]
        raw = read_bytes(self.path, self.offset, n_bytes, f"tensor {self.name!a}")
        if self.dtype == "F32":
            values = raw.view("<f4")
        elif self.dtype == "F16":
            values = raw.view("<f2").astype(np.float32)
        else:
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(values.reshape(self.shape), dtype=np.float32)


def read_safetensors(path: Path) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """Return the tensors of a file in the order of their data, and its metadata.

    Raises:
        InputError: The header is no header, or does not describe the file.
    """
    file_bytes = require_regular_file(path)
    if file_bytes < 8:
        raise InputError("not a safetensors file", path=path, found=f"{file_bytes} bytes")
    (length,) = struct.unpack("<Q", read_bytes(path, 0, 8, "the header's length").tobytes())
    limit = min(file_bytes - 8, MAX_HEADER_BYTES)
    if length > limit:
        raise InputError(
            "the header is longer than the file can hold",
            path=path, offset=0, found=length, expected=f"at most {limit}",
        )  # fmt: skip
    header = _parse_header(path, read_bytes(path, 8, length, "the header").tobytes())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("__metadata__ is not text by name", path=path, offset=8)
    begin = 8 + length
    tensors = [_tensor(path, name, entry, begin) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor[0].offset)
    end = begin
    for tensor, last in tensors:
        if tensor.offset != end:
            raise InputError(
                f"the data of {tensor.name!a} overlap or leave a hole",
                path=path, offset=tensor.offset, found=tensor.offset, expected=end,
            )  # fmt: skip
        end = last
    if end != file_bytes:
        raise InputError(
            "the tensors do not end where the file ends",
            path=path, found=f"{file_bytes} bytes", expected=f"{end}",
            hint="the file is cut off or damaged; copy it again",
        )  # fmt: skip
    return {tensor.name: tensor for tensor, _ in tensors}, metadata


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header is not JSON: {error}", path=path, offset=8) from None
    if not isinstance(header, dict):
        raise InputError("the header is not a JSON object", path=path, offset=8)
    return header


def _tensor(path: Path, name: str, entry: Any, begin: int) -> tuple[SafeTensor, int]:
    """Check one entry; return its tensor and where its data end."""

    def fail(what: str, found: object, expected: str) -> InputError:
        return InputError(
            f"tensor {name!a} has {what}", path=path, found=ascii(found)[:80], expected=expected
        )

    if not isinstance(entry, dict):
        raise fail("no description", entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in _SIZES:
        raise fail("a type that is not read here", dtype, ", ".join(_SIZES))
    if not _are_sizes(shape) or len(shape) > 8:
        raise fail("no usable shape", shape, "whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise fail("no usable data_offsets", offsets, "two whole numbers")
    first, last = offsets
    n_bytes = math.prod(shape) * _SIZES[dtype]
    if last - first != n_bytes:
        raise fail("data_offsets that contradict its shape", offsets, f"{n_bytes} bytes")
    return SafeTensor(path, name, dtype, tuple(shape), begin + first), begin + last


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 40 for n in value
    )


def write_safetensors(
    path: Path, tensors: Mapping[str, FloatArray], metadata: Mapping[str, str]
) -> None:
    """Write float32 tensors whole or not at all.

    Raises:
        InputError: The path cannot be used.
        ResourceError: It cannot be written.
    """
    import numpy as np

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.size * _SIZES["F32"]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with (
        atomic_output(path, expected_bytes=8 + len(text) + end) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, dtype="<f4").data.cast("B"))
