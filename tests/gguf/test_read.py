"""The GGUF reader: every bad file refused by name, no good file refused."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from ggft.gguf.read import (
    GGMLType,
    StringArray,
    ValueType,
    check_model,
    dequantize,
    read_array,
    read_gguf,
)
from ggft.llama.model import LlamaModel
from ggft.system.errors import InputError
from tests.support.models import spec_for, write_model
from tests.support.raw_gguf import RawGGUF, kv, numbers, refused, string, strings, tensor, text, u32

U64_MAX = (1 << 64) - 1
I32 = struct.pack("<i", 7)


def some_kvs() -> list[bytes]:
    """One entry of every value type, and an array of each."""
    result = []
    for number, code in enumerate("BbHhIif?"):
        payload = struct.pack(f"<{code}", 1)
        result.append(kv(f"key_{number}", number, payload))
        result.append(kv(f"array_{number}", 9, struct.pack("<IQ", number, 3) + 3 * payload))
    for number, code in ((10, "Q"), (11, "q"), (12, "d")):
        result.append(kv(f"key_{number}", number, struct.pack(f"<{code}", 1)))
        result.append(numbers(f"array_{number}", number, code, [1, 2]))
    result += [text("key_8", "text"), strings("array_8", ["a", "", "c"])]
    return result


def some_tensors(alignment: int = 32) -> tuple[list[bytes], bytes]:
    """Tensors of three types with their data."""
    infos, data = [], b""
    for i, (dims, number, n_bytes) in enumerate(
        [((64, 2), 2, 72), ((5,), 0, 20), ((256, 3), 12, 432), ((8, 1, 2), 24, 16)]
    ):
        infos.append(tensor(f"tensor_{i}", dims, number, len(data)))
        data += bytes(i % 256 for i in range(n_bytes))
        data += bytes(-len(data) % alignment)
    return infos, data


TENSORS, DATA = some_tensors()


def replaced(index: int, entry: bytes) -> list[bytes]:
    """Return TENSORS with one entry replaced."""
    return [entry if i == index else old for i, old in enumerate(TENSORS)]


def with_alignment(value: int, alignment: int = 32, value_type: int = 4) -> RawGGUF:
    entry = kv("general.alignment", value_type, struct.pack("<I", value))
    infos, data = some_tensors(alignment)
    return RawGGUF([*some_kvs(), entry], infos, data, alignment=alignment)


# The kinds of file of llama.cpp's test-gguf, built anew. None: must be read.
UPSTREAM_KINDS: dict[str, tuple[RawGGUF, str | None]] = {
    "HEADER_BAD_MAGIC": (RawGGUF(magic=b"FUGG"), "not a GGUF file"),
    "HEADER_BAD_VERSION_0": (RawGGUF(version=0), "unsupported GGUF version"),
    "HEADER_BAD_VERSION_1": (RawGGUF(version=1), "unsupported GGUF version"),
    "HEADER_BAD_VERSION_FUTURE": (RawGGUF(version=4), "unsupported GGUF version"),
    "HEADER_BAD_N_TENSORS": (RawGGUF(n_tensors=U64_MAX), "number of tensors exceeds"),
    "HEADER_BAD_N_KV": (RawGGUF(n_kv=U64_MAX), "number of metadata entries exceeds"),
    "HEADER_EMPTY": (RawGGUF(), None),
    "KV_BAD_KEY_SIZE": (
        RawGGUF([struct.pack("<Q", U64_MAX) + b"key_0" + struct.pack("<I", 5) + I32]),
        "key 0 is too long",
    ),
    "KV_EMPTY_KEY": (RawGGUF([kv("", 5, I32)]), "key 0 is empty"),
    "KV_BAD_TYPE": (RawGGUF([kv("key_0", 13, I32)]), "unknown value type"),
    "KV_DUPLICATE_KEY": (RawGGUF([u32("key_0", 1), u32("key_0", 1)]), "stands twice"),
    "KV_BAD_ALIGN": (RawGGUF([u32("general.alignment", 13)]), "bad general.alignment"),
    "KV_WRONG_TYPE_ALIGN": (
        RawGGUF([kv("general.alignment", 5, struct.pack("<i", 32))]),
        "wrong type",
    ),
    "KV_SUCCESS": (RawGGUF(some_kvs()), None),
    "TENSORS_BAD_NAME_SIZE": (RawGGUF(tensors=[tensor("n" * 64, (4,))]), "is too long"),
    "TENSORS_BAD_N_DIMS": (
        RawGGUF(tensors=[tensor("t", (4, 1, 1, 1, 1), n_dims=5)]),
        "too many dimensions",
    ),
    "TENSORS_BAD_SHAPE": (RawGGUF(tensors=[tensor("t", (-1,))]), "negative dimension"),
    "TENSORS_ZERO_DIM": (RawGGUF(tensors=[tensor("t", (4, 0))]), None),
    "TENSORS_NE_TOO_BIG": (
        RawGGUF(tensors=[tensor("t", (4 * (2**31 - 1), 4 * (2**31 - 1)))]),
        "overflows",
    ),
    "TENSORS_NBYTES_TOO_BIG": (
        RawGGUF(tensors=[tensor("t", (1533916892, 1533916892), 27)]),
        "past the end",
    ),
    "TENSORS_NBYTES_PAD_WRAP": (
        RawGGUF(tensors=[tensor("t", (4, 2**30 - 1, 2**30 + 1))]),
        "past the end",
    ),
    "TENSORS_BAD_TYPE": (RawGGUF(tensors=[tensor("t", (4,), 43)]), "unknown type"),
    "TENSORS_BAD_OFFSET": (
        RawGGUF(tensors=replaced(1, tensor("tensor_1", (5,), 0, U64_MAX)), data=DATA),
        "wrong offset",
    ),
    "TENSORS_DUPLICATE_NAME": (
        RawGGUF(tensors=replaced(1, tensor("tensor_0", (5,), 0, 96)), data=DATA),
        "stands twice",
    ),
    "TENSORS_BAD_ALIGN": (with_alignment(13), "bad general.alignment"),
    "TENSORS_INCONSISTENT_ALIGN": (
        RawGGUF(some_kvs(), *some_tensors(1), alignment=1),
        "wrong offset",
    ),
    "TENSORS_SUCCESS": (RawGGUF(some_kvs(), TENSORS, DATA), None),
    "TENSORS_CUSTOM_ALIGN": (with_alignment(1, 1), None),
    "DATA_NOT_ENOUGH_DATA": (RawGGUF(tensors=TENSORS, data=DATA[:-17]), "past the end"),
    "DATA_BAD_ALIGN": (with_alignment(0), "bad general.alignment"),
    "DATA_INCONSISTENT_ALIGN": (with_alignment(64), "wrong offset"),
    "DATA_MEM_SIZE_OVERFLOW": (
        RawGGUF(
            tensors=[
                tensor("a", (0x7FFFFFFFFFFFFFC0,), 24),
                tensor("b", (0x7FFFFFFFFFFFFFC0,), 24, 0x7FFFFFFFFFFFFFC0),
            ],
            data=bytes(32),
        ),
        "past the end",
    ),
    "DATA_SUCCESS": (RawGGUF(some_kvs(), TENSORS, DATA), None),
    "DATA_CUSTOM_ALIGN": (with_alignment(8, 8), None),
}
FAULTS: dict[str, tuple[RawGGUF | bytes, str]] = {
    "1 HTML page": (b"<!DOCTYPE html><html>", "an HTML page"),
    "1 LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "1 pickle": (b"\x80\x02}q\x00.", "pickle"),
    "1 zip": (b"PK\x03\x04rest", "zip archive"),
    "1 safetensors": (struct.pack("<Q", 64) + b'{"__metadata__":', "safetensors"),
    "1 GGML": (b"tjgg\x03\0\0\0", "old GGML file"),
    "1 empty": (b"", "empty"),
    "1 zeros": (bytes(64), "zero bytes"),
    "1 gzip": (b"\x1f\x8b\x08\0", "gzip"),
    "2 byte-swapped": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "3 n_kv beyond the file": (RawGGUF(n_kv=3), "number of metadata entries exceeds"),
    "3 n_tensors beyond the file": (RawGGUF(n_tensors=1), "number of tensors exceeds"),
    "4 overlong key": (RawGGUF([u32("k" * 65536, 1)]), "is too long"),
    "4 control characters in a key": (RawGGUF([u32("a\x1b[2J", 1)]), "control characters"),
    "5 string beyond the end": (
        RawGGUF([kv("k", 8, struct.pack("<Q", 1000))]),
        "ends inside the value",
    ),
    "5 array beyond the end": (
        RawGGUF([kv("k", 9, struct.pack("<IQ", 4, 1 << 40))]),
        "exceeds the file",
    ),
    "5 array of strings beyond the end": (
        RawGGUF([kv("k", 9, struct.pack("<IQQ", 8, 1, 1 << 60))]),
        "ends inside string 0",
    ),
    "5 array of arrays": (
        RawGGUF([kv("k", 9, struct.pack("<IQIQ", 9, 1, 4, 0))]),
        "array of arrays",
    ),
    "6 unknown element type": (
        RawGGUF([kv("k", 9, struct.pack("<IQ", 99, 0))]),
        "unknown value type",
    ),
    "7 alignment 2^30": (RawGGUF([u32("general.alignment", 1 << 30)]), "bad general.alignment"),
    "7 alignment text": (RawGGUF([text("general.alignment", "32")]), "wrong type"),
    "7 alignment list": (
        RawGGUF([numbers("general.alignment", 4, "I", [32])]),
        "wrong type",
    ),
    "10 product 2^64": (
        RawGGUF(tensors=[tensor("t", (1 << 42, 1 << 22), 24)]),
        "overflows",
    ),
    "10 2^42 + 1": (RawGGUF(tensors=[tensor("t", ((1 << 42) + 1, 1 << 21), 0)]), "overflows"),
    "11 partial block": (RawGGUF(tensors=[tensor("t", (33,), 2)]), "not whole blocks"),
    "11 removed type": (RawGGUF(tensors=[tensor("t", (32,), 4)]), "unknown type"),
    "12 control characters": (RawGGUF(tensors=[tensor("a\nb", (4,))]), "bad name"),
    "12 empty name": (RawGGUF(tensors=[tensor("", (4,))]), "bad name"),
    "13 overlap": (
        RawGGUF(tensors=[tensor("a", (16,)), tensor("b", (16,), 0, 32)], data=bytes(128)),
        "overlaps",
    ),
    "13 misaligned": (
        RawGGUF(tensors=[tensor("a", (4,)), tensor("b", (4,), 0, 16)], data=bytes(64)),
        "not aligned",
    ),
    "13 gap": (
        RawGGUF(tensors=[tensor("a", (4,)), tensor("b", (4,), 0, 64)], data=bytes(96)),
        "gap",
    ),
}


@pytest.mark.parametrize("kind", UPSTREAM_KINDS)
def test_kinds_of_upstream(tmp_path: Path, kind: str) -> None:
    raw, message = UPSTREAM_KINDS[kind]
    path = tmp_path / "file.gguf"
    path.write_bytes(raw.bytes())
    if message is None:
        file = read_gguf(path)
        assert (len(file.metadata), len(file.tensors)) == (len(raw.kvs), len(raw.tensors))
        return
    error = refused(path, read_gguf)
    assert message in str(error)
    assert error.offset is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    raw, message = FAULTS[fault]
    path = tmp_path / "file.gguf"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.bytes())
    error = refused(path, read_gguf)
    assert message in str(error)
    assert error.offset is not None


def test_more_entries_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file of nothing but entries must not keep us busy."""
    monkeypatch.setattr("ggft.gguf.header.MAX_ENTRIES", 3)
    monkeypatch.setattr("ggft.gguf.header.MAX_STRINGS", 4)
    path = tmp_path / "file.gguf"
    for raw, message in (
        (RawGGUF([u32(f"k{i}", 1) for i in range(4)]), "too many metadata entries"),
        (RawGGUF(tensors=TENSORS, data=DATA), "too many tensors"),
        (RawGGUF([strings("k", ["a"] * 5)]), "too many strings"),
    ):
        path.write_bytes(raw.bytes())
        assert message in str(refused(path, read_gguf))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = RawGGUF(some_kvs(), TENSORS, DATA).bytes()
    path = tmp_path / "file.gguf"
    needed = len(whole) - 16  # the last tensor's padding
    for length in range(needed):
        path.write_bytes(whole[:length])
        assert refused(path, read_gguf).offset is not None
    path.write_bytes(whole[:needed])
    read_gguf(path)


