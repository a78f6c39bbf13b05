"""The reference itself: every gradient against complex-step derivatives of its forward.

A complex step has no cancellation: Im f(x + ih)/h is exact to rounding, so 1e-10 (relative,
Frobenius) leaves room only for the rounding of float64 sums. Central differences of the whole
loss are limited by cancellation to about 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support import reference as ref
from tests.support.reference import Array, Batch, Decoder, Lora, Rope, Shape

EXACT = 1e-10
STEP = 1e-30


def complex_step(f: Callable[[Array], Any], x: Array) -> Array:
    """Return the gradient of the real-analytic scalar f at x."""
    grad = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        moved = x.astype(complex)
        moved[index] += 1j * STEP
        grad[index] = f(moved).imag / STEP
    return grad


def relative(got: Array, want: Array) -> float:
    """Return ‖got − want‖ / ‖want‖ (Frobenius)."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_rms_norm(rng: np.random.Generator) -> None:
    x, w, dy = rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=(3, 5))
    want = complex_step(lambda z: (ref.rms_norm(z, w, 1e-2) * dy).sum(), x)
    assert relative(ref.rms_norm_vjp(dy, x, w, 1e-2), want) < EXACT


def test_softmax(rng: np.random.Generator) -> None:
    x, dp = rng.normal(size=(4, 6)) * 3, rng.normal(size=(4, 6))
    allowed = rng.random((4, 6)) < 0.6
    allowed[2] = False
    p = ref.softmax(x, allowed)
    np.testing.assert_allclose(p.sum(-1), [1, 1, 0, 1], atol=1e-15)
    want = complex_step(lambda z: (ref.softmax(z, allowed) * dp).sum(), x)
    assert relative(ref.softmax_vjp(dp, p), want) < EXACT


def test_swiglu(rng: np.random.Generator) -> None:
    gate, up, dh = (rng.normal(size=(3, 4)) for _ in range(3))
    d_gate, d_up = ref.swiglu_vjp(dh, gate, up)
    assert relative(d_gate, complex_step(lambda z: (ref.swiglu(z, up) * dh).sum(), gate)) < EXACT
    assert relative(d_up, complex_step(lambda z: (ref.swiglu(gate, z) * dh).sum(), up)) < EXACT


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("n_rot", [4, 6])
def test_rope(rng: np.random.Generator, neox: bool, n_rot: int) -> None:
    spec = Rope(n_rot, base=100.0, scale=0.5, factors=rng.uniform(1, 4, n_rot // 2), neox=neox)
    positions = np.array([[0, 1, 7]])
    x, dy = rng.normal(size=(1, 3, 2, 6)), rng.normal(size=(1, 3, 2, 6))
    want = complex_step(lambda z: (ref.rope(z, positions, spec) * dy).sum(), x)
    assert relative(ref.rope_vjp(dy, positions, spec), want) < EXACT


def test_rope_depends_on_relative_position_only(rng: np.random.Generator) -> None:
    spec = Rope(8)
    q, k = rng.normal(size=(2, 1, 1, 1, 8))
    dots = [
        (ref.rope(q, np.array([[p + 3]]), spec) * ref.rope(k, np.array([[p]]), spec)).sum()
        for p in (0, 5, 100)
    ]
    np.testing.assert_allclose(dots, dots[0], rtol=1e-12)


def test_attention(rng: np.random.Generator) -> None:
    q, k, v = (rng.normal(size=(2, 5, heads, 3)) for heads in (4, 2, 2))
    dy = rng.normal(size=q.shape)
    allowed = ref.may_attend(np.array([[0, 0, 0, 1, 1], [0, 1, 1, -1, -1]]))
    got = ref.attention_vjp(dy, q, k, v, ref.attention(q, k, v, allowed)[1])
    given = {"q": q, "k": k, "v": v}
    for (name, x), grad in zip(given.items(), got, strict=True):

        def f(z: Array, name: str = name) -> Any:
            moved = {**given, name: z}
            return (ref.attention(**moved, allowed=allowed)[0] * dy).sum()

        assert relative(grad, complex_step(f, x)) < EXACT


def test_attention_reads_only_its_own_example(rng: np.random.Generator) -> None:
    """Two packed examples give what each gives alone, and padding gives zero."""
    q, k, v = (rng.normal(size=(1, 6, heads, 4)) for heads in (2, 1, 1))
    packed = ref.attention(q, k, v, ref.may_attend(np.array([[0, 0, 0, 1, 1, -1]])))[0]
    for part in (slice(0, 3), slice(3, 5)):
        n = part.stop - part.start
        whole = ref.may_attend(np.zeros((1, n), int))
        alone = ref.attention(q[:, part], k[:, part], v[:, part], whole)[0]
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-13)
    assert not packed[:, 5].any()


@pytest.mark.parametrize("dropout", [False, True])
def test_linear_with_lora(rng: np.random.Generator, dropout: bool) -> None:
    x, w, bias = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=5)
    mask = rng.integers(0, 2, x.shape) / 0.5 if dropout else None
    lora = Lora(rng.normal(size=(2, 4)), rng.normal(size=(5, 2)), scale=1.7, mask=mask)
    dy = rng.normal(size=(2, 3, 5))

    def f(x: Array, a: Array, b: Array) -> Any:
        return (ref.linear(x, w, bias, replace(lora, a=a, b=b)) * dy).sum()

    dx, da, db = ref.linear_vjp(dy, x, w, lora)
    assert da is not None
    assert db is not None
    assert relative(dx, complex_step(lambda z: f(z, lora.a, lora.b), x)) < EXACT
    assert relative(da, complex_step(lambda z: f(x, z, lora.b), lora.a)) < EXACT
    assert relative(db, complex_step(lambda z: f(x, lora.a, z), lora.b)) < EXACT


