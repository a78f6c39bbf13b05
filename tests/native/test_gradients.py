"""The engine's LoRA gradient against the float64 reference, and against itself.

Norm: Frobenius norm of the difference over that of the reference, for all lora_a and lora_b
together (`whole`); a single small tensor averages rounding less and may be half as far off again.
Bars: 1e-5 on the F32 path (float32 sums of up to 256 products through two blocks); 2e-2 on the
fast path (BF16, F16 or quantized operands: 2^-8 per product, averaged by the sums). What must not
depend on rounding is compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.system.errors import InputError
from tests.support.blocks import TYPES
from tests.support.engines import (
    PACKED,
    PATHS,
    T,
    as_batch,
    gradient_errors,
    make_batch,
    open_engine,
    set_random_lora,
)
from tests.support.models import KINDS, Spec, Tiny, spec_for, write_model
from tests.support.reference import LINEARS

BARS = {"f32": 1e-5, "fast": 2e-2}
PRECISIONS = ("f32", "fast")
KERNELS = ("fused", "ggml")

MODELS = {
    **KINDS,
    "mha": Spec(n_head_kv=4),
    "mqa, three layers": Spec(n_head_kv=1, n_layer=3),
    "tied": Spec(tied=True),
    "wide heads": Spec(head_size=32),
    "spm, odd head count": Spec(vocab="spm", n_embd=96, n_head=3, n_head_kv=1, n_ff=160),
    "k-quant mix": spec_for(
        "Q4_K",
        types={"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"},
        tied=True,
    ),
}

Make = Callable[[Spec], Tiny]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write each model once for the whole file."""
    folder: Path = tmp_path_factory.mktemp("models")
    written: list[tuple[Spec, Tiny]] = []

    def make_model(spec: Spec) -> Tiny:
        for known, tiny in written:
            if known == spec:
                return tiny
        written.append((spec, write_model(folder / f"{len(written)}.gguf", spec)))
        return written[-1][1]

    return make_model


def check_gradient(
    tiny: Tiny, bar: float, lengths: tuple[tuple[int, ...], ...] = PACKED, **settings: Any
) -> None:
    """Compare loss and the whole gradient of a packed batch with the reference."""
    n_tokens = settings.get("n_tokens", T)
    batch = make_batch(tiny.shape.n_vocab, lengths, n_tokens)
    with open_engine(tiny, **settings) as engine:
        lora = set_random_lora(engine)
        nats, count = engine.forward_backward(batch, 0)
        got = engine.get_all("grad")
    want_nats, want = tiny.decoder(lora).gradients(as_batch(batch))
    assert count == (batch["targets"] >= 0).sum()
    assert nats == pytest.approx(want_nats, rel=bar)
    errors = gradient_errors(got, want)
    assert errors["whole"] <= bar, errors
    assert max(errors.values()) <= 1.5 * bar, errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", MODELS)
