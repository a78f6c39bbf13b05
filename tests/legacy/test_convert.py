"""Old GGML files converted: same numbers, same logits, nothing left behind."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.gguf.read import GGMLType, GGUFFile, check_decoder, dequantize, read_array, read_gguf
from ggft.legacy.convert import convert_model
from ggft.legacy.reader import LegacyFile, read_legacy
from ggft.llama.model import LlamaModel, LlamaTokenizer
from ggft.recipes.convert import render
from ggft.settings.commands import ConvertConfig
from ggft.system.errors import InputError
from tests.legacy.test_reader import dequantized
from tests.support.legacy_files import DATA, MANIFEST, NAMES, RawGGML, place
from tests.support.reference import Array, Batch, Decoder, Rope, Shape

# The program of ggmf's time rounded activations to 4 bits: its logits are compared with a float64
# forward pass instead.
NOISY_LOGITS = ("ggmf_v1_q4_0", "ggmf_v1_q4_0_2part")
# Each of two programs that round activations to 8 bits is about this far from exact arithmetic.
NOISE = 0.11


def converted(folder: Path, name: str, **settings: Any) -> tuple[LegacyFile, GGUFFile]:
    """Convert a file of the collection."""
    old = place(folder, name)
    report = convert_model(old, folder / "new.gguf", ConvertConfig(force=True, **settings))
    assert report.refusal is None
    return read_legacy(old), read_gguf(folder / "new.gguf")


def whole(file: LegacyFile) -> dict[str, Array]:
    """Return the numbers of an old model by the new names, its parts joined."""
    result = {}
    for tensor in file.tensors:
        pieces = [dequantized(part) for part in tensor.parts]
        values = np.concatenate(pieces, axis=1 if tensor.by_columns else 0)
        result[tensor.name] = values.reshape(tensor.shape[::-1])
    return result


@pytest.mark.parametrize("name", NAMES)
def test_numbers(tmp_path: Path, name: str) -> None:
    """Equal but for scales (and unpacked numbers) rounded to F16; copied types byte for byte."""
    old, new = converted(tmp_path, name)
    values = whole(old)
    assert set(values) == set(new.tensors)
    for tensor in old.tensors:
        info = new.tensors[tensor.name]
        assert info.shape == tensor.shape
        got, expected = dequantize(info), values[tensor.name]
        if tensor.layout.copies:
            assert (got == expected).all()
            raw = b"".join(
                part.path.read_bytes()[part.offset : part.offset + part.n_bytes]
                for part in tensor.parts
            )
            assert read_array(info).tobytes() == raw
            continue
        assert info.type is (tensor.layout.target or GGMLType.F16)
        # F16 moves a scale, a minimum or a number by at most 2^-11 of itself, or 2^-25 when tiny.
        largest = np.abs(expected.reshape(expected.shape[0], -1)).max(axis=1, keepdims=True)
        assert (np.abs(got - expected) <= 3 * 2**-11 * largest + 2**-20).all()
        rms = np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean())
        assert rms < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_logits(tmp_path: Path, name: str) -> None:
    """The logits of today's llama.cpp against those that the original program recorded."""
    _, new = converted(tmp_path, name)
    recorded = np.load(DATA / f"{name}.npz")
    expected = recorded["logits"]
    if name in NOISY_LOGITS:
        expected = np.load(DATA / "ggmf_v1_q4_0.npz")["logits_f64"]
    with LlamaModel(new.path, n_ctx=64, threads=1) as model:
        got = model.logits(MANIFEST["tokens"]).astype(np.float64)
    cosine = (got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected)
    # K-quants are copied byte for byte; both programs round activations, and these files have one
    # block only, so that the noise is not averaged out.
    assert cosine >= (0.99985 if name == "ggjt_v3_q3_k_m" else 0.9999)
    top_two = np.sort(expected, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > NOISE
    assert clear.mean() > 0.5
    assert (got.argmax(axis=1) == expected.argmax(axis=1))[clear].all()
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 15 / 16


@pytest.mark.parametrize("name", NAMES)
def test_exact_logits(tmp_path: Path, name: str) -> None:
    """Without rounded activations: as far from the original program as the original numbers."""
    if name == "ggmf_v1_q4_0_2part":
        expected, limit = np.load(DATA / "ggmf_v1_q4_0.npz")["logits_f64"], 0.0
    else:
        expected = np.load(DATA / f"{name}.npz")["logits"]
        limit = MANIFEST["files"][name]["logits_vs_float64_max_abs"]
    _, new = converted(tmp_path, name)
    info = check_decoder(new)
    assert info.norm_eps == pytest.approx(MANIFEST["files"][name]["rms_eps"])
    weights = {name: dequantize(t).astype(np.float64) for name, t in new.tensors.items()}
    rope = Rope(info.n_embd_head, info.rope_base)
    shape = Shape(info.n_layer, info.n_head, info.n_head_kv, info.n_vocab, rope, info.norm_eps)
    tokens = np.array([MANIFEST["tokens"]])
    n = tokens.shape[1]
    batch = Batch(tokens, np.arange(n)[None], np.zeros((1, n), int), np.full((1, n), -1))
    got = Decoder(shape, weights).forward(batch)[0][0]
    assert np.abs(got - expected).max() <= limit + 0.008


@pytest.mark.parametrize("name", [n for n in NAMES if "tokenize" in MANIFEST["files"][n]])
def test_tokens(tmp_path: Path, name: str) -> None:
    """Today's tokenizer gives the ids that the original program gave.

    The `ggml` container has no scores, so that its program broke ties at random places; its files
    hold the same vocabulary as the others, and llama's own scores are rebuilt for them.
    """
    _, new = converted(tmp_path, name)
    reference = name if MANIFEST["files"][name]["container"] != "ggml" else "ggjt_v1_q4_0"
    tokenizer = LlamaTokenizer(new.path)
    for text, ids in zip(
        MANIFEST["tokenize_texts"], MANIFEST["files"][reference]["tokenize"], strict=True
    ):
        # The old program took the leading space as given; SentencePiece puts it there itself.
        assert [1, *tokenizer.encode(text[1:], special=False)] == ids


def test_rebuilt_scores_equal_stored_ones(tmp_path: Path) -> None:
    _, without = converted(tmp_path, "ggml_q4_0")
    _, stored = converted(tmp_path, "ggjt_v1_q4_0")
    for key in ("tokens", "scores", "token_type"):
        full = f"tokenizer.ggml.{key}"
        assert list(without.metadata[full]) == list(stored.metadata[full])  # type: ignore[arg-type]


def test_a_converted_file_trains_and_answers(tmp_path: Path) -> None:
    from ggft.recipes.finetune import finetune
    from ggft.settings.training import FinetuneConfig

    _, new = converted(tmp_path, "ggjt_v2_q8_0", context=256)
    data = tmp_path / "train_data.json"
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in "abcdefgh"]
    data.write_text(json.dumps(rows))
    finetune(
        FinetuneConfig(
            model=str(new.path), data=(str(data),), output=str(tmp_path / "run"), max_steps=2,
            threads=1,
        )
    )  # fmt: skip
    adapter = tmp_path / "run" / "adapter.gguf"
    with LlamaModel(new.path, adapter, n_ctx=64, threads=1) as model:
        assert model.logits([1, 300, 301]).shape == (3, 320)


