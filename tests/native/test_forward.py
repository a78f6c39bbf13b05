"""The engine's forward against the float64 reference and against llama.cpp.

Bars: 1e-5 (relative, Frobenius, of all logits) on the F32 path; 2e-2 on the fast path, whose
operands have 8 to 11 bits. llama.cpp itself rounds activations to 8 bits, so it is held to the
difference that matters: the mean negative log-likelihood.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings
from ggft.system.errors import InputError
from tests.support.blocks import TYPES
from tests.support.engines import as_batch, make_batch, open_engine, relative, set_random_lora
from tests.support.models import CHATML, Spec, spec_for, write_model
from tests.support.reference import token_nats

BARS = {"f32": 1e-5, "fast": 2e-2}
PROSE = """The sun warms the surface of the sea, and some of the water rises into the air as vapour.
High above the ground the air is cold, so the vapour turns back into tiny drops, and many drops
together make a cloud. When the drops grow heavy they fall as rain or snow. Part of the rain runs
into rivers and returns to the sea, part of it sinks into the soil, where plants drink it, and part
is stored in lakes and in the ground for many years. This path of the water has no beginning and no
end, and people call it the water cycle. Without it there would be no forests and no fields."""


@pytest.mark.parametrize("kernels", ["fused", "ggml"])
@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        Spec(tied=True, bias=True, vocab="spm"),
        Spec(rope_freqs=True, rope_base=500000.0, rope_scaling=4.0, head_size=32),
        Spec(types={"*": "Q4_0", "output": "Q8_0"}, n_layer=3),
        Spec(arch="qwen2", qkv_bias=True, rope_base=1e6),
        Spec(arch="qwen3", tied=True, head_size=32),
    ],
    ids=["plain", "tied, bias", "rope", "quantized", "qwen2", "qwen3"],
)
def test_logits_and_nats(tmp_path: Path, spec: Spec, precision: str, kernels: str) -> None:
    tiny, bar = write_model(tmp_path / "tiny.gguf", spec), BARS[precision]
    batch = make_batch(tiny.shape.n_vocab)
    with open_engine(tiny, precision=precision, kernels=kernels) as engine:
        lora = set_random_lora(engine)
        logits, nats = engine.logits(batch), engine.token_nats(batch)
        total, count = engine.evaluate(batch)
    want = tiny.decoder(lora).forward(as_batch(batch))[0]
    real = batch["segments"] >= 0
    assert relative(logits[real], want[real]) < bar
    want_nats = token_nats(want, batch["targets"])
    np.testing.assert_allclose(nats, want_nats, atol=10 * bar)
    assert not nats[batch["targets"] < 0].any()
    assert total == pytest.approx(want_nats.sum(), rel=bar)
    assert count == (batch["targets"] >= 0).sum()


@pytest.mark.parametrize("type_name", TYPES)
def test_every_base_type(tmp_path: Path, type_name: str) -> None:
    """Embedding, linears and output of one type: rows are dequantized as gguf-py does."""
    tiny = write_model(tmp_path / "tiny.gguf", spec_for(type_name, n_layer=1))
    batch = make_batch(tiny.shape.n_vocab, ((5,),), n_tokens=5)
    with open_engine(tiny) as engine:
        logits = engine.logits(batch)
    want = tiny.decoder().forward(as_batch(batch))[0]
    assert relative(logits, want) < BARS["f32"]


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize(
    ("type_name", "changes"),
    [
        ("F16", {}),
        ("Q8_0", {"tied": True}),
        ("Q4_0", {"rope_freqs": True, "rope_scaling": 2.0}),
        ("Q4_K", {"vocab": "spm", "bias": True}),
    ],
)
def test_nats_are_llama_cpps(
    tmp_path: Path, type_name: str, changes: dict[str, Any], precision: str
) -> None:
    """Mean nats of 200 tokens within 0.5% of those from llama.cpp's logits."""
    from ggft.llama.model import LlamaModel

    tiny = write_model(tmp_path / "tiny.gguf", spec_for(type_name, **changes))
    ids = np.random.default_rng(0).integers(3, tiny.shape.n_vocab, 201)
    with LlamaModel(tiny.path, threads=1, device="cpu") as model:
        want = model.nats(ids.tolist()).mean()
    batch = {
        "tokens": ids[None, :-1],
        "positions": np.arange(200)[None],
        "segments": np.zeros((1, 200), int),
        "targets": ids[None, 1:],
    }
    with open_engine(tiny, precision=precision, n_tokens=200) as engine:
        nats, count = engine.evaluate(batch)
    assert nats / count == pytest.approx(want, rel=5e-3)


