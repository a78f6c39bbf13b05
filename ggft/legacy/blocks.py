"""Block layouts of old GGML files: what the bytes mean, and how they become today's blocks.

A layout that a current type can hold is *repacked*: the codes are moved, never requantized, and
only scales are rounded from F32 to F16. What no current type holds is *unpacked* to numbers.

Values are d·(q − offset) or d·q + m. Nibbles stand in one of two orders: "pairs", byte j holds
elements 2j and 2j + 1, or "halves", byte j holds j and j + half a block. The fifth bits (qh) are in
element order in both.

Source: ggml.c and k_quants.h of llama.cpp, March to August 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggft.gguf.types import GGMLType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockLayout:
    """How a block of an old type is stored.

    Attributes:
        name: The type's name of its time.
        block_size: Elements per block.
        block_bytes: Bytes per block.
        target: The current type that can hold the codes; None if there is none.
        copies: The bytes are the same as the target's.
        scale_bytes: 4 for F32 scales, 2 for F16.
        has_min: A minimum follows the scale: d·q + m.
        has_high_bits: Four bytes of fifth bits follow.
        pairs: The nibbles' order; else halves.
        planar: Minima, scales and codes of a whole row stand apart.
        is_block_64: A K-quant with 64-element blocks.
    """

    name: str
    block_size: int
    block_bytes: int
    target: GGMLType | None
    copies: bool = False
    scale_bytes: int = 4
    has_min: bool = False
    has_high_bits: bool = False
    pairs: bool = False
    planar: bool = False
    is_block_64: bool = False

    @property
    def label(self) -> str:
        """Return the name with what distinguishes it from today's type of that name."""
        marks = []
        if self.planar:
            marks.append("planar")
        if self.is_block_64:
            marks.append("64-element blocks")
        if not self.copies and self.target is not None and self.scale_bytes == 4:
            marks.append("F32 scales")
        if self.pairs:
            marks.append("paired nibbles")
        return f"{self.name} ({', '.join(marks)})" if marks else self.name


def _same(target: GGMLType) -> BlockLayout:
    return BlockLayout(target.name, target.block_size, target.block_bytes, target, copies=True)


Q4_1_PLANAR = BlockLayout("Q4_1", 32, 24, GGMLType.Q4_1, has_min=True, pairs=True, planar=True)
_OLD: Mapping[int, BlockLayout] = {
    0: _same(GGMLType.F32),
    1: _same(GGMLType.F16),
    2: BlockLayout("Q4_0", 32, 20, GGMLType.Q4_0, pairs=True),
    3: BlockLayout("Q4_1", 32, 24, GGMLType.Q4_1, has_min=True, pairs=True),
}
_V1: Mapping[int, BlockLayout] = {
    **_OLD,
    4: BlockLayout("Q4_2", 16, 10, None, scale_bytes=2, pairs=True),
    5: BlockLayout("Q4_3", 16, 12, None, scale_bytes=2, has_min=True, pairs=True),
    6: BlockLayout("Q5_0", 32, 22, GGMLType.Q5_0, scale_bytes=2, has_high_bits=True, pairs=True),
    7: BlockLayout(
        "Q5_1",
        32,
        24,
        GGMLType.Q5_1,
        scale_bytes=2,
        has_min=True,
        has_high_bits=True,
        pairs=True,
    ),
    8: BlockLayout("Q8_0", 32, 36, GGMLType.Q8_0),
}
_V2: Mapping[int, BlockLayout] = {
    0: _same(GGMLType.F32),
    1: _same(GGMLType.F16),
    2: BlockLayout("Q4_0", 32, 20, GGMLType.Q4_0),
    3: BlockLayout("Q4_1", 32, 24, GGMLType.Q4_1, has_min=True),
    6: _same(GGMLType.Q5_0),
    7: _same(GGMLType.Q5_1),
    8: BlockLayout("Q8_0", 32, 36, GGMLType.Q8_0),
}
_V3: Mapping[int, BlockLayout] = {
    number: _same(GGMLType(number)) for number in (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14)
}
_V3_BLOCK_64: Mapping[int, BlockLayout] = {
    **_V3,
    10: BlockLayout("Q2_K", 64, 24, None, scale_bytes=2, is_block_64=True),
    11: BlockLayout("Q3_K", 64, 28, None, scale_bytes=2, is_block_64=True),
    12: BlockLayout("Q4_K", 64, 38, GGMLType.Q4_1, scale_bytes=2, is_block_64=True),
    13: BlockLayout("Q5_K", 64, 46, None, scale_bytes=2, is_block_64=True),
    14: BlockLayout("Q6_K", 64, 54, None, scale_bytes=2, is_block_64=True),
}


