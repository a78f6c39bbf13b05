from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.safetensors import read_safetensors, write_safetensors
from ggft.system.errors import InputError

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def raw(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"z": (3, 5), "a": (1, 7), "m": (4, 4)}.items()
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"format": "pt", "é": "天"})
    found, metadata = read_safetensors(path)
    assert list(found) == list(tensors)
    assert metadata == {"format": "pt", "é": "天"}
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name].read(), array)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0


@pytest.mark.parametrize(
    ("dtype", "data"), [("F16", "003c00c0"), ("BF16", "803f00c0"), ("F32", "0000803f000000c0")]
)
def test_types(tmp_path: Path, dtype: str, data: str) -> None:
    path = tmp_path / "x.safetensors"
    body = bytes.fromhex(data)
    path.write_bytes(
        raw({"a": {"dtype": dtype, "shape": [1, 2], "data_offsets": [0, len(body)]}}, body)
    )
    np.testing.assert_array_equal(read_safetensors(path)[0]["a"].read(), [[1.0, -2.0]])


BAD = {
    "empty": b"",
    "a length": b"\x02\0\0\0\0\0\0\0",
    "a length beyond the file": struct.pack("<Q", 1 << 60) + bytes(64),
    "no JSON": raw(b"{nonsense"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "deep": raw(b"[" * 100_000),
    "no object": raw([]),
    "a name twice": raw(b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": {}}'),
    "no entry": raw({"a": 3}),
    "metadata": raw({"__metadata__": {"a": 1}, "a": ENTRY}),
    "unknown type": raw({"a": {**ENTRY, "dtype": "F64"}}),
    "negative": raw({"a": {**ENTRY, "shape": [-2, -2]}}),
    "a boolean size": raw({"a": {**ENTRY, "shape": [True, 4]}}),
    "huge": raw({"a": {**ENTRY, "shape": [1 << 39] * 8}}),
    "offsets": raw({"a": {**ENTRY, "data_offsets": [0, 12]}}),
    "offsets backwards": raw({"a": {**ENTRY, "data_offsets": [16, 0]}}),
    "hole": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [20, 36]}}, bytes(36)),
    "overlap": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)),
    "cut off": raw({"a": ENTRY}, bytes(15)),
    "trailing": raw({"a": ENTRY}, bytes(17)),
}


@pytest.mark.parametrize("case", BAD)
def test_damage(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(InputError) as error:
        read_safetensors(path)
    assert error.value.path == str(path)
