"""The machine's peak in matrix products: ggml's own MUL_MAT, type by type.

A yardstick, not a part of training. The shapes are the model's, the activations F32, as inference
has them; the fastest type is what a training step is measured against. It calls the ggml that
llama-cpp-python carries, through ctypes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggft.system.errors import ResourceError

GGML_TYPES = {
    "F32": (0, 1),
    "F16": (1, 1),
    "BF16": (30, 1),
    "Q8_0": (8, 32),
    "Q4_0": (2, 32),
    "Q4_1": (3, 32),
    "Q4_K": (12, 256),
    "Q6_K": (14, 256),
}
"""Number and block size of the types that are tried. Source: ggml.h."""
REPEATS = 3
BUFFER_BYTES = 1 << 20
# Bytes of this value are small normal numbers in every type, so that no denormals slow a product.
FILL = 0x11


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _load() -> tuple[Any, Any]:
    """Return (ggml-base, ggml-cpu) with the signatures used here."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ResourceError("llama-cpp-python is not installed", hint="run `make setup`")
    folder = Path(spec.origin).parent / "lib"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    base, cpu = (ctypes.CDLL(str(folder / f"lib{n}.{suffix}")) for n in ("ggml-base", "ggml-cpu"))
    pointer, i64, c_int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, c_int, i64, i64]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_graph_compute_with_ctx.restype = c_int
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, c_int]
    return base, cpu


def _seconds(type_number: int, n_out: int, n_in: int, n_tokens: int, threads: int) -> float:
    """Return the best seconds of W·X, W (n_out, n_in) of a type and X (n_tokens, n_in) of F32."""
    base, cpu = _load()
    # Each run takes a new work buffer from the context, for the converted activations.
    work = 4 * n_tokens * n_in + BUFFER_BYTES
    size = 4 * (n_out * n_in + n_tokens * (n_in + n_out)) + (2 + REPEATS) * work
    context = base.ggml_init(_InitParams(size, None, False))
    if not context:
        raise ResourceError("no memory to measure matrix products", found=f"{size} bytes needed")
    try:
        weight = base.ggml_new_tensor_2d(context, type_number, n_in, n_out)
        x = base.ggml_new_tensor_2d(context, 0, n_in, n_tokens)
        for tensor in (weight, x):
            ctypes.memset(base.ggml_get_data(tensor), FILL, base.ggml_nbytes(tensor))
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, weight, x))
        times = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            if cpu.ggml_graph_compute_with_ctx(context, graph, threads) != 0:
                raise ResourceError("ggml could not compute a matrix product")
            times.append(time.perf_counter() - start)
        return min(times[1:])
    finally:
        base.ggml_free(context)


def measure_peak(
    matrices: Mapping[tuple[int, int], int], n_tokens: int, threads: int
) -> dict[str, float]:
    """Return FLOP/s by type over one block's products.

    Args:
        matrices: How often each (C_out, C_in) occurs.
        n_tokens: Tokens per product.
        threads: CPU threads.
    """
    result = {}
    for name, (number, block) in GGML_TYPES.items():
        if any(n_in % block for _, n_in in matrices):
            continue
        flops = seconds = 0.0
        for (n_out, n_in), count in matrices.items():
            flops += 2.0 * n_out * n_in * n_tokens * count
            seconds += _seconds(number, n_out, n_in, n_tokens, threads) * count
        result[name] = flops / seconds
    return result
