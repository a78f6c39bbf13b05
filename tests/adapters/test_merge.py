"""Merging: exact where the type allows it, promoted where it does not, with an honest receipt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggft.adapters.merge
from ggft.adapters.adapter import AdapterMeta, write_adapter
from ggft.adapters.merge import merge
from ggft.adapters.receipt import MergeReport, render
from ggft.cli import cli
from ggft.command import run
from ggft.engine.quants import can_quantize, dequantize_rows, quantize_rows
from ggft.gguf.read import GGMLType, dequantize, read_array, read_gguf
from ggft.llama.model import LlamaModel
from ggft.settings.commands import MergeConfig
from ggft.system.errors import InputError
from tests.gguf.test_read import write_shards
from tests.support.adapters import random_adapter
from tests.support.models import Spec, spec_for, write_model
from tests.support.reference import Array

TARGETS = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
RANK, ALPHA = 4, 8.0


def write_lora(folder: Path, base: Path, size: float, **meta: Any) -> tuple[Path, dict[str, Array]]:
    """Write an adapter of TARGETS; return it and its deltas, `size` times the weights' norm."""
    rng = np.random.default_rng(0)
    file = read_gguf(base)
    arrays: dict[str, Any] = {}
    deltas = {}
    for name in TARGETS:
        n_in, n_out = file.tensors[name].shape
        a, b = rng.normal(size=(RANK, n_in)), rng.normal(size=(n_out, RANK))
        norm = np.linalg.norm(b @ a) * ALPHA / RANK
        b *= size * np.linalg.norm(dequantize(file.tensors[name])) / norm
        arrays[f"{name}.lora_a"] = a.astype(np.float32)
        arrays[f"{name}.lora_b"] = b.astype(np.float32)
        deltas[name] = ALPHA / RANK * (b @ a)
    path = folder / "adapter.gguf"
    shapes = {name: array.shape for name, array in arrays.items()}
    settings = AdapterMeta(architecture="llama", rank=RANK, alpha=ALPHA, **meta)
    write_adapter(path, shapes, arrays.__getitem__, settings)
    return path, deltas


