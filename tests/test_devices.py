"""Devices: what is refused before the first step, and in which words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ggft.engine import load_native
from ggft.errors import ResourceError
from tests.engines import open_engine
from tests.models import Tiny, spec_for, write_model


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return write_model(tmp_path / "tiny.gguf", spec_for("Q4_K"))


@pytest.fixture
def lacking() -> Iterator[str]:
    """Make every device lack SOFT_MAX."""
    load_native().deny_family("SOFT_MAX")
    yield "SOFT_MAX"
    load_native().deny_family("")


def test_an_unsupported_node_is_refused(tiny: Tiny, lacking: str) -> None:
    with pytest.raises(ResourceError) as refusal:
        open_engine(tiny, kernels="ggml")
    text = str(refusal.value)
    assert refusal.value.exit_code == 3
    for part in ("device CPU", f"does not support {lacking}", "f32[24,24,4]", "f16[24,24]"):
        assert part in text, text


def test_every_node_is_supported_here(tiny: Tiny) -> None:
    with open_engine(tiny, kernels="ggml") as engine:
        report = engine.graph_report()
    assert {"MUL_MAT", "SOFT_MAX", "OPT_STEP_ADAMW"} <= {node["family"] for node in report}
    assert all(node["supported"] for node in report)


def test_an_unknown_device_is_refused_with_those_found(tiny: Tiny) -> None:
    with pytest.raises(ResourceError, match=r"'tpu' does not exist here \(found: .*CPU"):
        open_engine(tiny, device="tpu")
