"""Every node of the training graphs against the rules of ggml's Metal backend, without a Mac.

The graphs are those that a GPU gets (quantized weights multiplied as they are), built on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

import pytest

from ggft.engine.engine import load_native
from ggft.engine.metal import contiguous, metal_rules
from tests.support.engines import open_engine
from tests.support.models import Spec, spec_for, write_model

BASE_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
BASE_TYPES += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
ARCHITECTURES = load_native().build_info()["architectures"]

SHAPES: dict[str, dict[str, Any]] = {
    "tied, biases": {"tied": True, "bias": True},
    "llama 3 rope": {"rope_freqs": True, "rope_scaling": 2.0},
    "mqa": {"n_head_kv": 1},
}
"""Variants of a model that change its graph."""


def spec_of(arch: str, type_name: str, **changes: Any) -> Spec:
    if arch != "llama":  # biases on q, k and v only, and no frequency factors
        changes["qkv_bias"] = changes.pop("bias", False)
        changes.pop("rope_freqs", None)
    return spec_for(type_name, arch=arch, **changes)


def check(tmp_path: Path, spec: Spec, **settings: Any) -> None:
    tiny = write_model(tmp_path / "model.gguf", spec)
    with open_engine(tiny, kernels="ggml", **settings) as engine:
        report = engine.graph_report(gpu=True)
    assert metal_rules().unsupported(report) == []
    matrices = {n["sources"][0]["type"].upper() for n in report if n["family"] == "MUL_MAT"}
    assert spec.type_of("blk.0.ffn_up.weight") in matrices, "not the graph of a GPU"
    assert {"OPT_STEP_ADAMW", "SET_ROWS", "ROPE_BACK"} <= {n["family"] for n in report}


def test_the_table_is_of_the_installed_version() -> None:
    installed = importlib.metadata.version("llama-cpp-python")
    assert metal_rules().llama_cpp_python == installed, (
        "ggft/engine/metal_ops.json is stale: compare the sources it names in the new version's "
        "vendor/llama.cpp with the table, then change its version"
    )


@pytest.mark.parametrize("type_name", BASE_TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_base_types(tmp_path: Path, arch: str, type_name: str) -> None:
    check(tmp_path, spec_of(arch, type_name), dropout=0.1, precision="fast")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shapes(tmp_path: Path, arch: str, shape: str) -> None:
    spec = spec_of(arch, "Q4_K", **SHAPES[shape])
    settings = itertools.product((False, True), (0.0, 0.1), ("f32", "fast"))
    for keep, dropout, precision in settings:
        check(tmp_path, spec, keep=keep, dropout=dropout, precision=precision)


def operand(type_name: str, ne: tuple[int, ...], nb: tuple[int, ...]) -> dict[str, Any]:
    return {"type": type_name, "ne": ne, "nb": nb}


DENSE = operand("f32", (8, 4, 1, 1), (4, 32, 128, 128))
TRANSPOSED = operand("f32", (4, 8, 1, 1), (32, 4, 128, 128))
PADDED = operand("f32", (8, 4, 2, 1), (4, 64, 256, 512))
CODES = operand("q4_K", (256, 4, 1, 1), (144, 144, 576, 576))
IDS = operand("i32", (4, 1, 1, 1), (4, 16, 16, 16))


@pytest.mark.parametrize(
    ("family", "sources", "supported"),
    [
        ("MUL_MAT", [CODES, operand("f32", (256, 4, 1, 1), (4, 1024, 4096, 4096))], True),
        ("MUL_MAT", [CODES, operand("bf16", (256, 4, 1, 1), (2, 512, 2048, 2048))], False),
        ("MUL_MAT", [TRANSPOSED, operand("f32", (4, 4, 1, 1), (4, 16, 64, 64))], False),
        ("ADD", [DENSE, DENSE], True),
        ("ADD", [DENSE, TRANSPOSED], False),
        ("SILU_BACK", [DENSE, DENSE], True),
        ("SILU_BACK", [PADDED, PADDED], False),
        ("CPY", [TRANSPOSED], True),
        ("CPY", [CODES], False),
        ("GET_ROWS", [CODES, IDS], True),
        ("OUT_PROD", [DENSE, DENSE], False),
        ("RMS_NORM_BACK", [DENSE, DENSE], False),
        ("CUSTOM", [DENSE], False),
    ],
)
def test_rules(family: str, sources: list[dict[str, Any]], supported: bool) -> None:
    node = {"op": family, "family": family, "result": DENSE, "sources": sources, "shapes": ""}
    assert metal_rules().supports(node) is supported


def test_contiguous() -> None:
    assert contiguous(DENSE)
    assert contiguous(CODES)
    assert not contiguous(TRANSPOSED)
    assert not contiguous(PADDED)
    assert contiguous(PADDED, loose=1)
