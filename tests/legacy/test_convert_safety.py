"""Conversion never harms: inputs untouched, nothing half-written, damage named."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

import ggft.legacy.convert
from ggft.gguf.cursor import read_bytes
from ggft.legacy.convert import convert_model
from ggft.legacy.reader import read_legacy
from ggft.settings.commands import ConvertConfig
from ggft.system.errors import InputError, ResourceError
from tests.support.legacy_files import content, place


def test_input_is_untouched_and_output_equal_to_input_refused(tmp_path: Path) -> None:
    old = place(tmp_path, "ggjt_v3_q4_0")
    link = tmp_path / "link.gguf"
    link.symlink_to(old)
    for output in (old, link):
        with pytest.raises(InputError, match="the output is the input"):
            convert_model(old, output)
    convert_model(old, tmp_path / "new.gguf")
    assert old.read_bytes() == content("ggjt_v3_q4_0.bin")
    with pytest.raises(InputError, match="already a GGUF"):
        convert_model(tmp_path / "new.gguf", tmp_path / "newer.gguf")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ResourceError("disk full")])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = place(tmp_path, "ggjt_v2_q4_0")
    calls = iter(range(100))

    def read_some(*args: Any) -> Any:
        if next(calls) == 20:
            raise error
        return read_bytes(*args)

    monkeypatch.setattr(ggft.legacy.convert, "read_bytes", read_some)
    with pytest.raises(type(error)):
        convert_model(old, tmp_path / "new.gguf")
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("name", "place_in_block", "value"),
    [
        ("ggjt_v2_q4_0", 0, struct.pack("<f", float("nan"))),
        ("ggjt_v2_q4_0", 0, struct.pack("<f", 1e6)),
        ("ggjt_v3_q4_0", 0, struct.pack("<e", float("inf"))),
        ("ggjt_v1_q4_2", 0, struct.pack("<e", float("nan"))),
        ("ggjt_v3_qkk64_q4_k_m", 0, struct.pack("<e", float("inf"))),
        ("ggjt_v3_qkk64_q6_k", 52, struct.pack("<e", float("inf"))),
    ],
)
def test_scales_that_are_not_finite(
    tmp_path: Path, name: str, place_in_block: int, value: bytes
) -> None:
    """Fault 19: named by tensor and block."""
    old = place(tmp_path, name)
    tensor = next(t for t in read_legacy(old).tensors if t.name == "blk.1.ffn_up.weight")
    at = tensor.parts[0].offset + 5 * tensor.layout.block_bytes
    damaged = bytearray(old.read_bytes())
    place_in_file = at + place_in_block
    damaged[place_in_file : place_in_file + len(value)] = value
    old.write_bytes(damaged)
    with pytest.raises(InputError, match=r"feed_forward.w3.*block 5") as caught:
        convert_model(old, tmp_path / "new.gguf")
    assert caught.value.offset == at
    assert not (tmp_path / "new.gguf").exists()


def test_reading_in_small_pieces_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ggmf_v1_q4_0_2part", "ggml_q4_1_planar", "ggjt_v1_q4_3"):
        old = place(tmp_path, name)
        config = ConvertConfig(force=True)
        convert_model(old, tmp_path / "whole.gguf", config)
        monkeypatch.setattr(ggft.legacy.convert, "_CHUNK_BYTES", 1000)
        convert_model(old, tmp_path / "pieces.gguf", config)
        monkeypatch.undo()
        assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
