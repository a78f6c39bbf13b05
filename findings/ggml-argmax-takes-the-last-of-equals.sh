#!/usr/bin/env bash
# Of equal values ggml_argmax returns the last, while llama.cpp's greedy sampler, ggml_argsort and
# NumPy choose the first.
#
# Expected by most: the index of the first maximum, as everywhere; the most probable token is the
# same whichever part of llama.cpp looks for it.
# Consequence: greedy decoding in the graph and by the sampler part ways at a tie, which quantized
# and half-precision logits do have; a row of equal logits gives the last token of the vocabulary.
#
# Seen with llama-cpp-python 0.3.36 (ggml-cpu/vec.h, ggml_vec_argmax_f32; src/llama-sampler.cpp).
# Prints the choices among 1, 3, 3 and 2:
#   ggml_argmax 2, ggml_argsort 1, greedy sampler 1, NumPy 1
# and exits 0 while the first alone differs.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36
"$work/venv/bin/python" - <<'PYTHON'
import ctypes as c
import importlib.util
import sys
from pathlib import Path

import llama_cpp
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


values = np.array([[1, 3, 3, 2]], np.float32)
DESCENDING = 1
data = (llama_cpp.llama_token_data * 4)(*((i, float(x), 0.0) for i, x in enumerate(values[0])))
candidates = llama_cpp.llama_token_data_array(data, 4, -1, False)
sampler = llama_cpp.llama_sampler_init_greedy()
llama_cpp.llama_sampler_apply(sampler, c.byref(candidates))
llama_cpp.llama_sampler_free(sampler)
choices = {
    "ggml_argmax": computed(op("argmax", tensor(values)), c.c_int32)[0],
    "ggml_argsort": computed(op("argsort", tensor(values), DESCENDING), c.c_int32)[0],
    "greedy sampler": data[candidates.selected].id,
    "NumPy": int(values.argmax()),
}
print(", ".join(f"{name} {choice}" for name, choice in choices.items()))
sys.exit(0 if list(choices.values()) == [2, 1, 1, 1] else 1)
PYTHON