def test_whole_gradient(make: Make, model: str, path: str) -> None:
    settings = PATHS[path]
    check_gradient(make(MODELS[model]), BARS[settings["precision"]], **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        (((70, 1, 63, 64, 2), (129, 71)), {}),
        (((200,), (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)), {"n_head_kv": 1, "head_size": 64}),
        (((65, 64, 63), (128, 1, 1)), {"n_head": 2, "n_head_kv": 2, "head_size": 128}),
        (((199,),), {"n_head": 6, "n_head_kv": 2, "head_size": 40, "vocab": "spm"}),
    ],
    ids=["16", "64", "128", "40"],
)
def test_long_rows(
    make: Make,
    lengths: tuple[tuple[int, ...], ...],
    changes: dict[str, Any],
    path: str,
) -> None:
    """Examples that begin and end at, before and after the borders of 32- and 64-token blocks."""
    settings = PATHS[path]
    threads = 2 if settings["kernels"] == "fused" else 1
    check_gradient(
        make(Spec(**changes)), BARS[settings["precision"]], lengths, n_tokens=200,
        threads=threads, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("type_name", TYPES)
def test_every_base_type(make: Make, type_name: str, precision: str) -> None:
    tiny = make(spec_for(type_name, n_layer=1))
    check_gradient(tiny, BARS[precision], precision=precision)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        *(((name,), (0, 2)) for name in LINEARS),
        (("attn_q", "attn_v"), (0, 2)),
        (("ffn_gate", "attn_k"), (1, 2)),
        (LINEARS, (0, 1)),
    ],
)
def test_subset_of_linears_and_layers(
    make: Make, targets: tuple[str, ...], layers: tuple[int, int], kernels: str
) -> None:
    tiny = make(Spec(bias=True))
    first, last = layers
    settings: dict[str, Any] = {
        "targets": list(targets),
        "layer_first": first,
        "layer_last": last,
    }
    with open_engine(tiny, kernels=kernels, **settings) as engine:
        assert {name.split(".")[2] for name in engine.parameters} == set(targets)
        assert {int(name.split(".")[1]) for name in engine.parameters} == set(range(first, last))
    check_gradient(tiny, BARS["f32"], kernels=kernels, **settings)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_recomputed_equals_kept(make: Make, precision: str, kernels: str, dropout: float) -> None:
    """Bit for bit: the same operations on the same numbers, dropout masks included."""
    results = []
    for keep in (False, True):
        tiny, settings = make(MODELS["mixed types"]), {"precision": precision, "kernels": kernels}
        with open_engine(tiny, keep=keep, dropout=dropout, **settings) as engine:
            set_random_lora(engine)
            nats, _ = engine.forward_backward(make_batch(tiny.shape.n_vocab), 11)
            results.append((nats, engine.get_all("grad")))
    (nats, grads), (kept_nats, kept) = results
    assert nats == kept_nats
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, kept[name], err_msg=name)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_repeats_bit_for_bit(make: Make, precision: str, threads: int) -> None:
    """Two engines with the same seeds end with the same weights."""
    tiny, ends = make(MODELS["mixed types"]), []
    for _ in range(2):
        with open_engine(tiny, precision=precision, threads=threads, dropout=0.1) as engine:
            engine.init_lora(seed=3)
            for step in range(3):
                batch = make_batch(tiny.shape.n_vocab, seed=step)
                _, count = engine.forward_backward(batch, 100 + step)
                engine.optimizer_step(1e-2, count)
            ends.append(engine.get_all())
    for name, values in ends[0].items():
        np.testing.assert_array_equal(values, ends[1][name], err_msg=name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_micro_batches_equal_one_batch(make: Make, precision: str) -> None:
    """Rows with many and with few trained tokens, together or one after the other.

    Float sums in another order: 1e-5 on the F32 path. The fast path rounds each row alone, so its
    rows do not depend on their neighbours either; 1e-3 leaves room for a GEMM that does.
    """
    tiny = make(MODELS["gqa"])
    batch = make_batch(tiny.shape.n_vocab)
    batch["targets"][1, 1:] = -1
    batch["targets"][1, 0] = 5
    with open_engine(tiny, precision=precision) as engine:
        set_random_lora(engine)
        nats, count = engine.forward_backward(batch, 0)
        whole = engine.get_all("grad")
        engine.zero_grad()
        assert not any(grad.any() for grad in engine.get_all("grad").values())
        parts = [
            engine.forward_backward({key: array[row : row + 1] for key, array in batch.items()}, 0)
            for row in range(2)
        ]
        summed = engine.get_all("grad")
    assert parts[1][1] == 1
    assert sum(n for _, n in parts) == count
    assert sum(x for x, _ in parts) == pytest.approx(nats, rel=1e-5)
    errors = gradient_errors(summed, whole)
    assert max(errors.values()) <= {"f32": 1e-5, "fast": 1e-3}[precision], errors


def test_padding_and_packing_change_nothing(make: Make) -> None:
    """Three examples in one row with padding give what each gives alone."""
    tiny = make(MODELS["gqa"])
    batch = make_batch(tiny.shape.n_vocab, ((9, 6, 5),))
    with open_engine(tiny) as engine:
        set_random_lora(engine)
        engine.forward_backward(batch, 0)
        packed = engine.get_all("grad")
        engine.zero_grad()
        for segment in range(3):
            at = np.flatnonzero(batch["segments"][0] == segment)
            alone = {key: array[:, at] for key, array in batch.items()}
            engine.forward_backward({**alone, "segments": np.zeros_like(alone["tokens"])}, 0)
        apart = engine.get_all("grad")
    assert max(gradient_errors(apart, packed).values()) <= 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradient_is_the_slope_of_the_engines_own_loss(make: Make, kernels: str) -> None:
    """Fourth-order central differences along the gradient, dropout on and its seed fixed.

    A float32 loss of about 100 nats is known to 1e-5; over a change of a nat that is 1e-5 of the
    slope, and the bar of 1e-3 leaves room for the accumulated rounding of the forward.
    """
    tiny = make(MODELS["tied"])
    batch = make_batch(tiny.shape.n_vocab)
    with open_engine(tiny, dropout=0.2, kernels=kernels) as engine:
        set_random_lora(engine)
        start = engine.get_all()
        engine.forward_backward(batch, 9)
        grads = {name: g.astype(np.float64) for name, g in engine.get_all("grad").items()}
        slope = np.sqrt(sum((g * g).sum() for g in grads.values()))

        def loss(step: float) -> float:
            for name, value in start.items():
                engine.set(name, "value", (value + step * grads[name] / slope).astype(np.float32))
            return engine.forward_backward(batch, 9)[0]

        h = 0.01
        central = (8 * (loss(h) - loss(-h)) - loss(2 * h) + loss(-2 * h)) / (12 * h)
    assert central == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("head_size", [256, 320, 512, 576, 1024])
def test_large_heads(make: Make, head_size: int) -> None:
    """Heads that the fused kernels cannot compute take the portable operations."""
    tiny = make(Spec(head_size=head_size, n_head=2, n_head_kv=1))
    check_gradient(tiny, BARS["f32"], kernels="auto")
    kernels = "fused" if head_size <= 256 else "ggml"
    with open_engine(tiny, kernels="auto") as engine:
        assert engine.info()["kernels"] == kernels
    if kernels == "ggml":
        with pytest.raises(InputError, match=f"attention heads of {head_size} are larger"):
            open_engine(tiny, kernels="fused")


@pytest.mark.parametrize(("n_rows", "n_tokens"), [(64, 16), (200, 2), (1, 2200)])
def test_any_number_of_rows(make: Make, n_rows: int, n_tokens: int) -> None:
    """The portable graph grows with rows and with pieces of attention."""
    tiny = make(Spec(n_layer=1, n_head=4, n_head_kv=4))
    batch = make_batch(tiny.shape.n_vocab, ((n_tokens,),) * n_rows, n_tokens)
    losses, gradients = [], []
    for kernels in KERNELS:
        with open_engine(tiny, kernels=kernels, n_rows=n_rows, n_tokens=n_tokens) as engine:
            set_random_lora(engine)
            losses.append(engine.forward_backward(batch, 0)[0])
            gradients.append(engine.get_all("grad"))
    assert losses[0] == pytest.approx(losses[1], rel=BARS["f32"])
    assert gradient_errors(*gradients)["whole"] <= BARS["f32"]
