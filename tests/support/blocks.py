"""Quantized blocks: every type of ggml, quantized, dequantized, or random.

Quantization is ggml's, through ctypes; dequantization is gguf-py's NumPy where it knows the type,
so that the engine's kernels meet an independent one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggft.engine.quants import TypeTraits
from tests.support.reference import Array


class GGMLType(NamedTuple):
    """A tensor type's number in files, and its block: elements and bytes."""

    number: int
    block: int
    block_bytes: int


TYPES = {
    "F32": GGMLType(0, 1, 4),
    "F16": GGMLType(1, 1, 2),
    "Q4_0": GGMLType(2, 32, 18),
    "Q4_1": GGMLType(3, 32, 20),
    "Q5_0": GGMLType(6, 32, 22),
    "Q5_1": GGMLType(7, 32, 24),
    "Q8_0": GGMLType(8, 32, 34),
    "Q2_K": GGMLType(10, 256, 84),
    "Q3_K": GGMLType(11, 256, 110),
    "Q4_K": GGMLType(12, 256, 144),
    "Q5_K": GGMLType(13, 256, 176),
    "Q6_K": GGMLType(14, 256, 210),
    "IQ2_XXS": GGMLType(16, 256, 66),
    "IQ2_XS": GGMLType(17, 256, 74),
    "IQ3_XXS": GGMLType(18, 256, 98),
    "IQ1_S": GGMLType(19, 256, 50),
    "IQ4_NL": GGMLType(20, 32, 18),
    "IQ3_S": GGMLType(21, 256, 110),
    "IQ2_S": GGMLType(22, 256, 82),
    "IQ4_XS": GGMLType(23, 256, 136),
    "IQ1_M": GGMLType(29, 256, 56),
    "BF16": GGMLType(30, 1, 2),
    "TQ1_0": GGMLType(34, 256, 54),
    "TQ2_0": GGMLType(35, 256, 66),
    "MXFP4": GGMLType(39, 32, 17),
    "NVFP4": GGMLType(40, 64, 36),
    "Q1_0": GGMLType(41, 128, 18),
    "Q2_0": GGMLType(42, 64, 18),
}
"""Every type that ggml 0.25 can quantize to. Source: ggml.h, ggml-common.h."""

SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ3_XXS": (0,),
    "IQ1_S": (0,),
    "IQ1_M": (48,),
    "IQ4_NL": (0,),
    "IQ3_S": (0,),
    "IQ2_S": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
"""Where in a block its F16 scale lies, then its F16 minimum. Source: ggml-common.h."""


