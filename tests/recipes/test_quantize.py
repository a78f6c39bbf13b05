"""llama.cpp's quantizer, run safely."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from ggft.gguf.read import check_model, dequantize, read_gguf
from ggft.recipes.quantize import FILE_TYPES, quantize, quantize_file
from ggft.settings.commands import QuantizeConfig
from ggft.system.errors import InputError, ResourceError
from ggft.system.processes import Child
from tests.gguf.test_read import write_shards
from tests.support.models import Spec, write_model


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "q4_0", "Q4_K_M", "IQ4_NL"])
def test_types(tmp_path: Path, type_name: str) -> None:
    base = write_model(tmp_path / "base.gguf", Spec(types="F32", n_embd=256, n_ff=256)).path
    before = base.read_bytes()
    report = quantize(base, tmp_path / "out.gguf", type_name)
    old, new = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    assert check_model(new) == check_model(old)
    assert report.new_bytes < report.old_bytes == len(before)
    assert sum(report.types.values()) == len(old.tensors)
    name = "blk.1.ffn_up.weight"
    assert new.tensors[name].type.name == type_name.upper().removesuffix("_M")
    error = dequantize(new.tensors[name]) - dequantize(old.tensors[name])
    assert 0 < (error**2).mean() < 0.02 * (dequantize(old.tensors[name]) ** 2).mean()
    assert base.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf", "out.gguf"]


def test_a_quantized_model_needs_a_flag(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", Spec(types="Q8_0")).path
    with pytest.raises(InputError, match="quantized already"):
        quantize(base, tmp_path / "out.gguf", "Q4_0")
    text = quantize_file(
        str(base), str(tmp_path / "out.gguf"), "Q4_0", QuantizeConfig(requantize=True, pure=True)
    )
    assert "Q4_0" in text


def test_shards_become_one_file(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    quantize(shards[2], tmp_path / "out.gguf", "Q8_0")
    assert set(read_gguf(tmp_path / "out.gguf").tensors) == set(read_gguf(shards[0]).tensors)


def test_refusals(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf").path
    with pytest.raises(InputError, match="unknown type"):
        quantize(base, tmp_path / "out.gguf", "Q9_K")
    with pytest.raises(InputError, match="the output is the input"):
        quantize(base, base, "Q8_0")
    damaged = bytearray(base.read_bytes())
    at = read_gguf(base).tensors["blk.0.ffn_up.weight"].offset
    damaged[at : at + 4] = b"\0\0\xc0\x7f"
    base.write_bytes(damaged)
    with pytest.raises(InputError, match="NaN or infinity"):
        quantize(base, tmp_path / "out.gguf", "Q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf"]


@pytest.mark.parametrize(
    ("function", "says"),
    [("chatter", "the cause"), ("abort", "SIGABRT"), ("show", "not a whole number|GGUF|empty")],
)
def test_a_quantizer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, says: str
) -> None:
    """A failure with many words, a crash, or success without a result: nothing is left."""
    base = write_model(tmp_path / "base.gguf").path

    def other(_: str, *arguments: str) -> Child:
        return Child(f"tests.support.children:{function}", *arguments)

    monkeypatch.setattr("ggft.recipes.quantize.Child", other)
    with pytest.raises((ResourceError, InputError), match=says):
        quantize(base, tmp_path / "out.gguf", "Q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf"]


def test_a_disk_that_fills_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base.gguf").path

    def limited(*arguments: str) -> Child:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        return Child(*arguments)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("ggft.recipes.quantize.Child", limited)
    try:
        with pytest.raises(ResourceError, match=r"File too large(?s:.*)ulimit -f"):
            quantize(base, tmp_path / "out.gguf", "Q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf"]


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base.gguf").path
    children: list[Child] = []

    def recorded(*arguments: str) -> Child:
        children.append(Child(*arguments))
        return children[-1]

    monkeypatch.setattr("ggft.recipes.quantize.Child", recorded)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(base, tmp_path / "out.gguf", "Q8_0", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf"]
    (child,) = children
    assert child.poll() is not None, "it is left running"


def test_numbers_are_llamas() -> None:
    from ggft.llama.library import load

    api = load()
    for name, (number, _) in FILE_TYPES.items():
        prefix = "ALL" if name == "F32" else "MOSTLY"
        assert getattr(api, f"LLAMA_FTYPE_{prefix}_{name}") == number
