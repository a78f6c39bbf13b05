"""Old GGML files: layouts as the original programs read them, bad files refused."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from ggft.gguf.cursor import read_bytes
from ggft.gguf.read import GGMLType
from ggft.legacy.blocks import BlockLayout, block_layout, repack, to_blocks, unpack
from ggft.legacy.parse import LegacyTensor, read_part
from ggft.legacy.reader import read_legacy
from ggft.system.errors import InputError
from tests.support.legacy_files import MANIFEST, NAMES, RawGGML, content, place
from tests.support.raw_gguf import refused


def dequantized(tensor: LegacyTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return a tensor's numbers; gguf-py's where the blocks are today's."""
    raw = read_bytes(tensor.path, tensor.offset, tensor.n_bytes, tensor.name)
    rows = raw.reshape(tensor.n_rows, tensor.row_bytes)
    layout = tensor.layout
    if layout.copies and layout.block_size > 1 and layout.target is not None:
        return np.asarray(quants.dequantize(rows, GGMLQuantizationType(int(layout.target))))
    return unpack(to_blocks(rows, layout), layout).reshape(tensor.n_rows, -1)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_equal_the_original_programs_bit_for_bit(tmp_path: Path, name: str) -> None:
    part = read_part(place(tmp_path, name))
    hashes = MANIFEST["files"][name]["dequant_f32_sha256"]
    assert len(hashes) >= 12
    for tensor_name, expected in hashes.items():
        values = dequantized(part.tensors[tensor_name])
        assert hashlib.sha256(values.tobytes()).hexdigest() == expected, tensor_name


@pytest.mark.parametrize("name", NAMES)
def test_headers(tmp_path: Path, name: str) -> None:
    entry = MANIFEST["files"][name]
    file = read_legacy(place(tmp_path, name))
    assert (file.container, file.version) == (entry["container"], entry["version"])
    assert file.hparams.n_head // file.n_head_kv == entry["n_gqa"]
    assert file.block_64 == (entry["qk_k"] == 64)
    assert len(file.tokens) == file.hparams.n_vocab
    assert any(tensor.layout.planar for tensor in file.tensors) == name.endswith("planar")


@pytest.mark.parametrize("suffix", ["", ".1"])
def test_any_part_gives_the_whole_model(tmp_path: Path, suffix: str) -> None:
    path = place(tmp_path, "ggmf_v1_q4_0_2part")
    file = read_legacy(Path(f"{path}{suffix}"))
    assert file.paths == (path, Path(f"{path}.1"))
    assert {len(t.parts) for t in file.tensors if len(t.shape) == 2} == {2}
    assert {t.shape[0] for t in file.tensors} == {64, 192}


def test_bad_parts(tmp_path: Path) -> None:
    path = place(tmp_path, "ggmf_v1_q4_0_2part")
    second = Path(f"{path}.1")
    second.unlink()
    assert "part 2 of 2 is missing" in str(refused(path, read_legacy))
    second.write_bytes(content("ggmf_v1_q4_0.bin"))
    assert "differ" in str(refused(path, read_legacy))
    other = bytearray(content("ggmf_v1_q4_0_2part.bin.1"))
    other[40] ^= 1
    second.write_bytes(other)
    assert "differ in their" in str(refused(path, read_legacy))


# ---- repacking -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "version", "number"),
    [
        (container, version, number)
        for container, version, numbers in (("ggjt", 1, (2, 3, 6, 7, 8)), ("ggjt", 2, (2, 3, 8)))
        for number in numbers
    ],
)
def test_repacked_blocks_mean_the_same(container: str, version: int, number: int) -> None:
    """Random codes and scales: what moves must land where it belongs, exactly."""
    layout = block_layout(number, container, version, False)
    assert layout is not None
    assert layout.target is not None
    blocks = random_blocks(layout, 300)
    packed, loss = repack(blocks, layout)
    old = unpack(blocks, layout)
    new = quants.dequantize(packed, GGMLQuantizationType(int(layout.target)))
    # Half of F16's spacing, relative, for the scale and for the minimum.
    np.testing.assert_allclose(new.reshape(old.shape), old, rtol=2**-11, atol=2**-11)
    assert loss.worst <= 2**-11
    if layout.scale_bytes == 2:
        assert loss.worst == 0


