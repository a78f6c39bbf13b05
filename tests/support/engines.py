"""What the engine's tests share: opening it on a tiny model, batches, LoRA values, distances."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

from ggft.engine.engine import Engine, kernel_set
from ggft.engine.settings import EngineSettings
from tests.support.models import Tiny
from tests.support.reference import LINEARS, Array, Batch, Lora

PACKED = ((9, 6, 5), (16,))
"""Example lengths of two rows: three packed ones with padding, and a padded one."""
T = 24


ISAS: list[str] = kernel_set()["runnable"]
"""The instruction sets that this machine runs, best first, emulated number formats among them."""

EACH_ISA = [
    pytest.mark.parametrize("isa", ISAS, indirect=True),
    pytest.mark.usefixtures("isa"),
]
"""A module's `pytestmark`, whose tests then run with each of them forced."""


def _paths() -> dict[str, dict[str, Any]]:
    """Return every way that this machine can compute: kernels, instruction set and precision.

    In F32 the generic kernels are the same whichever format their fast products emulate, and by
    themselves they have no other.
    """
    ways: list[tuple[str, str]] = []
    for isa in ISAS:
        if isa in ("generic", *(i for i in ISAS if not i.startswith("generic"))):
            ways.append((isa, "f32"))
        if isa != "generic":
            ways.append((isa, "fast"))
    fused = {f"{isa}-{p}": {"kernels": "fused", "isa": isa, "precision": p} for isa, p in ways}
    return fused | {f"ggml-{p}": {"kernels": "ggml", "precision": p} for p in ("f32", "fast")}


PATHS = _paths()
"""Settings of `open_engine` for every numeric path of this machine, by a name for tests."""


def open_engine(tiny: Tiny, **changes: Any) -> Engine:
    """Open the engine on all linears of a tiny model: F32 path, one thread, rank 4.

    The change `isa` forces an instruction set; else it is what GGFT_ISA says, or the best.
    """
    defaults: dict[str, Any] = {
        "paths": [str(tiny.path)],
        "targets": list(LINEARS),
        "layer_first": 0,
        "layer_last": tiny.spec.n_layer,
        "rank": 4,
        "alpha": 8.0,
        "precision": "f32",
        "device": "cpu",
        "n_rows": 2,
        "n_tokens": T,
    }
    forced = {"GGFT_ISA": changes.pop("isa")} if "isa" in changes else {}
    settings = EngineSettings(**{**defaults, **changes})
    with mock.patch.dict("os.environ", forced):
        return Engine(settings)


def make_batch(
    n_vocab: int,
    lengths: tuple[tuple[int, ...], ...] = PACKED,
    n_tokens: int = T,
    trained: float = 0.6,
    seed: int = 0,
) -> dict[str, Array]:
    """Return rows of random examples; each position is trained with probability `trained`."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), n_tokens)
    batch = {
        "tokens": rng.integers(0, n_vocab, shape),
        "positions": np.zeros(shape, int),
        "segments": np.full(shape, -1),
        "targets": np.where(rng.random(shape) < trained, rng.integers(0, n_vocab, shape), -1),
    }
    for row, sizes in enumerate(lengths):
        at = 0
        for segment, size in enumerate(sizes):
            batch["positions"][row, at : at + size] = np.arange(size)
            batch["segments"][row, at : at + size] = segment
            at += size
        for key, padding in (("tokens", 0), ("targets", -1)):
            batch[key][row, at:] = padding
    return {key: array.astype(np.int32) for key, array in batch.items()}


def as_batch(arrays: dict[str, Array]) -> Batch:
    """Return the reference's view of a batch."""
    return Batch(**arrays)


def set_random_lora(engine: Engine, seed: int = 1, size: float = 0.5) -> dict[str, Lora]:
    """Fill A and B with random values, so that neither gradient is zero; return them as float64."""
    rng = np.random.default_rng(seed)
    for name, shape in engine.parameters.items():
        values = size * rng.normal(size=shape) / np.sqrt(shape[1])
        engine.set(name, "value", values.astype(np.float32))
    return read_lora(engine)


def read_lora(engine: Engine) -> dict[str, Lora]:
    """Return the engine's LoRA values as the reference takes them."""
    values = {name: array.astype(np.float64) for name, array in engine.get_all().items()}
    scale = engine.settings.alpha / engine.settings.rank
    bases = {name.rsplit(".", 1)[0] for name in values}
    return {n: Lora(values[f"{n}.lora_a"], values[f"{n}.lora_b"], scale) for n in bases}


def relative(got: Array, want: Array) -> float:
    """Return ‖got − want‖ / ‖want‖ (Frobenius)."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def gradient_errors(got: dict[str, Array], want: dict[str, Array]) -> dict[str, float]:
    """Return the relative error of each tensor, and of all together under `whole`."""
    assert set(got) == set(want)
    errors = {name: relative(got[name], want[name]) for name in want}
    flat = [np.concatenate([grads[name].ravel() for name in want]) for grads in (got, want)]
    return {**errors, "whole": relative(*flat)}
