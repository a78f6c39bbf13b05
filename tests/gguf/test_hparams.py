"""Models checked against themselves before the engine sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ggft.gguf.read import check_decoder, check_model, read_gguf
from ggft.system.errors import InputError
from tests.support.models import Spec, model_metadata, write_model
from tests.support.raw_gguf import f32, model, numbers, refused, strings, text, u32

MODEL_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "9 zero dimension": (
        {"tensors": {"blk.0.ffn_up.weight": ((8, 0), 0)}},
        "wrong shape of blk.0.ffn_up.weight",
    ),
    "16 block_count 0": ({"llama__block_count": u32("llama.block_count", 0)}, "block_count"),
    "16 block_count 513": ({"llama__block_count": u32("llama.block_count", 513)}, "block_count"),
    "16 block_count too large": (
        {"llama__block_count": u32("llama.block_count", 2)},
        "tensor blk.1.attn_norm.weight is missing",
    ),
    "16 block_count too small": (
        {"tensors": {"blk.1.attn_norm.weight": ((8,), 0)}},
        "contradicts the hyper-parameters",
    ),
    "16 block_count text": ({"llama__block_count": text("llama.block_count", "1")}, "block_count"),
    "16 missing": ({"llama__embedding_length": None}, "embedding_length is missing"),
    "17 head_count 0": (
        {"llama__attention__head_count": u32("llama.attention.head_count", 0)},
        "head_count",
    ),
    "17 head_count_kv does not divide": (
        {"llama__attention__head_count_kv": u32("llama.attention.head_count_kv", 3)},
        "a divisor of 2 heads",
    ),
    "17 head count does not divide": (
        {"llama__attention__head_count": u32("llama.attention.head_count", 3)},
        "a divisor of embedding_length 8",
    ),
    "17 vocabulary too large": (
        {"tensors": {"token_embd.weight": ((8, 5), 0)}},
        "does not fit the token embedding",
    ),
    "17 vocab_size": ({"llama__vocab_size": u32("llama.vocab_size", 7)}, "vocab_size"),
    "17 scores too short": (
        {"tokenizer__ggml__scores": numbers("tokenizer.ggml.scores", 6, "f", [0.0])},
        "scores does not fit",
    ),
    "17 types of the wrong type": (
        {"tokenizer__ggml__token_type": numbers("tokenizer.ggml.token_type", 6, "f", [0.0] * 6)},
        "token_type does not fit",
    ),
    "17 no vocabulary": ({"tokenizer__ggml__tokens": None}, "no vocabulary"),
    "17 two equal tokens": (
        {"tokenizer__ggml__tokens": strings("tokenizer.ggml.tokens", ["a"] * 6),
         "tokenizer__ggml__token_type": None},
        "same text",
    ),
    "17 two tokens equal up to a NUL": (
        {"tokenizer__ggml__tokens": strings(
            "tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<0x0A>", "a\0b", "a\0c"])},
        "same text",
    ),
    "17 an empty token and its substitute": (
        {"tokenizer__ggml__tokens": strings(
            "tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<0x0A>", "[EMPTY_5]", ""])},
        "same text",
    ),
    "17 no merges": (
        {"tokenizer__ggml__model": text("tokenizer.ggml.model", "gpt2")},
        "merges does not fit",
    ),
    "18 EOS out of range": (
        {"tokenizer__ggml__eos_token_id": u32("tokenizer.ggml.eos_token_id", 6)},
        "eos_token_id is outside",
    ),
    "18 EOS -1": (
        {"tokenizer__ggml__eos_token_id": u32("tokenizer.ggml.eos_token_id", 0xFFFFFFFF)},
        "eos_token_id is outside",
    ),
    "18 byte token <0x-1>": (
        {"tokenizer__ggml__tokens": strings(
            "tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<0x-1>", "a", "b"])},
        "marked as a byte",
    ),
    "18 byte token <0xZZ>": (
        {"tokenizer__ggml__tokens": strings(
            "tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<0xZZ>", "a", "b"])},
        "marked as a byte",
    ),
    "18 byte token too short": (
        {"tokenizer__ggml__tokens": strings(
            "tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<", "a", "b"])},
        "marked as a byte",
    ),
    "21 architecture": (
        {"general__architecture": text("general.architecture", "mamba")},
        "mamba.block_count is missing",
    ),
    "21 no architecture": ({"general__architecture": None}, "unsupported architecture"),
    "21 mixture of experts": (
        {"tensors": {"blk.0.ffn_gate_exps.weight": ((8, 16, 4), 0)}},
        "mixture-of-experts",
    ),
    "adapter": ({"general__type": text("general.type", "adapter")}, "not a model"),
    "rope dimension": (
        {"llama__rope__dimension_count": u32("llama.rope.dimension_count", 2)},
        "the head size, 4",
    ),
    "rope scaling": (
        {"llama__rope__scaling__type": text("llama.rope.scaling.type", "longrope")},
        "none, linear, yarn",
    ),
    "epsilon": (
        {"llama__attention__layer_norm_rms_epsilon":
         f32("llama.attention.layer_norm_rms_epsilon", float("nan"))},
        "a number from 0 to 1",
    ),
    "norm of the wrong type": (
        {"tensors": {"output_norm.weight": ((8,), 1)}},
        "wrong type of output_norm",
    ),
    "matrix of the wrong type": (
        {"tensors": {"blk.0.attn_q.weight": ((8, 8), 24)}},
        "wrong type of blk.0.attn_q",
    ),
    "unknown tensor": ({"tensors": {"extra.weight": ((8,), 0)}}, "does not have"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_model_faults(tmp_path: Path, fault: str) -> None:
    changes, message = MODEL_FAULTS[fault]
    path = tmp_path / "model.gguf"
    path.write_bytes(model(**changes).bytes())
    file = read_gguf(path)
    assert message in str(refused(path, lambda _: check_decoder(file)))


def test_good_models(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model().bytes())
    info = check_decoder(read_gguf(path))
    assert (info.n_embd_head, info.n_vocab, info.tied_output, info.rope_scaling) == (
        4,
        6,
        True,
        "none",
    )
    assert info.special_ids == {"eos": 2}
    # Real files have such: a padding id outside the vocabulary, and per-block lists.
    path.write_bytes(
        model(
            tokenizer__ggml__padding_token_id=u32("tokenizer.ggml.padding_token_id", 99),
            llama__feed_forward_length=numbers("llama.feed_forward_length", 5, "i", [16]),
        ).bytes()
    )
    assert check_decoder(read_gguf(path)).n_ff == 16


@pytest.mark.parametrize(
    "spec",
    [Spec(), Spec(bias=True, vocab="spm"), Spec(tied=True, rope_freqs=True, rope_scaling=2.0)],
    ids=["plain", "bias", "rope"],
)
def test_tiny_models(tmp_path: Path, spec: Spec) -> None:
    info = check_decoder(read_gguf(write_model(tmp_path / "m.gguf", spec).path))
    assert info.rope_factor == spec.rope_scaling
    assert info.has_rope_freqs == spec.rope_freqs
    assert info.tied_output == spec.tied


def test_the_default_model(smollm2: Path) -> None:
    info = check_decoder(read_gguf(smollm2))
    assert (info.n_layer, info.n_embd, info.n_head_kv, info.n_vocab) == (30, 576, 3, 49152)


def test_an_rwkv_tokenizer_has_the_bytes_that_its_tokens_begin_with(tmp_path: Path) -> None:
    def write(tokens: list[str]) -> Path:
        extra = {
            "tokenizer.ggml.model": "rwkv",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * len(tokens),
        }
        return write_model(tmp_path / "m.gguf", Spec(extra=extra)).path

    n_vocab = len(model_metadata(Spec())["tokenizer.ggml.tokens"])
    texts = [f"\\x{i:02x}" for i in range(256)] + ["é"] + [f"a{i}" for i in range(n_vocab - 257)]
    assert check_model(read_gguf(write(texts))).n_vocab == n_vocab
    texts[0xC3] = "ab"
    with pytest.raises(InputError, match="begins with a byte that is no token"):
        check_model(read_gguf(write(texts)))