# ---- what the old file does not say --------------------------------------------------------


def raw(folder: Path, name: str = "old.bin", **pieces: Any) -> Path:
    path = folder / name
    path.write_bytes(RawGGML(**pieces).bytes())
    return path


@pytest.mark.parametrize(
    ("name", "pieces", "family", "context", "eps"),
    [
        ("a.bin", {"container": "ggml"}, "Llama 1", 2048, 1e-6),
        ("llama-2.bin", {"version": 2}, "Llama 1", 2048, 1e-6),
        ("a.bin", {}, "Llama 1", 2048, 1e-6),
        ("llama-2-7b-chat.ggmlv3.q4_0.bin", {}, "Llama 2", 4096, 1e-5),
        ("codellama-7b.ggmlv3.bin", {}, "Code Llama", 16384, 1e-5),
        (
            "a.bin",
            {"extra": {f"layers.0.attention.{w}.weight": ((8, 4), 0) for w in ("wk", "wv")}},
            "Llama 2",
            4096,
            1e-5,
        ),
    ],
)
def test_the_family_is_inferred_and_printed(
    tmp_path: Path, name: str, pieces: dict[str, Any], family: str, context: int, eps: float
) -> None:
    report = convert_model(raw(tmp_path, name, **pieces), tmp_path / "new.gguf")
    info = check_decoder(read_gguf(tmp_path / "new.gguf"))
    assert info.n_ctx == context
    assert info.norm_eps == pytest.approx(eps)
    assert f"family           {family}" in render(report)
    assert info.n_head_kv == (1 if "extra" in pieces else 2)


