#!/usr/bin/env bash
# ggml repeats heads in two ways. A product of matrices with fewer key heads than query heads pairs
# them in groups: keys 0, 0, 1, 1. Every other operation that spreads a smaller tensor over a larger
# one (repeat, add, mul, …) lays it like tiles: 0, 1, 0, 1.
#
# Expected by most: one rule of broadcasting; repeating the keys first and multiplying then is the
# same as multiplying at once.
# Consequence: grouped-query attention that writes the repetition out with ggml_repeat runs, has
# the right shapes, and asks the wrong keys; so does a scale per key head applied to queries.
#
# Seen with the ggml of llama-cpp-python 0.3.36 (ggml-cpu: ops.cpp, ggml-cpu.c). Two key heads of
# values 1 and 10 meet four query heads of 1. Prints
#   mul_mat(k, q):                [1.0, 1.0, 10.0, 10.0]
#   mul_mat(repeat(k to q), q):   [1.0, 10.0, 1.0, 10.0]
#   mul(q, k):                    [1.0, 10.0, 1.0, 10.0]
# and exits 0 while that is so.
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


keys = tensor(np.array([1, 10], np.float32).reshape(2, 1, 1))
queries = tensor(np.ones((4, 1, 1), np.float32))
rows = {
    "mul_mat(k, q)": computed(op("mul_mat", keys, queries)),
    "mul_mat(repeat(k to q), q)": computed(op("mul_mat", op("repeat", keys, queries), queries)),
    "mul(q, k)": computed(op("mul", queries, keys)),
}
for name, row in rows.items():
    print(f"{name + ':':29} {row}")
groups, tiles = [1.0, 1.0, 10.0, 10.0], [1.0, 10.0, 1.0, 10.0]
sys.exit(0 if list(rows.values()) == [groups, tiles, tiles] else 1)
PYTHON
