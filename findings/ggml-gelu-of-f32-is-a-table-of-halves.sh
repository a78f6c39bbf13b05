#!/usr/bin/env bash
# ggml_gelu of a 32-bit tensor is not computed in 32 bits on the CPU: the value is rounded to half
# precision, looked up in a table of all 65536 of them, and the answer is half precision, too. The
# same holds for ggml_gelu_quick; ggml_gelu_erf and ggml_silu are computed.
#
# Expected by most: F32 in, F32 out, with some 7 digits between.
# Consequence: GELU models (GPT-2, Phi, Gemma, …) agree with their originals to 3 digits at best;
# a finite difference over a small step is 0 or far too large, so right gradients look wrong.
#
# Seen with the ggml of llama-cpp-python 0.3.36 (ggml-cpu/vec.h, ggml_vec_gelu_f32). Counts the
# different values of functions at 1000 points between 1 and 1.01, prints
#   gelu: 11, gelu_quick: 11, gelu_erf: 1000, silu: 1000
# or about that many, and exits 0 while the first two are stairs.
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


points = tensor(np.linspace(1, 1.01, 1000, dtype=np.float32))
names = ("gelu", "gelu_quick", "gelu_erf", "silu")
counts = {name: len(set(computed(op(name, points)))) for name in names}
print(", ".join(f"{name}: {count}" for name, count in counts.items()))
stairs, smooth = (counts["gelu"], counts["gelu_quick"]), (counts["gelu_erf"], counts["silu"])
sys.exit(0 if max(stairs) < 20 and min(smooth) > 900 else 1)
PYTHON