def test_flags_override(tmp_path: Path) -> None:
    config = ConvertConfig(context=8192, eps=2e-5, rope_base=1e6, name="mine", gqa=1)
    report = convert_model(raw(tmp_path), tmp_path / "new.gguf", config)
    file = read_gguf(tmp_path / "new.gguf")
    info = check_decoder(file)
    assert (info.n_ctx, info.rope_base) == (8192, 1e6)
    assert info.norm_eps == pytest.approx(2e-5)
    assert file.get("general.name") == "mine"
    assert "given" in render(report)
    with pytest.raises(InputError, match="--gqa contradicts"):
        convert_model(raw(tmp_path), tmp_path / "newer.gguf", ConvertConfig(gqa=2))


@pytest.mark.parametrize(("type_name", "limit"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 2e-2)])
def test_the_type_for_what_cannot_be_held(tmp_path: Path, type_name: str, limit: float) -> None:
    old, new = converted(tmp_path, "ggjt_v1_q4_3", type=type_name)
    values = whole(old)
    for tensor in old.tensors:
        if tensor.layout.target is None:
            info = new.tensors[tensor.name]
            assert info.type is GGMLType[type_name]
            error = np.abs(dequantize(info) - values[tensor.name]).max()
            assert error <= limit * np.abs(values[tensor.name]).max()


# ---- vocabularies --------------------------------------------------------------------------


