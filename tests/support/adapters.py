"""Adapters of random matrices, for the tests of whatever reads or applies one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ggft.adapters.adapter import AdapterMeta, write_adapter
from tests.support.models import Tiny, matrix_shapes
from tests.support.reference import Array, Lora


def random_adapter(
    path: Path, tiny: Tiny, *, rank: int = 4, alpha: float = 8.0, size: float = 0.2, **meta: Any
) -> dict[str, Lora]:
    """Write an adapter on all linears of a tiny model; return its matrices for the reference."""
    rng = np.random.default_rng(7)
    arrays: dict[str, Array] = {}
    loras = {}
    for i in range(tiny.spec.n_layer):
        for name, (n_out, n_in) in matrix_shapes(tiny.spec).items():
            full = f"blk.{i}.{name}.weight"
            a = rng.normal(size=(rank, n_in)).astype(np.float32) / np.sqrt(n_in)
            b = (size * rng.normal(size=(n_out, rank))).astype(np.float32)
            arrays[f"{full}.lora_a"], arrays[f"{full}.lora_b"] = a, b
            loras[full] = Lora(a, b, alpha / rank)
    write_adapter(
        path,
        {name: (array.shape[0], array.shape[1]) for name, array in arrays.items()},
        lambda name: arrays[name].astype(np.float32),
        AdapterMeta(architecture=tiny.spec.arch, rank=rank, alpha=alpha, **meta),
    )
    return loras