@pytest.mark.parametrize("precision", BARS)
def test_the_real_models_nats_are_llama_cpps(smollm2: Path, precision: str) -> None:
    """English prose through the default model; `bench/forward_parity.py` does nine types."""
    from ggft.llama.model import LlamaModel, LlamaTokenizer

    ids = LlamaTokenizer(smollm2).encode(PROSE, special=False)
    with LlamaModel(smollm2, n_ctx=512, threads=1, device="cpu") as model:
        want = model.nats(ids).mean()
    n = len(ids) - 1
    batch = {
        "tokens": np.asarray([ids[:-1]]),
        "positions": np.arange(n)[None],
        "segments": np.zeros((1, n), int),
        "targets": np.asarray([ids[1:]]),
    }
    settings = EngineSettings(
        paths=[str(smollm2)], targets=["attn_q"], layer_first=29, layer_last=30, rank=1, alpha=1.0,
        precision=precision, device="cpu", n_tokens=n,
    )  # fmt: skip
    with Engine(settings) as engine:
        nats, count = engine.evaluate(batch)
    assert count == n > 100
    assert want < 4.0
    assert nats / count == pytest.approx(want, rel=5e-3)


def test_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """Packed, padded, or alone: an example's nats are the same."""
    tiny = write_model(tmp_path / "tiny.gguf")
    batch = make_batch(tiny.shape.n_vocab, trained=1.0)
    with open_engine(tiny) as engine:
        together = engine.token_nats(batch)
        for row in range(2):
            for segment in range(batch["segments"][row].max() + 1):
                at = np.flatnonzero(batch["segments"][row] == segment)
                alone = {key: array[row : row + 1, at] for key, array in batch.items()}
                np.testing.assert_allclose(
                    engine.token_nats(alone)[0], together[row, at], rtol=1e-5, atol=1e-5
                )


def test_evaluation_has_no_dropout_and_leaves_gradients_alone(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "tiny.gguf")
    batch = make_batch(tiny.shape.n_vocab)
    with open_engine(tiny, dropout=0.5) as engine:
        set_random_lora(engine)
        first = engine.evaluate(batch)
        dropped, _ = engine.forward_backward(batch, 5)
        before = engine.get_all("grad")
        assert engine.evaluate(batch) == first
        after = engine.get_all("grad")
    assert dropped != first[0]
    for name, grad in before.items():
        np.testing.assert_array_equal(grad, after[name])


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("tokens", 100000, "token"),
        ("tokens", -1, "token"),
        ("targets", 100000, "target"),
        ("positions", -1, "position"),
    ],
)
def test_bad_ids_are_refused(tmp_path: Path, key: str, value: int, word: str) -> None:
    """Before ggml could assert; the message names what is wrong."""
    tiny = write_model(tmp_path / "tiny.gguf")
    batch = make_batch(tiny.shape.n_vocab)
    batch[key][0, 3] = value
    with open_engine(tiny) as engine, pytest.raises(InputError, match=word):
        engine.forward_backward(batch, 0)


@pytest.mark.parametrize("vocab", ["spm", "bpe"])
def test_tiny_vocabularies_are_real(tmp_path: Path, vocab: str) -> None:
    """llama.cpp loads them, and any bytes survive there and back."""
    from ggft.llama.model import LlamaTokenizer

    spec = Spec(vocab=vocab, chat_template=CHATML)
    tiny = write_model(tmp_path / "tiny.gguf", spec)
    tokenizer = LlamaTokenizer(tiny.path)
    text = "the rain, 12 你好 <|im_end|>"
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids).decode().strip() == text
    assert tokenizer.n_vocab == tiny.shape.n_vocab
    assert tokenizer.eos_id == 2
