"""torch's speed in matrix products at given shapes, in the peer's environment.

    python bench/peer_gemm.py TOKENS THREADS C_OUTxC_INxCOUNT…

Prints one JSON line: FLOP/s by type.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import json
import sys
import time

import torch

REPEATS = 5


def main() -> None:
    """Measure F32 and BF16: the best of some repeats of each product."""
    n_tokens, threads = int(sys.argv[1]), int(sys.argv[2])
    shapes = [[int(n) for n in text.split("x")] for text in sys.argv[3:]]
    torch.set_num_threads(threads)
    result = {}
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        flops = seconds = 0.0
        for n_out, n_in, count in shapes:
            weight = torch.randn(n_out, n_in).to(dtype)
            x = torch.randn(n_tokens, n_in).to(dtype)
            times = []
            for _ in range(1 + REPEATS):
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                times.append(time.perf_counter() - start)
            flops += 2.0 * n_out * n_in * n_tokens * count
            seconds += min(times[1:]) * count
        result[name] = flops / seconds
    print(json.dumps(result))


if __name__ == "__main__":
    with torch.no_grad():
        main()
