"""Each operation's forward and local gradient against the float64 reference, one by one.

The engine runs an operation on given arrays (`probe`), with the weights, rotary angles and adapter
of block 0. Norm: ‖difference‖ / ‖reference‖ of every output and gradient. Bars: 1e-5 on the F32
path, where a float32 sum of a few hundred terms is good to 1e-6; 2e-2 on the fast path, whose
operands are BF16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ggft.engine.engine import Engine
from tests.support import reference as ref
from tests.support.engines import PATHS, make_batch, open_engine, relative, set_random_lora
from tests.support.models import Spec, Tiny, matrix_shapes, write_model
from tests.support.reference import LINEARS, Array

BARS = {"f32": 1e-5, "fast": 2e-2}
# Whatever the path, a GPU's products may round their operands to half precision.
GPU_BAR = 5e-3
T = 80
LENGTHS = ((33, 40), (64, 1, 15))
SPEC = Spec(
    types={"*": "Q8_0", "attn_v": "Q4_1", "ffn_down": "F16", "attn_k": "F32"},
    bias=True, rope_freqs=True, rope_scaling=2.0, head_size=24, n_layer=1,
)  # fmt: skip


class Arrays:
    """Random arrays by name, the same for both sides: (B, T, …) here, flat for the engine."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        rng = np.random.default_rng(3)
        self.of = {
            name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self.of[name].astype(np.float64)


def run(engine: Engine, op: str, batch: dict[str, Array], arrays: Arrays, seed: int = 0) -> Any:
    """Return the engine's outputs and gradients as flat arrays."""
    four = (batch[key] for key in ("tokens", "positions", "segments", "targets"))
    return engine._engine.probe(op, *four, seed, arrays.of)


def check(got: dict[str, Array], bar: float, **want: Array) -> None:
    """Compare every result with the reference's."""
    assert set(got) == set(want)
    errors = {name: relative(got[name], array.ravel()) for name, array in want.items()}
    assert max(errors.values()) <= bar, errors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_model(tmp_path_factory.mktemp("ops") / "tiny.gguf", SPEC)


@pytest.fixture(
    params=[
        *PATHS,
        pytest.param("gpu-f32", marks=pytest.mark.gpu),
        pytest.param("gpu-fast", marks=pytest.mark.gpu),
    ]
)
def opened(request: pytest.FixtureRequest, tiny: Tiny) -> Any:
    """Return an engine with random LoRA on every linear, its bar, and the LoRA."""
    if request.param in PATHS:
        settings = PATHS[request.param]
        bar = BARS[settings["precision"]]
    else:
        precision = request.param.removeprefix("gpu-")
        settings = {"device": request.getfixturevalue("gpu"), "precision": precision}
        bar = GPU_BAR
    with open_engine(tiny, n_tokens=T, **settings) as engine:
        yield engine, bar, set_random_lora(engine)


@pytest.fixture
def batch(tiny: Tiny) -> dict[str, Array]:
    return make_batch(tiny.shape.n_vocab, LENGTHS, T)


def test_rms_norm(opened: Any, tiny: Tiny, batch: dict[str, Array]) -> None:
    engine, bar, _ = opened
    shape = (2, T, tiny.spec.n_embd)
    a, w, eps = Arrays(x=shape, dy=shape), tiny.weights["blk.0.attn_norm.weight"], tiny.shape.eps
    y, dx = ref.rms_norm(a["x"], w, eps), ref.rms_norm_vjp(a["dy"], a["x"], w, eps)
    check(run(engine, "rms_norm", batch, a), bar, y=y, dx=dx)


def test_rope(opened: Any, tiny: Tiny, batch: dict[str, Array]) -> None:
    engine, bar, _ = opened
    shape = (2, T, tiny.spec.n_head, tiny.spec.d)
    a, at, spec = Arrays(x=shape, dy=shape), batch["positions"], tiny.shape.rope
    y, dx = ref.rope(a["x"], at, spec), ref.rope_vjp(a["dy"], at, spec)
    check(run(engine, "rope", batch, a), bar, y=y, dx=dx)


def test_swiglu(opened: Any, tiny: Tiny, batch: dict[str, Array]) -> None:
    engine, bar, _ = opened
    shape = (2, T, tiny.spec.n_ff)
    a = Arrays(gate=shape, up=shape, dy=shape)
    dgate, dup = ref.swiglu_vjp(a["dy"], a["gate"], a["up"])
    y = ref.swiglu(a["gate"], a["up"])
    check(run(engine, "swiglu", batch, a), bar, y=y, dgate=dgate, dup=dup)


def test_attention(opened: Any, tiny: Tiny, batch: dict[str, Array]) -> None:
    """Packed examples of 1 to 64 tokens; what padding attends to is nobody's business."""
    engine, bar, _ = opened
    heads, kv = (2, T, tiny.spec.n_head, tiny.spec.d), (2, T, tiny.spec.n_head_kv, tiny.spec.d)
    a = Arrays(q=heads, k=kv, v=kv, dy=heads)
    real = (batch["segments"] >= 0)[..., None, None]
    a.of["dy"] *= real
    y, p = ref.attention(a["q"], a["k"], a["v"], ref.may_attend(batch["segments"]))
    dq, dk, dv = ref.attention_vjp(a["dy"], a["q"], a["k"], a["v"], p)
    got = run(engine, "attention", batch, a)
    got["y"] = got["y"] * np.broadcast_to(real, heads).ravel()
    check(got, bar, y=y, dq=dq, dk=dk, dv=dv)


@pytest.mark.parametrize("site", LINEARS)
def test_linear(opened: Any, tiny: Tiny, batch: dict[str, Array], site: str) -> None:
    """Weight, bias and adapter; the adapter's own gradients, too."""
    engine, bar, lora = opened
    n_out, n_in = matrix_shapes(tiny.spec)[site]
    a, name = Arrays(x=(2, T, n_in), dy=(2, T, n_out)), f"blk.0.{site}"
    one = lora[f"{name}.weight"]
    w, bias = tiny.weights[f"{name}.weight"], tiny.weights[f"{name}.bias"]
    got = run(engine, site, batch, a)
    for which in "ab":
        got[f"d{which}"] = engine.get(f"{name}.weight.lora_{which}", "grad").ravel()
    dx, da, db = ref.linear_vjp(a["dy"], a["x"], w, one)
    assert da is not None
    assert db is not None
    check(got, bar, y=ref.linear(a["x"], w, bias, one), dx=dx, da=da, db=db)


def test_loss(opened: Any, tiny: Tiny, batch: dict[str, Array]) -> None:
    """Cross entropy through the output matrix: nats, and their gradient by its input."""
    engine, bar, _ = opened
    labels = batch["targets"][batch["targets"] >= 0]
    a, w = Arrays(n=(len(labels), tiny.spec.n_embd)), tiny.weights["output.weight"]
    logits = a["n"] @ w.T
    nats, dn = ref.token_nats(logits, labels), ref.token_nats_vjp(logits, labels) @ w
    check(run(engine, "loss", batch, a), bar, nats=nats, dn=dn)


def test_unknown_operations_and_sizes_are_refused(tiny: Tiny, batch: dict[str, Array]) -> None:
    with open_engine(tiny, n_tokens=T) as engine:
        for op, arrays in (("no such", Arrays()), ("rope", Arrays(x=(3,), dy=(3,)))):
            with pytest.raises(Exception, match=r"no operation|is missing"):
                run(engine, op, batch, arrays)
