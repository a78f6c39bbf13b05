#!/usr/bin/env bash
# An importance matrix in which every column is equally important does not quantize as none does.
# ggml chooses another search for the scales when it is given any: the error of Q4_1 and Q2_K falls
# by a tenth, of Q4_0 and Q5_0 by a twentieth. Q8_0 ignores it: the bytes are the same.
#
# Expected by most: weights that are all 1 change nothing.
# Consequence: "with imatrix against without" measures the better search, too, not only what the
# calibration text taught; and who has no calibration text gains from a matrix of ones.
#
# Seen with the ggml of llama-cpp-python 0.3.36 (ggml-quants.c, quantize_q4_1 and its like). Prints
# for some types the relative error without a matrix and with one of ones, and exits 0 while that is
# so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36 gguf==0.19.0
"$work/venv/bin/python" - <<'PYTHON'
import ctypes as c
import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np

folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
base = c.CDLL(str(folder / "libggml-base.so"))

base.ggml_quantize_chunk.restype = c.c_size_t
weights = np.random.default_rng(0).normal(size=(256, 512)).astype(np.float32)
ones = np.ones(512, np.float32)
types = gguf.GGMLQuantizationType


def quantized(kind: int, importance: int | None) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((256, 512 // block * size), np.uint8)
    rows = (c.c_int64(0), c.c_int64(256), c.c_int64(512))
    source, target = c.c_void_p(weights.ctypes.data), c.c_void_p(out.ctypes.data)
    base.ggml_quantize_chunk(int(kind), source, target, *rows, c.c_void_p(importance))
    return out


change = {}
for kind in (types.Q8_0, types.Q4_0, types.Q5_0, types.Q4_1, types.Q2_K, types.Q6_K):
    both = [quantized(kind, None), quantized(kind, ones.ctypes.data)]
    none, flat = (np.std(gguf.dequantize(x, kind) - weights) / np.std(weights) for x in both)
    change[kind.name] = flat / none - 1
    print(f"{kind.name}: none {none:.4f}, ones {flat:.4f}, error {change[kind.name]:+.1%}")
less = change["Q4_1"] < -0.05 and change["Q2_K"] < -0.05 and change["Q4_0"] < -0.02
sys.exit(0 if less and change["Q8_0"] == 0 else 1)
PYTHON
