"""Write a GGUF of random weights in a real model's shapes, to measure time and memory with.

    python bench/make_model.py llama-2-7b --type Q4_0 out.gguf
    python bench/make_model.py llama-3.2-1b --type Q4_K --vocab 262144 out.gguf

All tensors stream: memory stays at one chunk, and a gigabyte takes a few seconds. The vocabulary
consists of byte tokens and fillers, enough for llama.cpp to load the file.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.blocks import TYPES, random_blocks
from tests.support.models import ALIGNMENT, Spec, gguf_head, matrix_shapes, model_metadata

CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Shapes:
    """A model's sizes beyond those of a Spec."""

    spec: Spec
    n_vocab: int


def _shapes(
    n_layer: int, n_embd: int, n_head: int, n_head_kv: int, n_ff: int, n_vocab: int, **more: object
) -> Shapes:
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_head_kv": n_head_kv}
    return Shapes(Spec(**{**sizes, "n_ff": n_ff, "vocab": "spm", **more}), n_vocab)  # type: ignore[arg-type]


LLAMA_3 = {"rope_base": 500000.0, "rope_freqs": True, "tied": True, "n_ctx": 131072}
MODELS = {
    "smollm2-135m": _shapes(30, 576, 9, 3, 1536, 49152, rope_base=100000.0, tied=True),
    "tinyllama-1.1b": _shapes(22, 2048, 32, 4, 5632, 32000, n_ctx=2048),
    "llama-3.2-1b": _shapes(16, 2048, 32, 8, 8192, 128256, **LLAMA_3),
    "llama-3.2-3b": _shapes(28, 3072, 24, 8, 8192, 128256, **LLAMA_3),
    "llama-2-7b": _shapes(32, 4096, 32, 32, 11008, 32000, n_ctx=4096),
    "mistral-7b": _shapes(32, 4096, 32, 8, 14336, 32000, n_ctx=32768),
}


@dataclass(frozen=True)
class Planned:
    """A tensor before it exists."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    std: float

    @property
    def n_bytes(self) -> int:
        """Size of its blocks."""
        info = TYPES[self.type_name]
        return math.prod(self.shape) // info.block * info.block_bytes


def plan(shapes: Shapes, type_name: str) -> list[Planned]:
    """Return the tensors of a model, as llama.cpp orders them; rows that do not fit are Q8_0."""
    spec, n_vocab = shapes.spec, shapes.n_vocab

    def matrix(name: str, shape: tuple[int, int], std: float) -> Planned:
        fits = shape[1] % TYPES[type_name].block == 0
        return Planned(name, type_name if fits else "Q8_0", shape, std)

    def norm(name: str, size: int) -> Planned:
        return Planned(name, "F32", (size,), 0.0)

    tensors = [matrix("token_embd.weight", (n_vocab, spec.n_embd), 0.02)]
    if spec.rope_freqs:
        tensors.append(norm("rope_freqs.weight", spec.d // 2))
    for i in range(spec.n_layer):
        tensors.append(norm(f"blk.{i}.attn_norm.weight", spec.n_embd))
        tensors.append(norm(f"blk.{i}.ffn_norm.weight", spec.n_embd))
        for name, shape in matrix_shapes(spec).items():
            tensors.append(matrix(f"blk.{i}.{name}.weight", shape, 1 / math.sqrt(shape[1])))
    tensors.append(norm("output_norm.weight", spec.n_embd))
    if not spec.tied:
        tensors.append(matrix("output.weight", (n_vocab, spec.n_embd), 0.02))
    return tensors


def chunks(tensor: Planned, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield a tensor's data; norms are ones."""
    if len(tensor.shape) == 1:
        yield np.ones(tensor.shape, np.float32).tobytes()
        return
    row = tensor.shape[1]
    left, most = math.prod(tensor.shape), max(1, CHUNK_VALUES // row) * row
    while left:
        n = min(left, most)
        yield random_blocks(rng, tensor.type_name, n, tensor.std)
        left -= n


def write(file: BinaryIO, shapes: Shapes, type_name: str, seed: int = 0) -> None:
    """Stream the whole model to `file`."""
    rng = np.random.default_rng(seed)
    tensors = plan(shapes, type_name)
    metadata = model_metadata(shapes.spec, shapes.n_vocab)
    infos = [(t.name, t.type_name, t.shape, t.n_bytes) for t in tensors]
    file.write(gguf_head(metadata, infos))
    for tensor in tensors:
        for chunk in chunks(tensor, rng):
            file.write(chunk)
        file.write(bytes(-tensor.n_bytes % ALIGNMENT))


def main() -> None:
    """Write one model and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=MODELS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    parser.add_argument("--vocab", type=int, help="another vocabulary size")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    args = parser.parse_args()
    shapes = MODELS[args.shape]
    if args.vocab:
        shapes = replace(shapes, n_vocab=args.vocab)
    if args.layers:
        shapes = replace(shapes, spec=replace(shapes.spec, n_layer=args.layers))
    start = time.perf_counter()
    with args.output.open("wb") as file:
        write(file, shapes, args.type)
    size = args.output.stat().st_size
    print(f"{args.output}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
