"""Quantizes and dequantizes rows with ggml's own functions, for every type it has.

gguf-py's NumPy versions cannot write K-quants and are slow. These call the library that
llama-cpp-python ships; what its assertions would stop the process at is checked here first.

Source: ggml.h, `ggml_quantize_chunk` and `struct ggml_type_traits`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggft.gguf.read import NOT_WEIGHT_TYPES, GGMLType, TensorInfo, read_array
from ggft.llama.library import load
from ggft.system.errors import InputError, NumericError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# ggml refuses to make these without measured importances of the columns.
NEED_IMPORTANCES = frozenset({GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S})


class TypeTraits(ctypes.Structure):
    """The head of `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def _library() -> Any:
    """Return ggml's base library, which llama.cpp has loaded already."""
    names = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
    path = Path(load().__file__).parent / "lib" / names.get(sys.platform, "libggml-base.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ResourceError(f"ggml cannot be loaded: {error}", hint="make clean setup") from None
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


@functools.cache
def _traits(tensor_type: GGMLType) -> TypeTraits:
    traits: TypeTraits = _library().ggml_get_type_traits(int(tensor_type)).contents
    if (traits.blck_size, traits.type_size) != (tensor_type.block_size, tensor_type.block_bytes):
        raise ResourceError(
            f"the loaded ggml has other {tensor_type.name} blocks than this ggft expects",
            hint="make clean setup",
        )
    return traits


def can_quantize(tensor_type: GGMLType) -> bool:
    """Say whether `quantize_rows` can write a type."""
    return tensor_type not in NOT_WEIGHT_TYPES | NEED_IMPORTANCES


def dequantize_rows(
    data: npt.NDArray[np.uint8], tensor_type: GGMLType, row_length: int
) -> npt.NDArray[np.float32]:
    """Return rows as float32.

    Args:
        data: Whole rows, bytes.
        tensor_type: Their type.
        row_length: Elements per row.

    Returns:
        Shape (n_rows, row_length).
    """
    import numpy as np

    data = np.ascontiguousarray(data)
    n_elements = data.size // tensor_type.block_bytes * tensor_type.block_size
    if tensor_type is GGMLType.F32:
        return data.view(np.float32).reshape(-1, row_length)
    to_float = _traits(tensor_type).to_float
    if not to_float or tensor_type in NOT_WEIGHT_TYPES:
        raise InputError("a type that holds no weights", found=tensor_type.name)
    # The tables of the IQ types are made on first use.
    _library().ggml_quantize_init(int(tensor_type))
    values = np.empty(n_elements, dtype=np.float32)
    to_float(data.ctypes.data, values.ctypes.data, n_elements)
    return values.reshape(-1, row_length)


def read_rows(tensor: TensorInfo, first_row: int, n_rows: int) -> npt.NDArray[np.float32]:
    """Read rows of a tensor as float32, shape (n_rows, row length)."""
    return dequantize_rows(read_array(tensor, first_row, n_rows), tensor.type, tensor.shape[0])


def quantize_rows(values: npt.NDArray[np.float32], tensor_type: GGMLType) -> npt.NDArray[np.uint8]:
    """Return rows in a type.

    Args:
        values: Shape (n_rows, row length); finite; the row length a multiple of the block.
        tensor_type: A type for which `can_quantize` is true.

    Returns:
        Bytes, shape (n_rows, bytes per row).

    Raises:
        NumericError: A value is NaN or infinite.
    """
    import numpy as np

    n_rows, length = values.shape
    if not can_quantize(tensor_type) or length % tensor_type.block_size:
        raise ValueError(f"rows of {length} cannot be written as {tensor_type.name}")
    if not np.isfinite(values).all():
        raise NumericError("NaN or infinity among the values to quantize")
    values = np.ascontiguousarray(values, dtype=np.float32)
    row_bytes = length // tensor_type.block_size * tensor_type.block_bytes
    out = np.empty((n_rows, row_bytes), dtype=np.uint8)
    if tensor_type is GGMLType.F32:
        out[:] = values.view(np.uint8)
        return out
    _traits(tensor_type)
    written = _library().ggml_quantize_chunk(
        int(tensor_type), values.ctypes.data, out.ctypes.data, 0, n_rows, length, None
    )
    if written != out.size:
        raise ResourceError(f"ggml wrote {written} bytes of {tensor_type.name}, not {out.size}")
    return out
