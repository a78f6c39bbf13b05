"""Devices: what is refused before the first step, and in which words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggft.engine import engine as module
from ggft.engine.engine import find_device, load_native
from ggft.system.errors import ResourceError
from tests.support.engines import T, make_batch, open_engine
from tests.support.models import Tiny, spec_for, write_model


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


def test_auto_passes_a_gpu_that_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = next(d for d in load_native().devices() if d["type"] == "cpu")
    assert cpu["trains"]
    old = {**cpu, "type": "gpu", "name": "Old0", "trains": False}
    fake = type("Native", (), {"devices": staticmethod(lambda: [old, cpu])})
    monkeypatch.setattr(module, "load_native", lambda: fake)
    assert find_device("auto") == cpu
    assert find_device("old") == old
    old["trains"] = True
    assert find_device("auto") == old


def test_an_unknown_device_is_refused_with_those_found(tiny: Tiny) -> None:
    with pytest.raises(ResourceError, match=r"'tpu' does not exist here \(found: .*CPU"):
        open_engine(tiny, device="tpu")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_little_crosses_to_the_device(tiny: Tiny, dropout: float) -> None:
    """Per token: id, position, span, target's place; with dropout a mask's number per site."""
    batch = make_batch(tiny.shape.n_vocab, trained=1.0)
    n_tokens, n_sites = 2 * T, 4 * tiny.spec.n_layer
    with open_engine(tiny, kernels="ggml", dropout=dropout) as engine:
        _, count = engine.forward_backward(batch, 5)
        traffic = engine.info()["traffic"]
    masks = 4 * n_sites * 64 if dropout else 0  # 48 tokens, padded to a multiple of 64
    assert traffic["from_device"] == 4 * count
    assert traffic["to_device"] == 4 * (2 + 2) * n_tokens + 4 * 3 * count + masks


ANONYMOUS = """
import sys
from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings

def anonymous_bytes():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])

settings = EngineSettings(
    paths=[sys.argv[1]], targets=["attn_q"], layer_first=29, layer_last=30, rank=1, alpha=1.0,
    device="cpu", n_rows=1, n_tokens=32,
)
before = anonymous_bytes()
with Engine(settings) as engine:
    info = engine.info()
    allocated = sum(n for name, n in info["buffers"].items() if name != "weights")
    print(anonymous_bytes() - before - allocated, info["base_bytes"], info["base_mapped"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_not_copied(smollm2: Path) -> None:
    """Opening a model takes no memory of its own for the weights: they are the file's pages."""
    output = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, str(smollm2)], capture_output=True, text=True, check=True
    ).stdout.split()
    own_bytes, base_bytes, mapped = int(output[0]), int(output[1]), output[2]
    assert mapped == "True"
    assert base_bytes > 80_000_000
    assert own_bytes < base_bytes / 10
