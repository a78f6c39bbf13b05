from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ggft.llama import model as llamacpp
from ggft.llama.model import LlamaModel, LlamaTokenizer
from ggft.system.errors import GgftError, InputError
from tests.support.adapters import random_adapter
from tests.support.models import Spec, Tiny, write_model
from tests.support.reference import Array, Batch, Lora

# llama.cpp keeps keys and values in F16 and multiplies F32 weights in F32: 1e-3 of logits of O(1).
LOGITS_TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", Spec())


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> LlamaModel:
    return LlamaModel(tiny.path, device="cpu", threads=1)


def reference_logits(tiny: Tiny, ids: list[int], lora: dict[str, Lora] | None = None) -> Array:
    tokens = np.array([ids])
    positions = np.arange(len(ids))[None]
    batch = Batch(tokens, positions, np.zeros_like(tokens), np.full_like(tokens, -1))
    logits: Array = tiny.decoder(lora).forward(batch)[0][0]
    return logits


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.parametrize(
    "text",
    ["the hen", "", " ", "法国 и ещё", "a\nb\t\0c", "<|im_end|></s>", "\x1b[31m", "é" * 3000, "🙂"],
    ids=lambda text: ascii(text)[:20],
)
def test_text_survives(kind: str, text: str, tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec(vocab=kind))
    tokenizer = LlamaTokenizer(tiny.path)
    ids = tokenizer.encode(text, special=False)
    back = tokenizer.decode(ids).decode()
    if kind == "spm" and text:  # such a vocabulary begins text with a space of its own
        assert back[0] == " "
        back = back[1:]
    assert back == text
    assert all(type(i) is int for i in ids)
    assert not set(ids) & {tokenizer.bos_id, tokenizer.eos_id}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bpe", {"bos_id": 1, "eos_id": 2, "eot_id": 0, "add_bos": False}),
        ("spm", {"bos_id": 1, "eos_id": 2, "eot_id": None, "add_bos": True}),
    ],
)
def test_special_tokens(kind: str, expected: dict[str, object], tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer(write_model(tmp_path / "m.gguf", Spec(vocab=kind)).path)
    assert {name: getattr(tokenizer, name) for name in expected} == expected
    name = tokenizer.token_text(2)
    assert tokenizer.encode(name, special=True) == [2]
    assert tokenizer.encode(name, special=False) != [2]
    assert tokenizer.decode([2]) == name.encode()
    assert tokenizer.is_control(2)
    assert 2 in tokenizer.end_ids


def test_bad_text_and_ids(tiny: Tiny) -> None:
    tokenizer = LlamaTokenizer(tiny.path)
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a\ud800", special=False)
    for token in (-1, tokenizer.n_vocab):
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.decode([token])
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.token_text(token)


def test_logits_are_the_reference_decoders(tiny: Tiny, model: LlamaModel) -> None:
    ids = model.vocabulary.encode("the hen is in the inner world", special=False)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.vocabulary.n_vocab)
    np.testing.assert_allclose(logits, reference_logits(tiny, ids), atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_an_adapter_adds_its_delta(scale: float, tiny: Tiny, tmp_path: Path) -> None:
    loras = random_adapter(tmp_path / "a.gguf", tiny)
    loras = {name: replace(lora, scale=scale * lora.scale) for name, lora in loras.items()}
    with LlamaModel(
        tiny.path, tmp_path / "a.gguf", adapter_scale=scale, device="cpu", threads=1
    ) as tuned:
        ids = tuned.vocabulary.encode("the hen is in the inner world", special=False)
        expected = reference_logits(tiny, ids, loras)
        np.testing.assert_allclose(tuned.logits(ids), expected, atol=LOGITS_TOLERANCE)
    moved = np.abs(expected - reference_logits(tiny, ids)).max()
    assert (moved > 0.1) == (scale > 0)


def test_nats_follow_from_logits(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.vocabulary.encode("the hen is in the inner world", special=False)
    rows = model.logits(ids)[:-1].astype(np.float64)
    expected = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids[1:]]
    np.testing.assert_allclose(model.nats(ids), expected, atol=1e-6)
    monkeypatch.setattr(llamacpp, "N_BATCH", 4)  # over several calls of llama_decode
    np.testing.assert_allclose(model.nats(ids), expected, atol=LOGITS_TOLERANCE)


def test_greedy_takes_the_likeliest(tiny: Tiny, model: LlamaModel) -> None:
    prompt = model.vocabulary.encode("the hen", special=False)
    made = list(model.generate(prompt, temperature=0, max_tokens=12))
    assert made
    logits = model.logits([*prompt, *made])
    likeliest = logits.argmax(axis=1)[len(prompt) - 1 :]
    assert made == likeliest[: len(made)].tolist()
    if len(made) < 12:  # it stopped at an end token
        assert likeliest[len(made)] in model.vocabulary.end_ids


def test_a_seed_repeats_sampling(model: LlamaModel) -> None:
    prompt = model.vocabulary.encode("the hen", special=False)

    def sample(seed: int | None, top_p: float = 1.0) -> list[int]:
        return list(model.generate(prompt, seed=seed, temperature=1.5, max_tokens=20, top_p=top_p))

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in range(5)}) > 1
    assert len({tuple(sample(None)) for _ in range(5)}) > 1
    greedy = list(model.generate(prompt, temperature=0, max_tokens=20))
    assert sample(3, top_p=1e-6) == greedy


def test_stop_ids_end_the_answer(model: LlamaModel) -> None:
    prompt = model.vocabulary.encode("the hen", special=False)
    made = list(model.generate(prompt, temperature=0, max_tokens=8))
    stop = made[-1]
    again = list(model.generate(prompt, temperature=0, max_tokens=8, stop_ids=[stop]))
    assert again == made[: made.index(stop)]


def test_the_cache_changes_nothing(tiny: Tiny, model: LlamaModel) -> None:
    first = model.vocabulary.encode("the hen is in", special=False)
    second = [*first, *list(model.generate(first, temperature=0, max_tokens=6)), 5, 6]
    from_cache = list(model.generate(second, temperature=0, max_tokens=6))
    with LlamaModel(tiny.path, device="cpu", threads=1) as fresh:
        assert from_cache == list(fresh.generate(second, temperature=0, max_tokens=6))


def test_the_context_is_a_limit_told_in_numbers(tiny: Tiny) -> None:
    with LlamaModel(tiny.path, n_ctx=32, device="cpu", threads=1) as small:
        with pytest.raises(InputError, match="found 33 tokens, expected at most 31"):
            list(small.generate([5] * 33))
        with pytest.raises(InputError, match="longer than the context"):
            small.logits([5] * 33)
        with pytest.raises(InputError, match="the prompt is empty"):
            list(small.generate([]))
        made = list(small.generate([5] * 30, temperature=0, max_tokens=100))
        assert len(made) <= 3  # the last one need not be read any more
        assert LlamaModel(tiny.path, n_ctx=10**6, device="cpu").n_ctx == tiny.spec.n_ctx


def test_files_that_llama_cpp_refuses(tiny: Tiny, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", Spec(n_embd=96, n_ff=64))
    random_adapter(tmp_path / "a.gguf", other)
    with pytest.raises(InputError, match="the adapter does not fit this model") as error:
        LlamaModel(tiny.path, tmp_path / "a.gguf")
    assert "tiny.gguf" in str(error.value)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "no.gguf", tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(GgftError):
            LlamaTokenizer(path)


def test_the_log_goes_to_logging(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ggft.llama.model"):
        LlamaTokenizer(tiny.path)
    assert any("llama" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr() == ("", "")