def block_layout(
    type_number: int, container: str, version: int, block_64: bool
) -> BlockLayout | None:
    """Return the layout of a tensor type in a container, or None if it had no such type."""
    if container in ("ggml", "ggmf"):
        return _OLD.get(type_number)
    if version == 1:
        return _V1.get(type_number)
    if version == 2:
        return _V2.get(type_number)
    return (_V3_BLOCK_64 if block_64 else _V3).get(type_number)


@dataclass(frozen=True)
class ScaleLoss:
    """What rounding scales to F16 did.

    Attributes:
        worst: Largest relative error of a scale; infinite when one overflowed.
        n_subnormal: Scales that became F16 subnormals, or zero.
        bad_block: Index of a block whose scale is NaN, infinite or overflows; None if all are fine.
    """

    worst: float = 0.0
    n_subnormal: int = 0
    bad_block: int | None = None


def to_blocks(rows: Bytes, layout: BlockLayout) -> Bytes:
    """Cut rows into blocks.

    Args:
        rows: Shape (n_rows, bytes per row).
        layout: Their layout; planar rows are gathered block by block.

    Returns:
        Shape (number of blocks, block_bytes).
    """
    import numpy as np

    if not layout.planar:
        return rows.reshape(-1, layout.block_bytes)
    n_rows = len(rows)
    n = rows.shape[1] // layout.block_bytes
    out = np.empty((n_rows, n, layout.block_bytes), dtype=np.uint8)
    out[:, :, 4:8] = rows[:, : 4 * n].reshape(n_rows, n, 4)
    out[:, :, 0:4] = rows[:, 4 * n : 8 * n].reshape(n_rows, n, 4)
    out[:, :, 8:] = rows[:, 8 * n :].reshape(n_rows, n, 16)
    return out.reshape(-1, layout.block_bytes)


def repack(blocks: Bytes, layout: BlockLayout) -> tuple[Bytes, ScaleLoss]:
    """Turn blocks into the target's blocks without touching their codes.

    Args:
        blocks: Shape (n, block_bytes).
        layout: Their layout; its target is not None.

    Returns:
        The target's blocks, shape (n', target.block_bytes), and what rounding the scales did.
    """
    import numpy as np

    target = layout.target
    if target is None:
        raise ValueError(f"{layout.label} has no current type")
    if layout.copies:
        return blocks, ScaleLoss()
    if layout.is_block_64:
        return _repack_q4_k_64(blocks)
    n_scales = 2 if layout.has_min else 1
    scales = np.ascontiguousarray(blocks[:, : n_scales * layout.scale_bytes])
    loss = ScaleLoss()
    if layout.scale_bytes == 4:
        halves, loss = _round_scales(scales.view(np.float32))
        scales = halves.view(np.uint8)
    out = np.empty((len(blocks), target.block_bytes), dtype=np.uint8)
    at = 2 * n_scales
    out[:, :at] = scales
    codes = blocks[:, n_scales * layout.scale_bytes :]
    if layout.has_high_bits:
        out[:, at : at + 4] = codes[:, :4]
        at += 4
        codes = codes[:, 4:]
    if layout.pairs:
        # Elements 0–15 stand in the first 8 bytes, 16–31 in the last 8.
        first, last = codes[:, :8], codes[:, 8:]
        out[:, at::2] = (first & 0x0F) | (last << 4)
        out[:, at + 1 :: 2] = (first >> 4) | (last & 0xF0)
    else:
        out[:, at:] = codes
    return out, loss


