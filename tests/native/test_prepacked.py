"""Weights that are kept as the products read them change memory and speed, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.engines import EACH_ISA, make_batch, open_engine, set_random_lora
from tests.support.models import Spec, Tiny, write_model
from tests.support.reference import Array

MODELS = {
    "tied": Spec(tied=True),
    "odd widths": Spec(vocab="spm", n_embd=96, n_head=3, n_head_kv=1, n_ff=160),
    "biases": Spec(arch="qwen2", qkv_bias=True),
}
pytestmark = EACH_ISA

ALL, SOME = 64 << 20, 100_000


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder: Path = tmp_path_factory.mktemp("models")
    return write_model(folder / "m.gguf", MODELS[request.param])


def train(
    tiny: Tiny, precision: str, keep: bool, threads: int, limit: int
) -> tuple[int, list[float], dict[str, Array]]:
    """Return the bytes kept, the losses of a few steps with an evaluation, and the matrices."""
    losses = []
    with open_engine(
        tiny, precision=precision, keep=keep, threads=threads, dropout=0.1, prepacked_bytes=limit
    ) as engine:
        set_random_lora(engine)
        for i in range(3):
            batch = make_batch(tiny.shape.n_vocab, seed=i)
            losses.append(engine.evaluate(batch)[0])
            nats, count = engine.forward_backward(batch, 1 + i)
            engine.optimizer_step(1e-3, count)
            losses.append(nats)
        return engine.info()["buffers"]["prepacked"], losses, engine.get_all("value")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("precision", ["fast", "f32"])
def test_training_is_the_same_to_the_bit(
    tiny: Tiny, precision: str, keep: bool, threads: int
) -> None:
    none, want_losses, want = train(tiny, precision, keep, threads, 0)
    assert none == 0
    some, *_ = kept_some = train(tiny, precision, keep, threads, SOME)
    most, *_ = kept_all = train(tiny, precision, keep, threads, ALL)
    assert 0 < some <= SOME < most < ALL
    for _, losses, got in (kept_some, kept_all):
        assert losses == want_losses
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_the_portable_graph_keeps_none(tiny: Tiny) -> None:
    with open_engine(tiny, kernels="ggml", prepacked_bytes=ALL) as engine:
        assert engine.info()["buffers"]["prepacked"] == 0


def test_more_than_there_is_keeps_none(tiny: Tiny) -> None:
    """An address space cannot hold it; training goes on without."""
    with open_engine(tiny, prepacked_bytes=1 << 62) as engine:
        nats, _ = engine.forward_backward(make_batch(tiny.shape.n_vocab), 0)
        assert np.isfinite(nats)
        assert engine.info()["buffers"]["prepacked"] == 0
