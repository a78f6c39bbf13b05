"""Streams through the stages of blocks, and weights fitted to what the stages read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.engine.engine import Cancelled, Engine
from ggft.engine.quants import dequantize_rows, quantize_rows, read_rows
from ggft.engine.stages import STAGES, Moments, Stream, can_calibrate
from ggft.gguf.read import GGMLType, read_gguf
from ggft.system.errors import InputError, NumericError
from tests.support.engines import T, make_batch, open_engine
from tests.support.models import Spec, Tiny, write_model
from tests.support.reference import Array

CALIBRATED = [t for t in GGMLType if can_calibrate(t)]
N_INPUTS, N_ROWS = 256, 70  # rows that do not fill whole vectors


# ---- streams ----


def whole_pass(engine: Engine, tiny: Tiny, batch: dict[str, Array], given: Any) -> float:
    """Take a batch through all stages and return its loss; `given` gives weights by full name."""
    stream = Stream(engine, [batch])
    weights: dict[str, Any] = {}
    for layer in range(tiny.spec.n_layer):
        for stage, linears in enumerate(STAGES):
            stream.advance(layer, stage, 0, weights)
            weights = {short: given(f"blk.{layer}.{short}.weight") for short in linears}
    stream.advance(tiny.spec.n_layer, 0, 0, weights)
    nats, count = stream.loss(0)
    return nats / count


@pytest.mark.parametrize("precision", ["f32", "fast"])
@pytest.mark.parametrize(
    "spec",
    [Spec(types="Q4_1"), Spec(arch="qwen2", qkv_bias=True), Spec(arch="qwen3", bias=True)],
    ids=lambda spec: spec.arch,
)
def test_a_stream_is_the_forward_pass(tmp_path: Path, spec: Spec, precision: str) -> None:
    """To the bit with the model's own weights, and with other ones a model that holds those."""
    tiny = write_model(tmp_path / "m.gguf", spec)
    file = read_gguf(tiny.path)
    batch = make_batch(tiny.shape.n_vocab)

    def own(name: str) -> tuple[GGMLType, Array]:
        tensor = file.tensors[name]
        return GGMLType.F32, read_rows(tensor, 0, tensor.n_rows).view("u1")

    other = read_gguf(write_model(tmp_path / "other.gguf", Spec(**{**vars(spec), "seed": 1})).path)
    with open_engine(tiny, precision=precision) as engine:
        nats, count = engine.evaluate(batch)
        stream = Stream(engine, [batch])
        for layer in range(spec.n_layer):
            for stage in range(len(STAGES)):
                stream.advance(layer, stage, 0, {})
        fork = stream.fork()
        stream.advance(spec.n_layer, 0, 0, {})
        assert stream.loss(0) == (nats, count)
        fork.advance(spec.n_layer, 0, 0, {})
        assert fork.loss(0) == (nats, count)
        assert whole_pass(engine, tiny, batch, own) == pytest.approx(nats / count, rel=1e-5)

        def foreign(name: str) -> tuple[GGMLType, Array]:
            tensor = other.tensors[name]
            values = read_rows(tensor, 0, tensor.n_rows)
            return GGMLType.Q8_0, quantize_rows(values, GGMLType.Q8_0)

        changed = whole_pass(engine, tiny, batch, foreign)
    assert abs(changed - nats / count) > 0.01


def test_a_stage_that_is_not_there(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "m.gguf")
    batch = make_batch(tiny.shape.n_vocab)
    short = np.zeros((7, 64), np.uint8)
    with open_engine(tiny) as engine:
        residual = engine.embed(batch)
        assert residual.shape == (2 * T, tiny.spec.n_embd)
        with pytest.raises(InputError, match="no such stage"):
            engine.advance(0, 4, batch, {}, residual, residual)
        with pytest.raises(InputError, match="no such stage"):
            engine.advance(tiny.spec.n_layer, 1, batch, {}, residual, residual)
        with pytest.raises(InputError, match="the input has shape"):
            engine.advance(0, 1, batch, {}, residual[:5], residual)
        with pytest.raises(InputError, match="has another size"):
            engine.advance(0, 1, batch, {"attn_q": (0, short)}, residual, residual)
        with pytest.raises(InputError, match="no linear 'attn_x'"):
            engine.advance(0, 1, batch, {"attn_x": (0, short)}, residual, residual)


# ---- moments ----