def _round_scales(scales: Floats) -> tuple[npt.NDArray[np.float16], ScaleLoss]:
    """Round scales to F16.

    Args:
        scales: Shape (n, scales per block).
    """
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        halves = scales.astype(np.float16)
    finite = np.isfinite(halves)
    if not finite.all():
        return halves, ScaleLoss(float("inf"), 0, int((~finite.all(axis=1)).argmax()))
    exact = np.abs(scales)
    error = np.abs(halves.astype(np.float32) - scales)
    nonzero = exact > 0
    worst = float((error[nonzero] / exact[nonzero]).max()) if nonzero.any() else 0.0
    smallest_normal = float(np.finfo(np.float16).smallest_normal)
    return halves, ScaleLoss(worst, int((nonzero & (exact < smallest_normal)).sum()))


def _repack_q4_k_64(blocks: Bytes) -> tuple[Bytes, ScaleLoss]:
    """Turn 64-element Q4_K blocks into two Q4_1 blocks each: m is −dmin times its 4-bit factor."""
    import numpy as np

    d, dmin, factors, minima, codes = _q4_k_64_fields(blocks)
    scales = np.stack([d * factors, -dmin * minima], axis=-1)  # (n, 2, 2)
    halves, loss = _round_scales(scales.reshape(-1, 2))
    if loss.bad_block is not None:
        loss = ScaleLoss(loss.worst, loss.n_subnormal, loss.bad_block // 2)
    out = np.empty((len(blocks), 2, 20), dtype=np.uint8)
    out[:, :, :4] = halves.view(np.uint8).reshape(-1, 2, 4)
    out[:, 0, 4:] = (codes[:, :16] & 0x0F) | (codes[:, 16:] << 4)
    out[:, 1, 4:] = (codes[:, :16] >> 4) | (codes[:, 16:] & 0xF0)
    return out.reshape(-1, 20), loss


def _q4_k_64_fields(blocks: Bytes) -> tuple[Floats, Floats, Floats, Floats, Bytes]:
    """Return d and dmin (n, 1), the two 4-bit factors of each (n, 2), and the codes (n, 32)."""
    import numpy as np

    pair = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32)
    packed = blocks[:, 4:6]
    factors = (packed & 0x0F).astype(np.float32)
    minima = (packed >> 4).astype(np.float32)
    return pair[:, :1], pair[:, 1:], factors, minima, blocks[:, 6:]


def unpack(blocks: Bytes, layout: BlockLayout) -> Floats:
    """Return the numbers that blocks stand for, exactly as the programs of their time did.

    Args:
        blocks: Shape (n, block_bytes).
        layout: Their layout; not one of today's quantized types.

    Returns:
        Shape (n, block_size).
    """
    import numpy as np

    if layout.is_block_64:
        return _unpack_64(blocks, layout)
    if layout.copies and layout.block_size == 1:
        dtype = np.float32 if layout.block_bytes == 4 else np.float16
        return np.ascontiguousarray(blocks).view(dtype).astype(np.float32)
    n_scales = 2 if layout.has_min else 1
    dtype = np.float32 if layout.scale_bytes == 4 else np.float16
    raw = np.ascontiguousarray(blocks[:, : n_scales * layout.scale_bytes])
    scales = raw.view(dtype).astype(np.float64)
    codes = _codes(blocks[:, n_scales * layout.scale_bytes :], layout)
    # In float64 both steps are exact enough to give what a fused multiply-add in float32 gave.
    values = scales[:, :1] * codes
    if layout.has_min:
        values += scales[:, 1:]
    return values.astype(np.float32)


