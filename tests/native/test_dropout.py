"""Dropout: the engine's own masks are found out, judged, and given to the reference.

The engine makes its masks from the micro-batch's seed and tells nobody. They follow from a
gradient: with lora_b = 0 the forward depends on no mask, and with lora_a = I the gradient of lora_b
is scale·Σ_t dy_t·x̂_tᵀ, in which the reference knows every dy and x. Solving for x̂ = mask·x gives
the mask of each linear at each token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ggft.engine.engine import Engine
from tests.support.engines import (
    as_batch,
    gradient_errors,
    make_batch,
    open_engine,
    read_lora,
    set_random_lora,
)
from tests.support.models import Spec, Tiny, write_model
from tests.support.reference import Array, Decoder

P = 0.25
SEED = 21
KEPT = 1 / (1 - P)


class Watched(Decoder):
    """A reference that notes the input of every linear and the gradient of its output."""

    def watch(self, arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return x and dy of every linear, (B·T, C), by the weight's name."""
        self.x: dict[str, Array] = {}
        self.dy: dict[str, Array] = {}
        self.gradients(as_batch(arrays))
        return self.x, self.dy

    def _linear(self, name: str, x: Array) -> Array:
        self.x[f"{name}.weight"] = x.reshape(-1, x.shape[-1])
        return super()._linear(name, x)

    def _linear_vjp(self, name: str, dy: Array, x: Array, grads: dict[str, Array]) -> Array:
        self.dy[f"{name}.weight"] = dy.reshape(-1, dy.shape[-1])
        return super()._linear_vjp(name, dy, x, grads)


def find_masks(
    engine: Engine,
    tiny: Tiny,
    batch: dict[str, Array],
    seed: int,
    multipliers: tuple[float, ...] = (0.0, KEPT),
) -> dict[str, Array]:
    """Return the mask (B·T, C_in) of every linear; NaN at tokens where nothing depends on it.

    Each entry is the nearest of `multipliers`, and must explain the gradient to a thousandth of the
    largest input: float32 sums, times the condition of a dozen tokens' gradients.
    """
    for name, shape in engine.parameters.items():
        value = np.eye(*shape) if name.endswith("lora_a") else np.zeros(shape)
        engine.set(name, "value", value.astype(np.float32))
    engine.zero_grad()
    engine.forward_backward(batch, seed)
    grads = engine.get_all("grad")
    engine.zero_grad()

    watched = Watched(tiny.shape, tiny.weights, read_lora(engine))
    x, dy = watched.watch(batch)
    scale = engine.settings.alpha / engine.settings.rank
    masks = {}
    for name, inputs in x.items():
        size = np.linalg.norm(dy[name], axis=1)
        # The first token of an example attends only to itself: nothing flows to its query.
        live = size > 1e-9 * size.max()
        d_unit = (dy[name][live] / size[live, None]).T
        dot = grads[f"{name}.lora_b"][:, : inputs.shape[1]] / scale
        dropped, _, rank, _ = np.linalg.lstsq(d_unit, dot, rcond=None)
        assert rank == live.sum(), f"{name}: tokens cannot be told apart"
        given = dropped / size[live, None]
        choices = np.stack([m * inputs[live] for m in multipliers])
        best = np.abs(given - choices).argmin(0)
        explained = np.take_along_axis(choices, best[None], 0)[0]
        np.testing.assert_allclose(given, explained, atol=1e-3 * np.abs(inputs).max())
        masks[name] = np.full(inputs.shape, np.nan)
        masks[name][live] = np.asarray(multipliers)[best]
    return masks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_model(tmp_path_factory.mktemp("dropout") / "tiny.gguf", Spec(n_head_kv=4))


@pytest.fixture(scope="module")
def batch(tiny: Tiny) -> dict[str, Array]:
    return make_batch(tiny.shape.n_vocab, ((4, 2), (5,)), n_tokens=6, trained=1.0)


def open_dropout(tiny: Tiny, kernels: str) -> Engine:
    """Open the engine with dropout, and a rank that lora_a = I needs."""
    rank = max(tiny.spec.n_ff, tiny.spec.n_embd)
    return open_engine(tiny, rank=rank, alpha=float(rank), dropout=P, kernels=kernels)


@pytest.mark.parametrize("kernels", ["fused", "ggml"])
def test_masks_are_fair_and_differ(tiny: Tiny, batch: dict[str, Array], kernels: str) -> None:
    """Each is 0 or 1/(1 − p), dropped at rate p, and another for every layer, row and seed."""
    with open_dropout(tiny, kernels) as engine:
        masks = find_masks(engine, tiny, batch, SEED)
        again = find_masks(engine, tiny, batch, SEED)
        other = find_masks(engine, tiny, batch, SEED + 1)
        find_masks(engine, tiny, batch, 0, multipliers=(1.0,))
    dropped = np.concatenate([mask[~np.isnan(mask)] for mask in masks.values()]) == 0
    # The seven linears share masks (q, k and v read one input): 7/4 of the binomial's variance.
    assert abs(dropped.mean() - P) < 4 * np.sqrt(P * (1 - P) / dropped.size * 7 / 4)
    for name, mask in masks.items():
        np.testing.assert_array_equal(again[name], mask)
        assert agreement(mask, other[name]) < 0.75, f"{name}: the seed changes nothing"
        assert agreement(mask[:6], mask[6:]) < 0.75, f"{name}: rows share a mask"
        next_layer = masks[name.replace("blk.0", "blk.1")]
        if name.startswith("blk.0"):
            assert agreement(mask, next_layer) < 0.75, f"{name}: layers share a mask"


def agreement(a: Array, b: Array) -> float:
    """Return the share of equal decisions; (1 − p)² + p² = 0.625 for independent masks."""
    known = ~np.isnan(a) & ~np.isnan(b)
    return float((a == b)[known].mean())


@pytest.mark.parametrize("kernels", ["fused", "ggml"])
@pytest.mark.parametrize(("precision", "bar"), [("f32", 1e-4), ("fast", 2e-2)])
def test_gradient_with_the_engines_own_masks(
    tiny: Tiny, batch: dict[str, Array], precision: str, bar: float, kernels: str
) -> None:
    with open_dropout(tiny, kernels) as engine:
        masks = find_masks(engine, tiny, batch, SEED)
    rank = max(tiny.spec.n_ff, tiny.spec.n_embd)
    settings = {"rank": rank, "alpha": float(rank), "dropout": P, "kernels": kernels}
    with open_engine(tiny, precision=precision, **settings) as engine:
        lora = set_random_lora(engine, size=0.3)
        nats, _ = engine.forward_backward(batch, SEED)
        got = engine.get_all("grad")
        without, _ = engine.evaluate(batch)
    assert abs(without - nats) > 1e-4 * nats
    shape = (*batch["tokens"].shape, -1)
    dropped = {
        name: replace(one, mask=np.nan_to_num(masks[name], nan=1.0).reshape(shape))
        for name, one in lora.items()
    }
    want_nats, want = tiny.decoder(dropped).gradients(as_batch(batch))
    assert nats == pytest.approx(want_nats, rel=bar)
    errors = gradient_errors(got, want)
    assert max(errors.values()) <= bar, errors
