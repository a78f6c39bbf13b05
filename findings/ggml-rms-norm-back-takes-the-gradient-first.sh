#!/usr/bin/env bash
# ggml.h says of ggml_rms_norm_back(ctx, a, b, eps): a is x, b is dy. It is the other way round: the
# gradient comes first, the input second, as in ggml_silu_back, whose comment is right. Both tensors
# have one shape, so nothing notices.
#
# Expected by most: the comment at the declaration, the only documentation there is, holds.
# Consequence: a backward pass written after the header gets gradients of plausible size and wrong
# direction; a loss may still fall, since other layers are right.
#
# Seen with the ggml of llama-cpp-python 0.3.36 (include/ggml.h; ggml-cpu/ops.cpp,
# ggml_compute_forward_rms_norm_back_f32). Prints the comment, the true gradient and both orders,
# and exits 0 while the order of the comment is the wrong one.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36
"$work/venv/bin/python" - <<'PYTHON'
import ctypes as c
import importlib.util
import re
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


header = (folder.parents[1] / "include" / "ggml.h").read_text()
comment = re.search(r"// a - (\w+)\s+// b - (\w+)\s+GGML_API[^;]*rms_norm_back\(", header)
said = comment.groups() if comment else ("?", "?")
x, dy, eps = np.array([1, 2, 3, 4], np.float32), np.array([1, 0, 0, 0.5], np.float32), 1e-6
r = 1 / np.sqrt(np.mean(x * x) + eps)
true = dy * r - x * r**3 * np.mean(x * dy)


def back(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array(computed(op("rms_norm_back", tensor(a), tensor(b), c.c_float(eps))))


as_said, reverse = back(x, dy), back(dy, x)
print(f"ggml.h:  a is {said[0]}, b is {said[1]}")
for name, values in {"true": true, "(x, dy)": as_said, "(dy, x)": reverse}.items():
    print(f"{name + ':':8} {np.round(values.astype(float), 4).tolist()}")
right = np.allclose(reverse, true, atol=1e-4) and not np.allclose(as_said, true, atol=0.1)
sys.exit(0 if said == ("x", "dy") and right else 1)
PYTHON
