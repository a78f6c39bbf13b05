"""The measurements measure what they say: counts of operations, not seconds, are asserted."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import make_model
from bench.chart import Bar, draw
from bench.common import whole_rows
from ggft.engine.peak import GGML_TYPES, measure_peak
from ggft.gguf.read import check_decoder, read_gguf
from ggft.recipes.bench import bench, block_matrices, parse_shape
from ggft.settings.training import BenchConfig
from ggft.system.errors import InputError
from tests.support.architectures import Tiny, write_tiny
from tests.support.blocks import SCALES, dequantize, random_blocks
from tests.support.models import Spec, write_model


@pytest.mark.parametrize(
    ("text", "want"), [("4x512", (4, 512)), ("1×2048", (1, 2048)), ("16X32", (16, 32))]
)
def test_shapes(text: str, want: tuple[int, int]) -> None:
    assert parse_shape(text) == want


@pytest.mark.parametrize("text", ["", "4", "4x", "x512", "0x512", "4x1", "-4x512", "4x512x2", "a"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="rows by tokens"):
        parse_shape(text)


@pytest.mark.parametrize("keep", [True, False])
def test_bench_of_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: bool
) -> None:
    """N and both FLOP rates follow from the shapes; the parts of a step are named."""
    spec = Spec(head_size=24, tied=True)
    tiny = write_model(tmp_path / "tiny.gguf", spec)
    config = BenchConfig(
        model=str(tiny.path), shape="3x32", steps=2, recompute=not keep, threads=1, json=True,
        peak=False,
    )  # fmt: skip
    bench(config)
    result = json.loads(capsys.readouterr().out)
    linears = sum(w.size for name, w in tiny.weights.items() if ".attn_" in name or ".ffn_" in name)
    linears -= sum(w.size for name, w in tiny.weights.items() if "norm" in name and "blk" in name)
    n = linears + tiny.weights["token_embd.weight"].size
    assert result["n_params_matmul"] == n == result["engine"]["n_params_matmul"]
    assert len(result["step_s"]) == 2
    speed = result["tokens_per_s"]
    assert speed == pytest.approx(3 * 32 / (sum(result["step_s"]) / 2))
    assert result["model_flops"] == pytest.approx(4 * n * speed)
    again = 0 if keep else 2 * linears
    assert result["hardware_flops"] == pytest.approx((4 * n + again) * speed)
    assert result["plan"]["keep"] is keep
    assert sum(result["profile_s"].values()) > 0
    assert result["peak_rss_bytes"] > 1 << 20


def test_matrices_of_a_block(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "tiny.gguf", Spec(n_head_kv=4))
    matrices = block_matrices(check_decoder(read_gguf(tiny.path)))
    assert matrices == {(64, 64): 4, (96, 64): 2, (64, 96): 1}


def test_peak_of_matrix_products() -> None:
    """Types whose blocks do not fit the rows are left out; every rate is a finite number."""
    rates = measure_peak({(64, 96): 2, (32, 64): 1}, n_tokens=8, threads=1)
    assert set(rates) == {name for name, (_, block) in GGML_TYPES.items() if block <= 32}
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())


@pytest.mark.parametrize("name", make_model.MODELS)
def test_generated_models_have_the_shapes_of_their_names(tmp_path: Path, name: str) -> None:
    shapes = make_model.MODELS[name]
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in make_model.plan(shapes, "Q4_0")}
    billions = {"smollm2-135m": 0.1345, "tinyllama-1.1b": 1.1, "llama-3.2-1b": 1.236,
                "llama-3.2-3b": 3.213, "llama-2-7b": 6.738, "mistral-7b": 7.242}  # fmt: skip
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions[name], rel=2e-3)


def test_a_generated_model_trains(tmp_path: Path) -> None:
    """Streamed blocks make a file that passes the checks and gives finite numbers."""
    shapes = make_model.MODELS["llama-3.2-1b"]
    small = replace(
        shapes,
        spec=replace(shapes.spec, n_layer=1, n_embd=256, n_head=4, n_head_kv=2, n_ff=512),
        n_vocab=1000,
    )
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        make_model.write(file, small, "Q4_K")
    info = check_decoder(read_gguf(path))
    assert (info.n_layer, info.n_vocab) == (1, 1000)
    result = bench(BenchConfig(model=str(path), shape="1x32", steps=1, threads=1, peak=False))
    assert result["tokens_per_s"] > 0


def test_streaming_writes_what_was_planned() -> None:
    """The head promises the bytes that follow, chunk borders and padding included."""
    shapes = make_model.MODELS["smollm2-135m"]
    small = replace(shapes, spec=replace(shapes.spec, n_layer=1), n_vocab=500)
    tensors = make_model.plan(small, "Q6_K")
    assert {t.type_name for t in tensors} == {"Q8_0", "Q6_K", "F32"}  # 576 is no multiple of 256
    file = io.BytesIO()
    make_model.write(file, small, "Q6_K")
    data = sum(t.n_bytes + -t.n_bytes % 32 for t in tensors)
    head = len(file.getvalue()) - data
    assert 0 < head < 1 << 16
    assert head % 32 == 0


@pytest.mark.parametrize("type_name", [*SCALES, "F16", "BF16"])
def test_random_blocks_have_the_spread_asked_for(type_name: str) -> None:
    data = random_blocks(np.random.default_rng(0), type_name, 256 * 256, 0.05)
    values = dequantize(data, type_name, (256, 256))
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.05, rel=0.05)


def test_batches_are_the_text_shifted_by_one() -> None:
    batches = whole_rows(list(range(100, 125)), n_steps=2, n_rows=3, n_tokens=4)
    np.testing.assert_array_equal(batches["tokens"].ravel(), np.arange(100, 124))
    np.testing.assert_array_equal(batches["targets"], batches["tokens"] + 1)
    np.testing.assert_array_equal(batches["positions"][1, 2], [0, 1, 2, 3])


def test_chart_is_well_formed() -> None:
    bars = [Bar("ours <1>", True, 200.0, 5e8), Bar("peer", False, 50.0, 2e9)]
    root = ET.fromstring(draw("LoRA & speed", bars, "machine"))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(e.get("width", "0")) for e in root.iter(f"{space}rect")][1:]
    assert widths[:2] == [250.0, 62.5]
    assert widths[2:] == [62.5, 250.0]
    texts = [e.text for e in root.iter(f"{space}text")]
    assert {"200", "50", "500", "2000", "ours <1>"} <= set(texts)


def test_bench_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On llama.cpp's own graph; its nodes cannot be timed one by one."""
    path = write_tiny(tmp_path / "m.gguf", Tiny("phi3"))
    config = BenchConfig(model=str(path), shape="1x16", steps=1, threads=1, json=True)
    bench(config)
    result = json.loads(capsys.readouterr().out)
    assert result["n_params_matmul"] == result["engine"]["n_params_matmul"] > 0
    assert not {"gemm_flops", "profile_s"} & set(result)