def test_token_nats(rng: np.random.Generator) -> None:
    logits, targets = rng.normal(size=(2, 3, 7)) * 4, np.array([[0, -1, 6], [3, 3, -1]])
    want = complex_step(lambda z: ref.token_nats(z, targets).sum(), logits)
    assert relative(ref.token_nats_vjp(logits, targets), want) < EXACT
    p = np.exp(logits[0, 2]) / np.exp(logits[0, 2]).sum()
    assert ref.token_nats(logits, targets)[0, 2] == pytest.approx(-np.log(p[6]), rel=1e-13)


def small_decoder(rng: np.random.Generator, *, tied: bool, bias: bool, neox: bool) -> Decoder:
    """Return a 2-layer decoder of tiny odd sizes with LoRA, dropout masks included."""
    c, h, k, d, f, v, r = 6, 4, 2, 4, 5, 11, 2
    factors = rng.uniform(1, 3, d // 2)
    shape = Shape(2, h, k, v, Rope(d, 100.0, 0.5, factors, neox), eps=1e-3)
    sizes = dict(
        zip(
            ref.LINEARS,
            [(h * d, c), (k * d, c), (k * d, c), (c, h * d), (f, c), (f, c), (c, f)],
            strict=True,
        )
    )
    weights = {"token_embd.weight": rng.normal(size=(v, c))}
    weights["output_norm.weight"] = rng.normal(size=c)
    if not tied:
        weights["output.weight"] = rng.normal(size=(v, c))
    lora = {}
    for i in range(2):
        weights[f"blk.{i}.attn_norm.weight"] = rng.normal(size=c)
        weights[f"blk.{i}.ffn_norm.weight"] = rng.normal(size=c)
        for name, (n_out, n_in) in sizes.items():
            full = f"blk.{i}.{name}"
            weights[f"{full}.weight"] = rng.normal(size=(n_out, n_in)) / np.sqrt(n_in)
            if bias:
                weights[f"{full}.bias"] = rng.normal(size=n_out)
            if (i, name) != (0, "attn_v"):
                a, b = rng.normal(size=(r, n_in)), rng.normal(size=(n_out, r))
                mask = rng.integers(0, 4, (2, 6, n_in)).clip(max=1) / 0.75
                lora[f"{full}.weight"] = Lora(a, b, 0.3, mask)
    return Decoder(shape, weights, lora)


def small_batch(rng: np.random.Generator) -> Batch:
    """Return two rows: two packed examples, and one padded."""
    targets = rng.integers(-1, 11, (2, 6))
    targets[1, 4:] = -1
    return Batch(
        tokens=rng.integers(0, 11, (2, 6)),
        positions=np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]),
        segments=np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]]),
        targets=targets,
    )


@pytest.mark.parametrize(("tied", "bias", "neox"), [(True, False, False), (False, True, True)])
def test_whole_gradient(rng: np.random.Generator, tied: bool, bias: bool, neox: bool) -> None:
    model, batch = small_decoder(rng, tied=tied, bias=bias, neox=neox), small_batch(rng)
    nats, grads = model.gradients(batch)
    assert nats == pytest.approx(model.loss(batch), rel=1e-14)
    assert len(grads) == 2 * len(model.lora) == 26
    for name, lora in model.lora.items():

        def loss(changed: Lora, name: str = name) -> Any:
            lora = {**model.lora, name: changed}
            return Decoder(model.shape, model.weights, lora).loss(batch)

        def by_a(z: Array, lora: Lora = lora) -> Any:
            return loss(replace(lora, a=z))

        def by_b(z: Array, lora: Lora = lora) -> Any:
            return loss(replace(lora, b=z))

        da, db = complex_step(by_a, lora.a), complex_step(by_b, lora.b)
        assert relative(grads[f"{name}.lora_a"], da) < EXACT, name
        assert relative(grads[f"{name}.lora_b"], db) < EXACT, name


def test_whole_gradient_by_central_differences(rng: np.random.Generator) -> None:
    """The same along one random direction through all tensors, without complex numbers."""
    model, batch = small_decoder(rng, tied=True, bias=True, neox=False), small_batch(rng)
    _, grads = model.gradients(batch)
    move = {
        name: (rng.normal(size=lora.a.shape), rng.normal(size=lora.b.shape))
        for name, lora in model.lora.items()
    }

    def loss(step: float) -> float:
        moved = {
            name: replace(lora, a=lora.a + step * move[name][0], b=lora.b + step * move[name][1])
            for name, lora in model.lora.items()
        }
        return float(Decoder(model.shape, model.weights, moved).loss(batch))

    want = sum(
        (grads[f"{name}.lora_{w}"] * d).sum()
        for name, ds in move.items()
        for w, d in zip("ab", ds, strict=True)
    )
    step = 1e-5
    central = (8 * (loss(step) - loss(-step)) - loss(2 * step) + loss(-2 * step)) / (12 * step)
    assert central == pytest.approx(want, rel=1e-7)


def test_adamw_first_step_is_the_sign_and_decay_is_decoupled() -> None:
    values = {"w": np.array([1.0, -2.0, 3.0])}
    grads = {"w": np.array([30.0, -40.0, 0.0])}
    norm = ref.AdamW(lr=0.1, weight_decay=0.5, max_grad_norm=1.0).update(values, grads, 10)
    assert norm == pytest.approx(5.0)
    np.testing.assert_allclose(values["w"], [0.95 - 0.1, -1.9 + 0.1, 2.85], rtol=1e-6)
