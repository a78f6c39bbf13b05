#!/usr/bin/env bash
# The node that ggml_cast makes is its own second source: it is a CPY whose `src[1]` is the CPY
# itself. Whoever walks a graph by its sources (to sort it, to differentiate it, to draw it) never
# ends, unless visited nodes are remembered before their sources are followed.
#
# Expected by most: a graph of operations has no circle; a cast has one source.
#
# Seen with the ggml of llama-cpp-python 0.3.36 (ggml.c, ggml_cast). Prints
#   CPY: src[0] is the input, src[1] is the node itself
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

origin = importlib.util.find_spec("llama_cpp").origin
suffix = "dylib" if sys.platform == "darwin" else "so"
base = c.CDLL(str(Path(origin).parent / "lib" / f"libggml-base.{suffix}"))


class InitParams(c.Structure):
    _fields_ = [("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool)]


class Tensor(c.Structure):  # ggml.h, struct ggml_tensor
    _fields_ = [
        ("type", c.c_int), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4),
        ("op", c.c_int), ("op_params", c.c_int32 * 16), ("flags", c.c_int32),
        ("src", c.POINTER(None) * 10),
    ]


base.ggml_init.argtypes, base.ggml_init.restype = [InitParams], c.c_void_p
base.ggml_new_tensor_1d.argtypes = [c.c_void_p, c.c_int, c.c_int64]
base.ggml_new_tensor_1d.restype = c.c_void_p
base.ggml_cast.argtypes, base.ggml_cast.restype = [c.c_void_p, c.c_void_p, c.c_int], c.c_void_p
base.ggml_op_name.argtypes, base.ggml_op_name.restype = [c.c_int], c.c_char_p
F32, F16 = 0, 1
context = base.ggml_init(InitParams(1 << 20, None, False))
source = base.ggml_new_tensor_1d(context, F32, 8)
address = base.ggml_cast(context, source, F16)
node = Tensor.from_address(address)
name = base.ggml_op_name(node.op).decode()
circle = name == "CPY" and node.src[0] == source and node.src[1] == address
print(f"{name}: src[0] is the input, src[1] is " + ("the node itself" if circle else "not it"))
sys.exit(0 if circle else 1)
PYTHON
