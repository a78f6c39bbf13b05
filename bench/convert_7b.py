"""Measure the conversion of an old 7B file: CPU seconds, peak memory, whether the bytes are equal.

`python bench/convert_7b.py FOLDER [--version 1]` writes a llama 7B in Q4_0 (3.8 GB in `ggjt` v3) of
random blocks into FOLDER, converts it in a child process, compares the tensors and removes both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import numpy as np

from ggft.gguf.cursor import read_bytes
from ggft.gguf.read import read_gguf
from ggft.legacy.reader import read_legacy

N_VOCAB, N_EMBD, N_FF, N_LAYER, N_HEAD = 32000, 4096, 11008, 32, 32
POOL_BLOCKS = 1 << 20
PIECE_BYTES = 64 << 20
LIMIT_CPU_S, LIMIT_RSS_BYTES = 60, 300 << 20


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield Meta's names and shapes, in ggml's order."""
    yield "tok_embeddings.weight", (N_EMBD, N_VOCAB)
    yield "norm.weight", (N_EMBD,)
    yield "output.weight", (N_EMBD, N_VOCAB)
    for i in range(N_LAYER):
        for name in ("wq", "wk", "wv", "wo"):
            yield f"layers.{i}.attention.{name}.weight", (N_EMBD, N_EMBD)
        yield f"layers.{i}.attention_norm.weight", (N_EMBD,)
        yield f"layers.{i}.feed_forward.w1.weight", (N_EMBD, N_FF)
        yield f"layers.{i}.feed_forward.w2.weight", (N_FF, N_EMBD)
        yield f"layers.{i}.feed_forward.w3.weight", (N_EMBD, N_FF)
        yield f"layers.{i}.ffn_norm.weight", (N_EMBD,)


def write_old(path: Path, version: int) -> None:
    """Write the file: random codes, scales as weights of that size have."""
    rng = np.random.default_rng(0)
    scale_type = np.dtype("<f2" if version == 3 else "<f4")
    pool = rng.integers(0, 256, (POOL_BLOCKS, 16 + scale_type.itemsize), dtype=np.uint8)
    scales = rng.normal(0, 0.01, (POOL_BLOCKS, 1)).astype(scale_type)
    pool[:, : scale_type.itemsize] = scales.view(np.uint8)
    with path.open("wb", buffering=1 << 20) as file:
        header = (N_VOCAB, N_EMBD, 256, N_HEAD, N_LAYER, N_EMBD // N_HEAD, 2)
        file.write(b"tjgg" + pack("<8I", version, *header))
        for i in range(N_VOCAB):
            fixed = (" ⁇ ".encode(), b"", b"", *(bytes([byte]) for byte in range(256)))
            text = fixed[i] if i < len(fixed) else f" token{i}".encode()
            file.write(pack("<I", len(text)) + text + pack("<f", min(0, len(fixed) - i)))
        for name, shape in tensors():
            number = 0 if len(shape) == 1 else 2
            file.write(pack("<3I", len(shape), len(name), number))
            file.write(pack(f"<{len(shape)}I", *shape) + name.encode())
            file.write(bytes(-file.tell() % 32))
            if len(shape) == 1:
                file.write(rng.normal(1, 0.1, shape[0]).astype("<f4").tobytes())
                continue
            left = shape[0] * shape[1] // 32
            while left:
                first = int(rng.integers(POOL_BLOCKS // 2))
                count = min(left, POOL_BLOCKS // 2)
                file.write(pool[first : first + count].data)
                left -= count


def equal_bytes(old: Path, new: Path) -> int:
    """Compare the data of all tensors; return how many bytes were equal.

    Raises:
        SystemExit: They differ.
    """
    converted = read_gguf(new)
    total = 0
    for tensor in read_legacy(old).tensors:
        part, other = tensor.parts[0], converted.tensors[tensor.name]
        for at in range(0, part.n_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, part.n_bytes - at)
            before = read_bytes(old, part.offset + at, size, tensor.name)
            if (before != read_bytes(new, other.offset + at, size, tensor.name)).any():
                raise SystemExit(f"{tensor.name} differs")
            total += size
    return total


def main() -> None:
    """Write, convert, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", type=int, choices=(1, 2, 3), default=3)
    arguments = parser.parse_args()
    old = arguments.folder / "llama-2-7b-chat.ggmlv3.q4_0.bin"
    new = arguments.folder / "converted.gguf"
    try:
        write_old(old, arguments.version)
        command = [sys.executable, "-c", "from ggft.__main__ import main; main()", "convert"]
        started_s = time.monotonic()
        child = subprocess.Popen([*command, str(old), str(new)])
        _, status, usage = os.wait4(child.pid, 0)
        wall_s, cpu_s = time.monotonic() - started_s, usage.ru_utime + usage.ru_stime
        if status:
            raise SystemExit("the conversion failed")
        rss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"{cpu_s:.1f} s of CPU ({wall_s:.1f} s), {rss_bytes / 1e6:.0f} MB at most")
        if arguments.version == 3:
            print(f"{equal_bytes(old, new)} bytes of tensor data are the same")
        if cpu_s > LIMIT_CPU_S or rss_bytes > LIMIT_RSS_BYTES:
            raise SystemExit("above the limits")
    finally:
        old.unlink(missing_ok=True)
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
