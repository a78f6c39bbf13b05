"""NaN and infinity in a model's data are found, in every type, and named."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from ggft.gguf.finite import F16_SCALES, check_and_hash, check_values, first_bad_block
from ggft.gguf.read import GGMLType, read_gguf
from ggft.setup.inputs import open_model
from ggft.system.errors import InputError
from tests.support.blocks import TYPES
from tests.support.models import spec_for, write_model

NAN_16, INF_16 = b"\x00\x7e", b"\x00\xfc"
PLANTS: list[tuple[GGMLType, int, bytes]] = [
    *((kind, at, value) for kind, places in F16_SCALES.items() for at in places
      for value in (NAN_16, INF_16)),
    (GGMLType.F32, 0, struct.pack("<f", float("nan"))),
    (GGMLType.F32, 0, struct.pack("<f", float("-inf"))),
    (GGMLType.F64, 0, struct.pack("<d", float("nan"))),
    (GGMLType.BF16, 0, b"\xc0\x7f"),
    (GGMLType.BF16, 0, b"\x80\xff"),
    (GGMLType.MXFP4, 0, b"\xff"),
    (GGMLType.IQ1_M, 53, b"\xc0\x00\x70"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "at", "value"), PLANTS)
def test_planted(kind: GGMLType, at: int, value: bytes) -> None:
    blocks = np.zeros((9, kind.block_bytes), dtype=np.uint8)
    assert first_bad_block(blocks, kind) is None
    # The largest finite scales must pass.
    blocks[3] = 0x6B if kind in (GGMLType.BF16, GGMLType.IQ1_M) else 0x7B
    assert first_bad_block(blocks, kind) is None
    blocks[6, at : at + len(value)] = np.frombuffer(value, np.uint8)
    assert first_bad_block(blocks, kind) == 6


@pytest.mark.parametrize("type_name", TYPES)
def test_good_data_passes(tmp_path: Path, type_name: str) -> None:
    check_values(read_gguf(write_model(tmp_path / "m.gguf", spec_for(type_name)).path))


@pytest.mark.parametrize("tail", [b"", b"beyond the last tensor"])
def test_the_hash_that_is_taken_on_the_way_is_the_files(tmp_path: Path, tail: bytes) -> None:
    path = write_model(tmp_path / "m.gguf", spec_for("Q4_1")).path
    with path.open("ab") as file:
        file.write(tail)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    model = read_gguf(path)
    check_and_hash(model)
    path.write_bytes(b"")  # it is not read again
    assert model.sha256() == expected


def test_training_refuses(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", spec_for("Q6_K")).path
    tensor = read_gguf(path).tensors["blk.1.ffn_gate.weight"]
    data = bytearray(path.read_bytes())
    at = tensor.offset + 11 * 210
    data[at + 208 : at + 210] = NAN_16
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"'blk.1.ffn_gate.weight', block 11") as caught:
        open_model(path)
    assert caught.value.offset == at
