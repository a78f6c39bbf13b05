"""A weight on each target's loss: the gradient is the weighted sum, whichever engine computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ggft.system.errors import InputError
from tests.support.engines import PACKED, T, make_batch, open_engine, relative, set_random_lora
from tests.support.models import Spec, Tiny, write_model

ENGINES: dict[str, dict[str, Any]] = {
    "fused": {"kernels": "fused"},
    "ggml": {"kernels": "ggml"},
    "traced": {"traced": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_model(tmp_path_factory.mktemp("models") / "m.gguf", Spec())


@pytest.mark.parametrize("name", ENGINES)
def test_the_gradient_is_the_weighted_sum(tiny: Tiny, name: str) -> None:
    """Of two halves of the targets, one of which is to become less likely."""
    batch = make_batch(tiny.shape.n_vocab, PACKED, T)
    first = np.random.default_rng(5).random(batch["targets"].shape) < 0.5
    weights = np.where(first, 0.25, -1.5).astype(np.float32)
    with open_engine(tiny, **ENGINES[name]) as engine:
        set_random_lora(engine)
        wanted, nats = [], 0.0
        for half, weight in ((first, 0.25), (~first, -1.5)):
            engine.zero_grad()
            alone = {**batch, "targets": np.where(half, batch["targets"], -1).astype(np.int32)}
            nats += weight * engine.forward_backward(alone, 0)[0]
            wanted.append([weight * g for g in engine.get_all("grad").values()])
        engine.zero_grad()
        got = engine.forward_backward({**batch, "weights": weights}, 0)
        gradient = list(engine.get_all("grad").values())
        assert got[0] == pytest.approx(nats, rel=1e-5)
        assert got[1] == (batch["targets"] >= 0).sum()
        for array, one, other in zip(gradient, *wanted, strict=True):
            assert relative(array, one + other) <= 2e-5
        assert engine.evaluate({**batch, "weights": weights})[0] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_ones_change_nothing_and_what_is_no_number_is_refused(tiny: Tiny, name: str) -> None:
    batch = make_batch(tiny.shape.n_vocab, PACKED, T)
    ones = np.ones(batch["targets"].shape, np.float32)
    with open_engine(tiny, **ENGINES[name]) as engine:
        set_random_lora(engine)
        without = engine.forward_backward(batch, 0)
        assert engine.forward_backward({**batch, "weights": ones}, 0) == without
        with pytest.raises(InputError, match="not finite"):
            engine.forward_backward({**batch, "weights": ones * np.float32("nan")}, 0)
        with pytest.raises(InputError, match="differ in shape"):
            engine.forward_backward({**batch, "weights": ones[:1]}, 0)
