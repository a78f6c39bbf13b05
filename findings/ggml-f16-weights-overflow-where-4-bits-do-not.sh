#!/usr/bin/env bash
# A product of F16 weights and F32 activations is computed on the CPU with the activations rounded
# to F16 first. One above 65504 becomes infinite, and the result infinite or NaN. The same weights
# as F32, BF16, Q8_0 and Q4_0 give the right answer.
#
# Expected by most: the product of F16 and F32 is one of F32, and F16 never does worse than 4 bits.
# Consequence: a model with large outliers in its activations answers nonsense as F16 and works when
# it is quantized; a fine-tune through the F16 weights diverges at such a token.
#
# Seen with the ggml of llama-cpp-python 0.3.36 (ggml-cpu.c, vec_dot_type of GGML_TYPE_F16). All
# weights are 0.5; the activations are 100000, -100000 and 6, so the result is 3. Prints
#   F32: 3, BF16: 3, Q8_0: 3, Q4_0: 3, F16: nan
# and exits 0 while F16 alone is not finite.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36
"$work/venv/bin/python" - <<'PYTHON'
import ctypes as c
import importlib.util
import sys
from pathlib import Path

import numpy as np

folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
base, cpu = (c.CDLL(str(folder / f"libggml-{x}.so"), c.RTLD_GLOBAL) for x in ("base", "cpu"))


class Params(c.Structure):
    _fields_ = [("size", c.c_size_t), ("buffer", c.c_void_p), ("no_alloc", c.c_bool)]


base.ggml_init.argtypes, base.ggml_init.restype = [Params], c.c_void_p
base.ggml_get_data.restype, base.ggml_nelements.restype = c.c_void_p, c.c_int64
context = c.c_void_p(base.ggml_init(Params(1 << 24, None, False)))


def op(name: str, *args: object) -> c.c_void_p:
    function = getattr(base, f"ggml_{name}")
    function.restype = c.c_void_p
    return c.c_void_p(function(context, *args))


def tensor(values: np.ndarray, kind: int = 0) -> c.c_void_p:
    values = np.ascontiguousarray(values)
    made = op("new_tensor", kind, values.ndim, (c.c_int64 * 4)(*values.shape[::-1]))
    c.memmove(base.ggml_get_data(made), values.ctypes.data, values.nbytes)
    return made


def computed(node: c.c_void_p, kind: type = c.c_float) -> list:
    graph = op("new_graph")
    base.ggml_build_forward_expand(graph, node)
    cpu.ggml_graph_compute_with_ctx(context, graph, 1)
    return list((kind * base.ggml_nelements(node)).from_address(base.ggml_get_data(node)))


F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
weights = np.full((1, 64), 0.5, np.float32)
activations = np.zeros((1, 64), np.float32)
activations[0, [0, 1, 32]] = 1e5, -1e5, 6  # the last in a block of its own


def stored(kind: int) -> c.c_void_p:
    made = op("new_tensor", kind, 2, (c.c_int64 * 2)(64, 1))
    data = c.c_void_p(base.ggml_get_data(made))
    source, none = c.c_void_p(weights.ctypes.data), c.c_void_p()
    rows = (c.c_int64(0), c.c_int64(1), c.c_int64(64))
    base.ggml_quantize_chunk(kind, source, data, *rows, none)
    return made


kinds = {"F32": F32, "BF16": BF16, "Q8_0": Q8_0, "Q4_0": Q4_0, "F16": F16}
results = {n: computed(op("mul_mat", stored(k), tensor(activations)))[0] for n, k in kinds.items()}
print(", ".join(f"{name}: {value:.3g}" for name, value in results.items()))
wrong = [name for name, value in results.items() if not abs(value - 3) < 0.01]
sys.exit(0 if wrong == ["F16"] and not np.isfinite(results["F16"]) else 1)
PYTHON