def _codes(data: Bytes, layout: BlockLayout) -> npt.NDArray[np.float64]:
    """Return the codes of blocks in element order, less their offset, shape (n, block_size)."""
    import numpy as np

    if layout.name == "Q8_0":
        return data.view(np.int8).astype(np.float64)
    high = None
    if layout.has_high_bits:
        high = np.unpackbits(data[:, :4], axis=1, bitorder="little")
        data = data[:, 4:]
    if layout.pairs:
        codes = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(len(data), -1)
    else:
        codes = np.concatenate([data & 0x0F, data >> 4], axis=1)
    if high is not None:
        codes = codes | high << 4
    offset = 0 if layout.has_min else 16 if layout.has_high_bits else 8
    return codes.astype(np.float64) - offset


def _unpack_64(blocks: Bytes, layout: BlockLayout) -> Floats:
    """Return the numbers of 64-element K-quant blocks, shape (n, 64)."""
    import numpy as np

    n = len(blocks)
    codes: Floats
    if layout.name == "Q4_K":
        d, dmin, factors, minima, nibbles = _q4_k_64_fields(blocks)
        low_high = np.stack([nibbles & 0x0F, nibbles >> 4], axis=1).astype(np.float32)
        return ((d * factors)[:, :, None] * low_high - (dmin * minima)[:, :, None]).reshape(n, 64)
    if layout.name == "Q2_K":
        pair = np.ascontiguousarray(blocks[:, 20:24]).view(np.float16).astype(np.float32)
        d, dmin, packed = pair[:, :1], pair[:, 1:], blocks[:, :4]
        codes = _planes(blocks[:, 4:20], 2).astype(np.float32)  # (n, 4, 16)
        factors = d * (packed & 0x0F).astype(np.float32)
        minima = dmin * (packed >> 4).astype(np.float32)
        return (factors[:, :, None] * codes - minima[:, :, None]).reshape(n, 64)
    d = np.ascontiguousarray(blocks[:, _D_64[layout.name]]).view(np.float16).astype(np.float32)
    if layout.name == "Q3_K":
        packed = blocks[:, 24:26]
        nibbles = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(n, 4)
        scales = nibbles.astype(np.float32) - 8
        # Bit 2k + i of mask byte l belongs to element 16k + 8i + l; a clear bit subtracts 4.
        high = _planes(blocks[:, :8], 1).reshape(n, 4, 16)
        codes = _planes(blocks[:, 8:24], 2).astype(np.float32) + 4 * high.astype(np.float32) - 4
    elif layout.name == "Q5_K":
        scales = blocks[:, 2:6].view(np.int8).astype(np.float32)
        high = _planes(blocks[:, 6:14], 1).reshape(n, 4, 16)
        low = np.concatenate([blocks[:, 14:] & 0x0F, blocks[:, 14:] >> 4], axis=1)
        codes = (low.reshape(n, 4, 16) | high << 4).astype(np.float32) - 16
    else:
        scales = blocks[:, 48:52].view(np.int8).astype(np.float32)
        high = _planes(blocks[:, 32:48], 2)
        low = np.concatenate([blocks[:, :32] & 0x0F, blocks[:, :32] >> 4], axis=1)
        codes = (low.reshape(n, 4, 16) | high << 4).astype(np.float32) - 32
    return ((d * scales)[:, :, None] * codes).reshape(n, 64)


# Where the F16 scale of a 64-element block stands.
_D_64 = {"Q3_K": slice(26, 28), "Q5_K": slice(0, 2), "Q6_K": slice(52, 54)}


def _planes(data: Bytes, n_bits: int) -> Bytes:
    """Return the n_bits-wide fields of bytes, lowest first, shape (n, 8 / n_bits, bytes)."""
    import numpy as np

    shifts = np.arange(0, 8, n_bits, dtype=np.uint8)[None, :, None]
    planes: Bytes = (data[:, None, :] >> shifts) & np.uint8((1 << n_bits) - 1)
    return planes