def inputs(n_tokens: int = 900) -> tuple[Array, Array]:
    """Return x and y, correlated as activations are: few directions hold most of them."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(N_INPUTS, N_INPUTS)) * np.exp(-np.arange(N_INPUTS) / 40)[:, None]
    y = rng.normal(size=(n_tokens, N_INPUTS)) @ basis
    x = y + 0.1 * rng.normal(size=y.shape) @ basis
    return x.astype(np.float32), y.astype(np.float32)


def weights() -> Array:
    rng = np.random.default_rng(1)
    return (rng.normal(size=(N_ROWS, N_INPUTS)) / 16).astype(np.float32)


def gathered(threads: int = 2) -> Moments:
    x, y = inputs()
    moments = Moments(N_INPUTS, threads)
    moments.add(x[:500], y[:500])  # not whole pieces
    moments.add(x[500:], y[500:])
    return moments


def second(damping: float) -> Array:
    """Return the damped second moments in float64."""
    y = inputs()[1].astype(np.float64)
    moments: Array = y.T @ y / len(y)
    moments += damping * np.diag(moments).mean() * np.eye(N_INPUTS)
    return moments


def output_error(data: Array, tensor_type: GGMLType, wanted: Array, damping: float) -> float:
    """Return the squared error of the outputs of blocks, as ggml dequantizes them."""
    error = dequantize_rows(data, tensor_type, N_INPUTS).astype(np.float64) - wanted
    return float(np.vdot(error @ second(damping), error))


def test_targets_are_the_least_squares_weights() -> None:
    x, y = (array.astype(np.float64) for array in inputs())
    moments = gathered()
    assert moments.factor(0.01) == pytest.approx(0.01)
    wanted = weights().astype(np.float64)
    cross = (x - y).T @ y / len(y)
    expected = wanted + wanted @ cross @ np.linalg.inv(second(0.01))
    got = moments.targets(weights())
    # A float32 Cholesky of moments whose condition is some 1e4.
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected - wanted).max()


@pytest.mark.parametrize("tensor_type", CALIBRATED)
def test_blocks_are_what_they_are_said_to_be(tensor_type: GGMLType) -> None:
    """The error that is told is that of ggml's own dequantizer, and far below plain rounding's."""
    moments = gathered()
    moments.factor(0.003)
    wanted = weights()
    errors = []
    for sweeps in (0, 1, 3):
        data, error = moments.quantize(tensor_type, wanted, sweeps)
        assert output_error(data, tensor_type, wanted, 0.003) == pytest.approx(error, rel=1e-3)
        errors.append(error)
    plain = output_error(quantize_rows(wanted, tensor_type), tensor_type, wanted, 0.003)
    assert errors[0] < 0.3 * plain
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("tensor_type", [GGMLType.Q4_1, GGMLType.Q6_K, GGMLType.MXFP4])
def test_threads_change_nothing(tensor_type: GGMLType) -> None:
    results = []
    for threads in (1, 1, 3):
        moments = gathered(threads)
        moments.factor(0.01)
        targets = moments.targets(weights())
        results.append((targets, *moments.quantize(tensor_type, targets, 1)))
    for targets, data, error in results[1:]:
        assert (targets == results[0][0]).all()
        assert (data == results[0][1]).all()
        assert error == results[0][2]


@pytest.mark.parametrize("tensor_type", CALIBRATED)
def test_extreme_weights_stay_finite(tensor_type: GGMLType) -> None:
    """Rows of zeros, of one value, of values beyond the type's reach, and a few tokens only."""
    rng = np.random.default_rng(2)
    moments = Moments(N_INPUTS, 1)
    y = rng.normal(size=(3, N_INPUTS)).astype(np.float32)
    moments.add(y, y)
    moments.factor(0.003)
    wanted = np.zeros((5, N_INPUTS), np.float32)
    wanted[1] = 0.25
    wanted[2] = -1.0
    wanted[3, 7] = 1e9
    wanted[4] = 1e-30
    data, _ = moments.quantize(tensor_type, wanted, 1)
    back = dequantize_rows(data, tensor_type, N_INPUTS)
    assert np.isfinite(back).all()
    assert (back[0] == 0).all()
    assert np.abs(back[1] - 0.25).max() < 0.05
    assert np.abs(back[2] + 1.0).max() < 0.2


def test_a_stage_that_reads_nothing_keeps_its_weights() -> None:
    moments = Moments(N_INPUTS, 1)
    nothing = np.zeros((40, N_INPUTS), np.float32)
    moments.add(nothing, nothing)
    moments.factor(0.01)
    np.testing.assert_allclose(moments.targets(weights()), weights(), rtol=1e-6)
    data, _ = moments.quantize(GGMLType.Q8_0, weights(), 1)
    np.testing.assert_allclose(dequantize_rows(data, GGMLType.Q8_0, N_INPUTS), weights(), atol=2e-3)


def test_what_moments_refuse() -> None:
    with pytest.raises(InputError, match="whole panels"):
        Moments(100, 1)
    moments = Moments(N_INPUTS, 1)
    with pytest.raises(InputError, match="no tokens"):
        moments.factor(0.01)
    x, y = inputs(40)
    with pytest.raises(InputError, match="y has shape"):
        moments.add(x, y[:3])
    with pytest.raises(InputError, match="x has shape"):
        moments.add(x[:, :64], y[:, :64])
    moments.add(x, y)
    moments.factor(0.01)
    with pytest.raises(InputError, match="cannot be calibrated"):
        moments.quantize(GGMLType.IQ2_XXS, weights(), 1)
    with pytest.raises(InputError, match="finished"):
        moments.add(x, y)
    small = Moments(32, 1)
    small.add(x[:, :32].copy(), y[:, :32].copy())
    small.factor(0.01)
    with pytest.raises(InputError, match="whole blocks of q4_K"):
        small.quantize(GGMLType.Q4_K, weights()[:, :32].copy(), 1)
    broken = Moments(N_INPUTS, 1)
    x[3, 5] = np.nan
    broken.add(x, x)
    with pytest.raises(NumericError, match="not finite"):
        broken.factor(0.01)


def test_a_call_can_be_cancelled() -> None:
    moments = gathered()
    moments.cancel()
    with pytest.raises(Cancelled):
        moments.factor(0.01)
