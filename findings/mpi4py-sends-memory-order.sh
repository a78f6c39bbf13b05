#!/usr/bin/env bash
# mpi4py's buffer calls (Send, Bcast, Allreduce, …) take a transposed matrix and send it in the
# order of its memory: what arrives in an array of the same shape has its values in other places.
# A slice, which is no less an array, is refused.
#
# Expected by most: sending `w.T` into an array of the shape of `w.T` gives `w.T`, or an error as
# other non-contiguous arrays do. The lower-case calls, which pickle, do give it.
# Consequence: adapters and gradients of which one rank keeps the transpose are silently scrambled,
# and an Allreduce of `w.T` on one rank and a contiguous array on another adds unlike elements.
#
# Seen with mpi4py 4.1.2 and mpich 5.0.2 (their wheels), in one process that sends to itself. Prints
# what was sent and what came, and exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install mpi4py==4.1.2 mpich==5.0.2 numpy
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from mpi4py import MPI

me = MPI.COMM_SELF
w = np.arange(6, dtype=np.float32).reshape(2, 3)
came = np.zeros(w.T.shape, np.float32)
me.Sendrecv(w.T, 0, recvbuf=came, source=0)
pickled = me.sendrecv(w.T, 0, source=0)
try:
    me.Sendrecv(w[:, :2], 0, recvbuf=np.zeros((2, 2), np.float32), source=0)
    refused = None
except (BufferError, ValueError) as error:
    refused = error
print("sent        ", w.T.tolist())
print("Sendrecv:   ", came.tolist())
print("sendrecv:   ", pickled.tolist())
print("w[:, :2]:   ", f"{type(refused).__name__}: {refused}")
right = np.array_equal(pickled, w.T)
sys.exit(0 if right and refused and np.array_equal(came.ravel(), w.ravel()) else 1)
PYTHON