def test_trailing_bytes_are_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(RawGGUF(some_kvs(), TENSORS, DATA).bytes() + b"PK\x03\x04 polyglot")
    assert any("13 bytes" in warning for warning in read_gguf(path).warnings)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "NUL"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    paths = {
        "missing": tmp_path / "none.gguf",
        "folder": tmp_path,
        "pipe": tmp_path / "pipe",
        "device": Path("/dev/zero"),
        "NUL": tmp_path / "a\0b",
    }
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError):
        read_gguf(paths[kind])


def test_values_and_data(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(RawGGUF(some_kvs(), TENSORS, DATA).bytes())
    file = read_gguf(path)
    assert file.get("key_7") is True
    assert list(file.metadata["array_7"]) == [True] * 3  # type: ignore[arg-type]
    assert file.metadata["array_8"] == ["a", "", "c"]
    assert list(file.metadata["array_11"]) == [1, 2]  # type: ignore[arg-type]
    assert file.types["array_11"] is ValueType.INT64
    info = file.tensors["tensor_2"]
    assert (info.type, info.shape, info.n_bytes) == (GGMLType.Q4_K, (256, 3), 432)
    assert read_array(info).tobytes() == bytes(i % 256 for i in range(432))
    assert (read_array(info, 1, 1) == read_array(info)[1:2]).all()


def test_file_cut_off_after_reading_the_header(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(RawGGUF(some_kvs(), TENSORS, DATA).bytes())
    info = read_gguf(path).tensors["tensor_2"]
    os.truncate(path, info.offset + 100)
    assert refused(path, lambda _: read_array(info)).offset == info.offset + 100


def test_string_array() -> None:
    values = ["a", "", "é" * 50, "\ud800"]
    values[3] = b"\xff\xfe".decode("utf-8", "surrogateescape")
    data = b"".join(string(v.encode("utf-8", "surrogateescape")) for v in values)
    from array import array

    ends, at = array("Q"), 0
    for value in values:
        at += 8 + len(value.encode("utf-8", "surrogateescape"))
        ends.append(at)
    strings_ = StringArray(data, ends)
    assert list(strings_) == values == strings_[:]
    assert [strings_[i] for i in range(-4, 0)] == values
    assert strings_.raw(3) == b"\xff\xfe"
    assert [strings_.find(v) for v in [*values, "b"]] == [0, 1, 2, 3, -1]
    assert strings_.first_duplicate() is None


@pytest.mark.parametrize(
    "type_name", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"]
)
def test_dequantize(tmp_path: Path, type_name: str) -> None:
    tiny = write_model(tmp_path / "m.gguf", spec_for(type_name))
    file = read_gguf(tiny.path)
    for name, weights in tiny.weights.items():
        values = dequantize(file.tensors[name])
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, weights, rtol=1e-6, atol=1e-7)
    info = file.tensors["blk.1.ffn_down.weight"]
    assert (dequantize(info, 3, 2) == dequantize(info)[3:5]).all()


# ---- shards --------------------------------------------------------------------------------


def write_shards(folder: Path, count: int = 3) -> list[Path]:
    """Split the tiny model's tensors over `count` files, as llama-gguf-split does."""
    from ggft.gguf.write import TensorSource, write_gguf

    whole = read_gguf(write_model(folder / "whole.gguf").path)
    names = list(whole.tensors)
    paths = []
    for i in range(count):
        metadata = dict(whole.metadata) if i == 0 else {}
        metadata |= {"split.no": i, "split.count": count, "split.tensors.count": len(names)}
        types = {**whole.types, "split.no": ValueType.UINT16, "split.count": ValueType.UINT16}
        types["split.tensors.count"] = ValueType.INT32
        sources = [
            TensorSource(name, t.type, t.shape, lambda t=t: [read_array(t).tobytes()])  # type: ignore[misc]
            for name, t in whole.tensors.items()
            if names.index(name) % count == i
        ]
        paths.append(folder / f"m-{i + 1:05}-of-{count:05}.gguf")
        write_gguf(paths[-1], metadata, sources, types=types)
    return paths


def test_any_shard_gives_the_whole_model(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    whole = read_gguf(tmp_path / "whole.gguf")
    for path in paths:
        file = read_gguf(path)
        assert file.paths == tuple(paths)
        assert check_model(file) == check_model(whole)
        assert file.file_bytes == sum(p.stat().st_size for p in paths)
        for name, info in whole.tensors.items():
            assert (dequantize(file.tensors[name]) == dequantize(info)).all()
        with LlamaModel(path, n_ctx=16, threads=1) as model:
            assert model.logits([1, 2, 3]).shape == (3, check_model(whole).n_vocab)


def test_bad_shards(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    original = paths[1].read_bytes()
    paths[1].unlink()
    assert "shard 2 of 3 is missing" in str(refused(paths[0], read_gguf))
    paths[1].write_bytes(paths[2].read_bytes())
    assert "split.no" in str(refused(paths[0], read_gguf))
    paths[1].write_bytes(original)
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    assert "original names" in str(refused(renamed, read_gguf))


def test_reading_a_large_vocabulary_is_quick(tmp_path: Path) -> None:
    """A quadratic reader would take minutes for this; no limit closer than that is set."""
    tokens = [f"token {i}" for i in range(262_144)]
    random.Random(0).shuffle(tokens)
    path = tmp_path / "file.gguf"
    path.write_bytes(RawGGUF([strings("tokenizer.ggml.tokens", tokens)]).bytes())
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"] == tokens