def test_64_element_q4_k_becomes_q4_1() -> None:
    layout = block_layout(12, "ggjt", 3, True)
    assert layout is not None
    blocks = random_blocks(layout, 100)
    packed, _ = repack(blocks, layout)
    new = quants.dequantize(packed, GGMLQuantizationType.Q4_1).reshape(100, 64)
    # F16 rounds d·q up to 2·15·15 and the minimum up to 2·15.
    np.testing.assert_allclose(new, unpack(blocks, layout), rtol=0, atol=480 * 2**-11)


def random_blocks(
    layout: BlockLayout, count: int
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return random codes with scales near 1."""
    rng = np.random.default_rng(layout.block_bytes)
    blocks = rng.integers(0, 256, (count, layout.block_bytes), dtype=np.uint8)
    n_scales = 2 if layout.has_min or layout.is_block_64 else 1
    dtype = np.float32 if layout.scale_bytes == 4 else np.float16
    scales = rng.uniform(0.5, 2.0, (count, n_scales)).astype(dtype)
    blocks[:, : n_scales * layout.scale_bytes] = scales.view(np.uint8)
    return blocks


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e6])
def test_scales_that_f16_cannot_hold_are_named(scale: float) -> None:
    layout = block_layout(2, "ggjt", 2, False)
    assert layout is not None
    blocks = random_blocks(layout, 10)
    blocks[7, :4] = np.frombuffer(struct.pack("<f", scale), np.uint8)
    assert repack(blocks, layout)[1].bad_block == 7


def test_tiny_scales_are_reported() -> None:
    layout = block_layout(2, "ggjt", 2, False)
    assert layout is not None
    blocks = random_blocks(layout, 10)
    blocks[3, :4] = np.frombuffer(struct.pack("<f", 1e-6), np.uint8)
    loss = repack(blocks, layout)[1]
    assert loss.n_subnormal == 1
    assert loss.worst > 1e-2


# ---- bad files -----------------------------------------------------------------------------

RAW = RawGGML().bytes()
GOOD_HEADER = 4 + 4 + 28
FAULTS: dict[str, tuple[bytes, str]] = {
    "23 ggmf version 2": (RawGGML("ggmf", 2).bytes(), "unknown version of the ggmf"),
    "23 ggjt version 4": (RawGGML("ggjt", 4).bytes(), "unknown version of the ggjt"),
    "24 a type that the container never had": (
        RawGGML("ggjt", 2, extra={"norm.weight": ((8,), 4)}).bytes(),
        "unknown type",
    ),
    "24 K-quants before v3": (
        RawGGML("ggjt", 1, extra={"norm.weight": ((8,), 12)}).bytes(),
        "unknown type",
    ),
    "25 n_mult 0": (RawGGML(hparams={"n_mult": 0}).bytes(), "bad n_mult"),
    "25 n_mult negative": (RawGGML(hparams={"n_mult": -256}).bytes(), "bad n_mult"),
    "25 n_head 0": (RawGGML(hparams={"n_head": 0}).bytes(), "bad n_head"),
    "25 n_layer negative": (RawGGML(hparams={"n_layer": -1}).bytes(), "bad n_layer"),
    "25 n_vocab huge": (
        RAW[:8] + struct.pack("<i", 1 << 19) + RAW[12:],
        "vocabulary exceeds the file",
    ),
    "26 token length -1": (
        RAW[:GOOD_HEADER] + struct.pack("<i", -1) + RAW[GOOD_HEADER + 4 :],
        "token 0 is too long",
    ),
    "26 token beyond the end": (
        RAW[: GOOD_HEADER + 2300],
        "the file ends inside",
    ),
    "27 tensor header truncated": (RAW + bytes(5), "ends inside a tensor's header"),
    "27 tensor data truncated": (RAW[:-4], "past the end"),
    "27 wrong padding": (RawGGML(padding=b"\1").bytes(), "wrong padding"),
    "27 no padding": (
        b"tjgg" + RawGGML("ggmf", 3).bytes()[4:],
        "wrong padding",
    ),
    "28 missing": (RawGGML(drop=("norm.weight",)).bytes(), "norm.weight is missing"),
    "28 extra": (
        RawGGML(extra={"layers.1.ffn_norm.weight": ((8,), 0)}).bytes(),
        "a llama does not have",
    ),
    "28 far too many": (
        RawGGML(extra={f"rope.freqs{i}": ((8,), 0) for i in range(40)}).bytes(),
        "more tensors than a llama has",
    ),
    "28 no embedding": (
        RawGGML(drop=("tok_embeddings.weight",)).bytes(),
        "tok_embeddings.weight is missing",
    ),
    "28 wrong shape": (
        RawGGML(extra={"layers.0.attention.wo.weight": ((8, 4), 0)}).bytes(),
        "wrong shape of layers.0.attention.wo",
    ),
    "28 heads do not fit": (
        RawGGML(extra={"layers.0.attention.wk.weight": ((8, 6), 0),
                       "layers.0.attention.wv.weight": ((8, 6), 0)}).bytes(),
        "do not fit the attention heads",
    ),
    "28 twice": (RAW + RAW[-600:], "bad"),
    "29 another family's header": (
        b"lmgg" + struct.pack("<7i", 50400, 2048, 4096, 16, 28, 64, 2) + bytes(500000),
        "not a llama",
    ),
    "29 another family's tensors": (
        RawGGML(extra={"transformer.h.0.ln_1.weight": ((8,), 0)}).bytes(),
        "a llama does not have",
    ),
    "29 unknown ftype": (RawGGML(hparams={"ftype": 2002}).bytes(), "bad ftype"),
    "name": (
        RawGGML(extra={"layers.0\x1b[2J": ((8,), 0)}).bytes(),
        "bad tensor name",
    ),
    "GGUF": (b"GGUF\3\0\0\0", "not an old GGML file"),
    "old LoRA": (b"algg\1\0\0\0", "old GGML LoRA"),
    "empty": (b"", "empty file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    raw, message = FAULTS[fault]
    path = tmp_path / "old.bin"
    path.write_bytes(raw)
    assert message in str(refused(path, read_legacy))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    for length in range(0, len(RAW), 3):
        path.write_bytes(RAW[:length])
        refused(path, read_legacy)
    path.write_bytes(RAW)
    read_legacy(path)


def test_one_token_fewer_than_the_header_says(tmp_path: Path) -> None:
    """GPT4All's files: the header counts a token that is not stored."""
    path = tmp_path / "old.bin"
    path.write_bytes(RawGGML("ggml", stored_tokens=261).bytes())
    file = read_legacy(path)
    assert (len(file.tokens), file.hparams.n_vocab) == (261, 262)
    path.write_bytes(RawGGML("ggml", stored_tokens=260).bytes())
    refused(path, read_legacy)


def test_file_cut_off_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    path.write_bytes(RAW)
    tensor = read_legacy(path).tensors[-1].parts[0]
    os.truncate(path, tensor.offset + 10)
    with pytest.raises(InputError, match="became shorter"):
        read_bytes(tensor.path, tensor.offset, tensor.n_bytes, "it")


def test_every_type_of_today_is_copied() -> None:
    for number in (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14):
        layout = block_layout(number, "ggjt", 3, False)
        assert layout is not None
        assert layout.copies
        assert layout.target is GGMLType(number)