def merged(
    tmp_path: Path, spec: Spec, size: float, **settings: Any
) -> tuple[Path, Path, dict[str, Array], MergeReport]:
    base = write_model(tmp_path / "base.gguf", spec).path
    adapter, deltas = write_lora(tmp_path, base, size)
    report = merge(
        base,
        adapter,
        tmp_path / "out.gguf",
        MergeConfig(force=True, **{"type": "auto", **settings}),
    )
    return base, tmp_path / "out.gguf", deltas, report


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--receipt", "{folder}"], "the output is a folder"),
        (["--receipt", "{folder}/out.gguf"], "the receipt is the output"),
        (["-d", "{folder}/none.json"], "cannot read the data"),
    ],
)
def test_what_fails_beside_the_merge_fails_before_it(
    tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec())
    random_adapter(tmp_path / "a.gguf", tiny)
    files = [str(tmp_path / name) for name in ("m.gguf", "a.gguf", "out.gguf")]
    before = sorted(tmp_path.iterdir())
    assert run(cli, ["merge", *files, *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q2_K", "Q4_0", "IQ4_XS"]
)
def test_the_receipt_tells_what_is_in_the_file(tmp_path: Path, type_name: str) -> None:
    base, out, deltas, report = merged(tmp_path, spec_for(type_name), 0.02)
    old, new = read_gguf(base), read_gguf(out)
    assert list(old.tensors) == list(new.tensors)
    assert {t.name for t in report.tensors} == set(TARGETS)
    for receipt in report.tensors:
        w0 = dequantize(old.tensors[receipt.name]).astype(np.float64)
        w1 = dequantize(new.tensors[receipt.name]).astype(np.float64)
        d = deltas[receipt.name]
        assert new.tensors[receipt.name].type.name == receipt.type
        assert receipt.kept == pytest.approx(((w1 - w0) * d).sum() / (d * d).sum(), rel=1e-3)
        norm = np.linalg.norm(w0)
        assert receipt.noise == pytest.approx(
            np.linalg.norm(w1 - w0 - d) / norm, rel=1e-3, abs=1e-6
        )
        assert receipt.delta == pytest.approx(0.02, rel=1e-3)
        # Judged on sample rows, so that the whole may be a little off.
        assert 0.8 < receipt.kept < 1.2
    for name, tensor in old.tensors.items():
        if name not in TARGETS:
            assert (read_array(tensor) == read_array(new.tensors[name])).all()


def test_a_delta_that_four_bits_would_lose_is_promoted(tmp_path: Path) -> None:
    _, _, _, report = merged(tmp_path, Spec(types="Q4_0"), 0.005)
    assert all(t.promoted and t.kept_before < 0.5 for t in report.tensors)
    assert "Q4_0 → " in render(report)
    base, out, _, forced = merged(tmp_path, Spec(types="Q4_0"), 0.005, type="Q4_0")
    assert not any(t.promoted for t in forced.tensors)
    assert forced.kept < 0.5
    assert out.stat().st_size <= base.stat().st_size + 4096


def test_merged_equals_base_with_adapter(tmp_path: Path) -> None:
    """In llama.cpp, on a base that can hold the sum."""
    base, out, _, report = merged(tmp_path, Spec(types="F32"), 0.3)
    assert report.kept == pytest.approx(1.0, abs=1e-4)
    ids = [1, 5, 9, 20, 33, 47]
    with LlamaModel(base, tmp_path / "adapter.gguf", n_ctx=32, threads=1) as model:
        expected = model.logits(ids)
    with LlamaModel(base, n_ctx=32, threads=1) as model:
        without = model.logits(ids)
    with LlamaModel(out, n_ctx=32, threads=1) as model:
        got = model.logits(ids)
    assert np.abs(got - expected).max() < 0.01 * np.abs(without - expected).max()


def test_metadata_and_template_are_kept(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf").path
    adapter, _ = write_lora(tmp_path, base, 0.1, template="instruction", template_sha256="ab")
    merge(base, adapter, tmp_path / "out.gguf")
    old, new = read_gguf(base), read_gguf(tmp_path / "out.gguf")
    for key, value in old.metadata.items():
        assert new.metadata[key] == value
        assert new.types[key] is old.types[key]
    assert new.get("ggft.template") == "instruction"


def test_shards_become_one_file(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    adapter, _ = write_lora(tmp_path, shards[0], 0.1)
    merge(shards[1], adapter, tmp_path / "out.gguf")
    file = read_gguf(tmp_path / "out.gguf")
    assert "split.count" not in file.metadata
    assert len(file.paths) == 1


def test_small_pieces_and_a_receipt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _, _ = merged(tmp_path, Spec(types="Q8_0"), 0.1)
    whole = out.read_bytes()
    monkeypatch.setattr(ggft.adapters.merge, "_CHUNK_ELEMENTS", 200)
    receipt = tmp_path / "receipt.json"
    _, out, _, report = merged(tmp_path, Spec(types="Q8_0"), 0.1, receipt=str(receipt))
    assert out.read_bytes() == whole
    record = json.loads(receipt.read_text())
    assert record["kept"] == report.kept
    assert len(record["tensors"]) == len(TARGETS)


def test_the_loss_that_survives(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf").path
    adapter, _ = write_lora(tmp_path, base, 0.1, template="instruction")
    asked = []

    def measure(model: str, tuned: str | None, template: str) -> float:
        asked.append((Path(model).name, tuned, template))
        return {0: 4.0, 1: 2.0, 2: 2.2}[len(asked) - 1]

    config = MergeConfig(data=("rows.json",), receipt=str(tmp_path / "receipt.json"))
    report = merge(base, adapter, tmp_path / "out.gguf", config, measure=measure)
    assert asked == [
        ("base.gguf", None, "instruction"),
        ("base.gguf", str(adapter), "auto"),  # its own
        ("out.gguf", None, "auto"),
    ]
    assert report.losses is not None
    assert report.losses.survived == pytest.approx(0.9)
    assert "90% of the gain" in render(report)
    assert json.loads((tmp_path / "receipt.json").read_text())["losses"]["merged"] == 2.2


def test_a_scaled_and_an_empty_adapter(tmp_path: Path) -> None:
    base, out, deltas, _ = merged(tmp_path, Spec(types="F32"), 0.1, scale=-2.0)
    name = TARGETS[0]
    change = dequantize(read_gguf(out).tensors[name]) - dequantize(read_gguf(base).tensors[name])
    np.testing.assert_allclose(change, -2 * deltas[name], rtol=1e-3, atol=1e-5)
    _, out, _, report = merged(tmp_path, Spec(types="Q4_0"), 0.0)
    assert report.kept == 1.0
    assert not any(t.promoted for t in report.tensors)


def test_refusals(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf").path
    adapter, _ = write_lora(tmp_path, base, 0.1, base_sha256="0" * 64)
    out = tmp_path / "out.gguf"
    before = base.read_bytes()
    with pytest.raises(InputError, match="another base model"):
        merge(base, adapter, out)
    merge(base, adapter, out, MergeConfig(any_base=True))
    for output in (base, adapter):
        with pytest.raises(InputError, match="the output is the input"):
            merge(base, adapter, output, MergeConfig(any_base=True))
    with pytest.raises(InputError, match="multiple of 256"):
        merge(base, adapter, out, MergeConfig(any_base=True, force=True, type="Q4_K"))
    with pytest.raises(InputError):
        merge(adapter, base, out)
    assert base.read_bytes() == before


SLOW = (GGMLType.IQ1_M, GGMLType.IQ2_S)
"""Many seconds for their tables alone."""


@pytest.mark.parametrize("tensor_type", [t for t in GGMLType if can_quantize(t) and t not in SLOW])
def test_ggml_quantizes_every_type_it_can(tensor_type: GGMLType) -> None:
    values = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    packed = quantize_rows(values, tensor_type)
    assert packed.shape == (3, 256 // tensor_type.block_size * tensor_type.block_bytes)
    back = dequantize_rows(packed, tensor_type, 256)
    # Even one bit per weight keeps most of the direction.
    assert (back * values).sum() / np.linalg.norm(back) / np.linalg.norm(values) > 0.5