@functools.cache
def ggml_base() -> ctypes.CDLL:
    """Load the ggml that llama-cpp-python carries, without importing llama_cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("llama-cpp-python is not installed")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / f"libggml-base.{suffix}"))
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    n = ctypes.c_int64
    for name, arguments, result in (
        ("ggml_quantize_chunk", [ctypes.c_int, pointer, pointer, n, n, n, pointer], size),
        ("ggml_get_type_traits", [ctypes.c_int], ctypes.POINTER(TypeTraits)),
        ("ggml_op_name", [ctypes.c_int], text),
        ("ggml_op_desc", [pointer], text),
        ("ggml_get_name", [pointer], text),
        ("ggml_nbytes", [pointer], size),
        ("ggml_backend_buffer_get_usage", [pointer], ctypes.c_int),
        ("ggml_backend_tensor_set", [pointer, pointer, size, size], None),
        ("gguf_init_from_file", [text, GgufInit], pointer),
        ("gguf_free", [pointer], None),
    ):
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, result
    return library


class GgufInit(ctypes.Structure):
    """`struct gguf_init_params` in gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def quantize(values: Array, type_name: str) -> bytes:
    """Return `values` (rows, columns) in blocks of `type_name`, as ggml quantizes them."""
    info = TYPES[type_name]
    rows, columns = values.shape
    if columns % info.block:
        raise ValueError(f"{columns} columns are no multiple of {type_name}'s {info.block}")
    source = np.ascontiguousarray(values, np.float32)
    if type_name == "F32":
        return source.tobytes()
    out = np.empty(rows * columns // info.block * info.block_bytes, np.uint8)
    importance = np.ones(columns, np.float32)
    written = ggml_base().ggml_quantize_chunk(
        info.number, source.ctypes.data, out.ctypes.data, 0, rows, columns, importance.ctypes.data
    )
    assert written == out.nbytes
    return out.tobytes()


def dequantize(data: bytes, type_name: str, shape: tuple[int, ...]) -> Array:
    """Return the float64 values of blocks: gguf-py's where it knows the type, else ggml's."""
    import gguf

    info = TYPES[type_name]
    raw = np.frombuffer(data, np.uint8)
    if type_name == "F32":
        return raw.view(np.float32).reshape(shape).astype(np.float64)
    try:
        known = gguf.GGMLQuantizationType(info.number)
        return np.asarray(gguf.quants.dequantize(raw, known).reshape(shape), np.float64)
    except (ValueError, NotImplementedError, KeyError):
        out = np.empty(math.prod(shape), np.float32)
        to_float = ggml_base().ggml_get_type_traits(info.number).contents.to_float
        to_float(raw.ctypes.data, out.ctypes.data, out.size)
        return out.reshape(shape).astype(np.float64)


def _with_scales(raw: Array, type_name: str, scales: tuple[Array, ...]) -> Array:
    if type_name == "IQ1_M":  # the scale's four nibbles are the high ones of four 16-bit words
        bits = scales[0].astype("<f2").view("<u2")
        for i in range(4):
            high = raw[:, 49 + 2 * i]
            raw[:, 49 + 2 * i] = (high & 0x0F) | ((bits >> (4 * i) & 0x0F) << 4)
        return raw
    for offset, scale in zip(SCALES[type_name], scales, strict=True):
        raw[:, offset : offset + 2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return raw


@functools.cache
def _unit_scales(type_name: str) -> tuple[float, ...]:
    """Return the scale (and minimum) for which random codes have mean 0 and deviation 1.

    A value is linear in both, so that two dequantizations of the same codes tell.
    """
    info, n = TYPES[type_name], 2048
    raw = np.random.default_rng(0).integers(0, 256, (n, info.block_bytes), np.uint8)

    def values(*scales: float) -> Array:
        arrays = tuple(np.full(n, s, np.float32) for s in scales)
        data = _with_scales(raw.copy(), type_name, arrays).tobytes()
        return dequantize(data, type_name, (n, info.block))

    if len(SCALES[type_name]) == 1:
        return (1.0 / float(values(1.0).std()),)
    of_scale, of_minimum = values(1.0, 0.0), values(0.0, 1.0)
    ratio = -float(of_scale.mean() / of_minimum.mean())
    unit = 1.0 / float((of_scale + ratio * of_minimum).std())
    return (unit, ratio * unit)


def random_blocks(rng: np.random.Generator, type_name: str, n_values: int, std: float) -> bytes:
    """Return `n_values` values with standard deviation `std` and a mean near 0: random codes.

    Needs no quantization, so that gigabytes take seconds, and reaches every code of a type.

    Raises:
        KeyError: a type without an F16 scale of its own (MXFP4, NVFP4).
    """
    if type_name == "F32":
        return (std * rng.standard_normal(n_values, np.float32)).tobytes()
    if type_name in ("F16", "BF16"):
        values = std * rng.standard_normal(n_values, np.float32)
        if type_name == "F16":
            return values.astype("<f2").tobytes()
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    info = TYPES[type_name]
    n = n_values // info.block
    raw = np.frombuffer(rng.bytes(n * info.block_bytes), np.uint8).reshape(n, -1).copy()
    spread = (std * rng.uniform(0.7, 1.3, n)).astype(np.float32)
    return _with_scales(
        raw, type_name, tuple(s * spread for s in _unit_scales(type_name))
    ).tobytes()
