"""Finds NaN and infinity among a tensor's values or the scales of its blocks.

A single such scale turns every result into NaN, so it is refused by tensor and block before a
model is trained, asked, merged, exported or converted. The positions of the scales are data.

Source: the block structs in ggml-common.h of the pinned llama.cpp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.gguf.cursor import read_bytes
from ggft.gguf.read import GGMLType, GGUFFile, TensorInfo, read_array
from ggft.system.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Byte positions of the F16 scales and minima within a block.
F16_SCALES: Mapping[GGMLType, tuple[int, ...]] = {
    GGMLType.F16: (0,),
    GGMLType.Q1_0: (0,),
    GGMLType.Q2_0: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
}
_CHUNK_BYTES = 16 << 20


def first_bad_block(data: npt.NDArray[np.uint8], tensor_type: GGMLType) -> int | None:
    """Return the index of the first block with a NaN or infinite scale, or None.

    Args:
        data: Whole blocks, any shape, C order.
        tensor_type: Their type.
    """
    import numpy as np

    blocks = data.reshape(-1, tensor_type.block_bytes)
    if tensor_type is GGMLType.F32:
        bad = ~np.isfinite(blocks.view(np.float32)[:, 0])
    elif tensor_type is GGMLType.F64:
        bad = ~np.isfinite(blocks.view(np.float64)[:, 0])
    elif tensor_type is GGMLType.BF16:
        bad = (blocks[:, 1] & 0x7F == 0x7F) & (blocks[:, 0] & 0x80 != 0)
    elif tensor_type is GGMLType.MXFP4:
        bad = blocks[:, 0] == 0xFF
    elif tensor_type is GGMLType.IQ1_M:
        # The F16 scale is spread over the upper 4 bits of four 16-bit words; its exponent is in
        # the last word and the lowest two bits of it in the one before.
        bad = (blocks[:, 55] & 0x70 == 0x70) & (blocks[:, 53] & 0xC0 == 0xC0)
    elif tensor_type in F16_SCALES:
        # All exponent bits set, looked up in the upper byte: one strided pass and no conversion.
        bad = np.zeros(len(blocks), dtype=bool)
        for position in F16_SCALES[tensor_type]:
            bad |= blocks[:, position + 1] & 0x7C == 0x7C
    else:
        return None
    return int(bad.argmax()) if bad.any() else None


# Files that this process has found whole, as they then were, with their SHA-256 if it was taken.
_Stamp = tuple[tuple[str, int, int], ...]
_sound: dict[_Stamp, str | None] = {}


def _stamp(file: GGUFFile) -> _Stamp:
    """Return path, size and time of change of a model's files."""
    stats = ((path, path.stat()) for path in file.paths)
    return tuple((str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in stats)


def check_values(file: GGUFFile) -> None:
    """Refuse a model that has NaN or infinity in it; a process reads all of a file once.

    Raises:
        InputError: Names the tensor, the block and its offset.
    """
    stamp = _stamp(file)
    if stamp not in _sound:
        for tensor in file.tensors.values():
            check_tensor_values(tensor)
        _sound[stamp] = None


def check_and_hash(file: GGUFFile) -> None:
    """Do as `check_values`, and take the SHA-256 of the whole file on the same reading.

    Raises:
        InputError: Names the tensor, the block and its offset.
    """
    stamp = _stamp(file)
    if known := _sound.get(stamp):
        file.note_sha256(known)
        return
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher:
        hashed = hasher.submit(digest.update, b"")
        for path in file.paths:
            for tensor, row, data in _read_in_order(file, path):
                hashed.result()
                hashed = hasher.submit(digest.update, data.data)  # while its values are checked
                if tensor is not None:
                    _check_rows(tensor, row, data)
        hashed.result()
    _sound[stamp] = digest.hexdigest()
    file.note_sha256(digest.hexdigest())


def _read_in_order(
    file: GGUFFile, path: Path
) -> Iterator[tuple[TensorInfo | None, int, npt.NDArray[np.uint8]]]:
    """Yield all bytes of one of a model's files: of which tensor, from which row on, and they."""
    at = 0
    tensors = [tensor for tensor in file.tensors.values() if tensor.path == path and tensor.n_bytes]
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        for data in _read_between(path, at, tensor.offset):
            yield None, 0, data
        for row, data in _read_rows(tensor):
            yield tensor, row, data
        at = tensor.offset + tensor.n_bytes
    for data in _read_between(path, at, path.stat().st_size):
        yield None, 0, data


def _read_between(path: Path, start: int, end: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield what stands before, between and behind tensors."""
    for at in range(start, end, _CHUNK_BYTES):
        yield read_bytes(path, at, min(_CHUNK_BYTES, end - at), "metadata")


def _read_rows(tensor: TensorInfo) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield the rows of a tensor in pieces, each with the number of its first row."""
    step = max(1, _CHUNK_BYTES // tensor.row_bytes)
    for row in range(0, tensor.n_rows, step):
        yield row, read_array(tensor, row, min(step, tensor.n_rows - row))


def check_tensor_values(tensor: TensorInfo) -> None:
    """Refuse a tensor that has NaN or infinity in it.

    Raises:
        InputError: Names the tensor, the block and its offset.
    """
    if tensor.n_bytes:
        for row, data in _read_rows(tensor):
            _check_rows(tensor, row, data)


def _check_rows(tensor: TensorInfo, row: int, data: npt.NDArray[np.uint8]) -> None:
    """Refuse rows of a tensor, from number `row` on, with NaN or infinity in them."""
    block = first_bad_block(data, tensor.type)
    if block is not None:
        raise bad_block_error(tensor, block + row * (tensor.row_bytes // tensor.type.block_bytes))


def bad_block_error(tensor: TensorInfo, block: int) -> InputError:
    """Return the error for a block with a NaN or infinite scale."""
    what = "element" if tensor.type.block_size == 1 else "block"
    return InputError(
        f"NaN or infinity in {tensor.name!a}, {what} {block}",
        path=tensor.path,
        offset=tensor.offset + block * tensor.type.block_bytes,
        found=f"a {tensor.type.name} {what} that is not finite",
        expected="finite numbers",
        hint="the file is damaged, or the model diverged in training; download it again",
    )