def test_vocabulary_of_an_old_file(tmp_path: Path) -> None:
    tokens = [*RawGGML().vocabulary(), b"x y", b"[PAD]", b"my word", b"x y"]
    scores = [0.0] * 259 + [0.0, -1.0, -2.0, -3.0, -1000.0, -1000.0, -1000.0]
    report = convert_model(raw(tmp_path, tokens=tokens, scores=scores), tmp_path / "new.gguf")
    file = read_gguf(tmp_path / "new.gguf")
    texts = list(file.metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    types = list(file.metadata["tokenizer.ggml.token_type"])  # type: ignore[arg-type]
    assert texts[:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert texts[259:] == ["▁", "a", "▁a", "x▁y", "[PAD]", "my word", "x y"]
    assert types == [2, 3, 3] + [6] * 256 + [1] * 4 + [3, 4, 4]
    assert file.get("tokenizer.ggml.padding_token_id") == 263
    assert "3 added tokens, from id 263" in render(report)


def test_two_tokens_of_one_text_are_told_apart(tmp_path: Path) -> None:
    """llama.cpp stops the whole process at such a vocabulary."""
    tokens = [*RawGGML().vocabulary(), b"a\0b", b""]
    report = convert_model(raw(tmp_path, tokens=tokens), tmp_path / "new.gguf")
    assert report.refusal is None
    texts = read_gguf(tmp_path / "new.gguf").metadata["tokenizer.ggml.tokens"]
    assert list(texts)[-2:] == ["<duplicate_262>", "<duplicate_263>"]  # type: ignore[arg-type]


def test_gpt4all_counts_a_token_that_it_does_not_store(tmp_path: Path) -> None:
    tokens = [*RawGGML().vocabulary(), *(f"t{i}".encode() for i in range(262, 32000)), b"-"]
    old = raw(tmp_path, container="ggml", tokens=tokens, stored_tokens=32000)
    report = convert_model(old, tmp_path / "new.gguf")
    file = read_gguf(tmp_path / "new.gguf")
    assert file.metadata["tokenizer.ggml.tokens"][32000] == "[PAD]"  # type: ignore[index]
    assert file.get("tokenizer.ggml.padding_token_id") == 32000
    assert "token 32000 is not stored" in render(report)


def test_a_vocabulary_that_is_no_llamas_is_refused(tmp_path: Path) -> None:
    old = raw(tmp_path, tokens=[b"tok%d" % i for i in range(300)])
    with pytest.raises(InputError, match="the vocabulary is not a llama's"):
        convert_model(old, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    """Return a piece as SentencePiece's protocol buffer has it."""
    body = (
        b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
    )
    if kind is not None:
        body += b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json", "a file"])
def test_vocabulary_from_a_tokenizer_folder(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    pieces += [("▁", 1), ("ab", 1), ("▁ab", 1)]
    if form == "tokenizer.json":
        added = [
            {"id": 0, "content": "<unk>", "special": True},
            {"id": 1, "content": "<s>", "special": True},
            {"id": 2, "content": "</s>", "special": True},
            {"id": 262, "content": "<|user|>", "special": True},
        ]
        vocab = {text: i for i, (text, _) in enumerate(pieces)}
        model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab}
        (folder / form).write_text(json.dumps({"model": model, "added_tokens": added}))
    else:
        trainer_spec = b"\x12\x02\x08\x01"  # a field to be skipped
        data = b"".join(piece(t, float(min(0, 259 - i)), k) for i, (t, k) in enumerate(pieces))
        (folder / "tokenizer.model").write_bytes(data + trainer_spec)
        (folder / "added_tokens.json").write_text('{"<|user|>": 262, "<s>": 1}')
    config = {"chat_template": "{{ messages }}", "eos_token": {"content": "<|user|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = folder / "tokenizer.model" if form == "a file" else folder
    old = raw(tmp_path, tokens=[b""] * 264)
    convert_model(old, tmp_path / "new.gguf", ConvertConfig(vocab_dir=str(source)))
    file = read_gguf(tmp_path / "new.gguf")
    texts = list(file.metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    assert texts[259:] == ["▁", "ab", "▁ab", "<|user|>", "<unnamed_263>"]
    assert list(file.metadata["tokenizer.ggml.token_type"])[:4] == [2, 3, 3, 6]  # type: ignore[arg-type]
    assert list(file.metadata["tokenizer.ggml.scores"])[259:262] == [0, -1, -2]  # type: ignore[arg-type]
    assert file.get("tokenizer.ggml.eos_token_id") == 262
    assert file.get("tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b"\xff\xff\xff"),
        ("tokenizer.model", b"\x0a\x7f"),
        ("tokenizer.model", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'),
        ("tokenizer.json", b'{"model": {"byte_fallback": true, "vocab": {"a": 5}}}'),
        ("other.txt", b""),
    ],
)
def test_bad_tokenizer_folders(tmp_path: Path, name: str, data: bytes) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / name).write_bytes(data)
    with pytest.raises(InputError):
        convert_model(raw(tmp_path), tmp_path / "new.gguf", ConvertConfig(vocab_dir=str(folder)))
    assert not (tmp_path / "new.gguf").exists()
