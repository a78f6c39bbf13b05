from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.engine.engine import load_native
from ggft.engine.settings import EngineSettings
from ggft.system.errors import InputError, ResourceError
from tests.support.engines import make_batch, open_engine, set_random_lora
from tests.support.models import Spec, Tiny, write_model


def given(folder: Path) -> dict[str, Any]:
    path = write_model(folder / "m.gguf", Spec()).path
    settings = EngineSettings(
        paths=[str(path)], targets=["attn_q"], layer_first=0, layer_last=1, rank=2, alpha=4.0,
        n_tokens=32, device="cpu",
    )  # fmt: skip
    return settings.for_native()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "does not have"),
        ({"rank": "two"}, "'rank' has a wrong type"),
        ({"rank": 2**40}, "'rank' has a wrong type or is too large"),
        ({"kernels": "quick"}, "one of auto, fused, ggml, found 'quick'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"targets": ["attn"]}, "unknown target module 'attn'"),
    ],
)
def test_settings_that_the_engine_does_not_know(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    native = load_native()
    with pytest.raises(native.Error, match=message) as caught:
        native.Engine(given(tmp_path) | changes)
    assert caught.value.args[0] == "input"


def test_a_setting_that_is_missing(tmp_path: Path) -> None:
    native = load_native()
    settings = given(tmp_path)
    del settings["weight_decay"]
    with pytest.raises(native.Error, match="'weight_decay' is missing"):
        native.Engine(settings)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return write_model(tmp_path / "m.gguf", Spec())


@pytest.mark.parametrize("kernels", ["fused", "ggml"])
def test_an_evaluation_engine_has_the_same_loss(tiny: Tiny, kernels: str) -> None:
    batch = make_batch(tiny.shape.n_vocab)
    losses: dict[tuple[str, bool], float] = {}
    for precision in ("f32", "fast"):
        for train in (True, False):
            changes = {"kernels": kernels, "precision": precision, "train": train, "dropout": 0.1}
            with open_engine(tiny, layer_first=1, **changes) as engine:
                set_random_lora(engine)
                losses[precision, train] = engine.evaluate(batch)[0]
    assert losses["f32", False] == losses["f32", True]
    # The adapter's values are rounded to 11 bits.
    assert losses["fast", False] == pytest.approx(losses["fast", True], rel=1e-4)
    assert losses["fast", False] != losses["fast", True]


def test_an_evaluation_engine_holds_no_more_than_it_needs(tiny: Tiny) -> None:
    buffers = {}
    for train in (True, False):
        changes = {"rank": 64, "prepacked_bytes": 1 << 24, "keep": True, "precision": "fast"}
        with open_engine(tiny, kernels="fused", train=train, **changes) as engine:
            buffers[train] = engine.info()["buffers"]
            n_values = sum(a * b for a, b in engine.parameters.values())
    # All layers in 16 bits, and one as F32.
    per_layer = 4 * n_values / tiny.spec.n_layer
    assert buffers[False]["lora"] == pytest.approx(2 * n_values + per_layer, abs=4096)
    assert buffers[False]["saved"] < buffers[True]["saved"] / 4
    assert buffers[False]["compute"] < buffers[True]["compute"]
    assert buffers[False]["prepacked"] == pytest.approx(buffers[True]["prepacked"] / 2, rel=0.2)


def test_an_evaluation_engine_cannot_train(tiny: Tiny) -> None:
    batch = make_batch(tiny.shape.n_vocab)
    with open_engine(tiny, train=False, precision="fast") as engine:
        name, shape = next(iter(engine.parameters.items()))
        for refused in (
            lambda: engine.forward_backward(batch, 0),
            lambda: engine.optimizer_step(0.1, 1),
            lambda: engine.get(name, "grad"),
            lambda: engine.zero_grad(),
        ):
            with pytest.raises(InputError, match="opened for evaluation"):
                refused()
        engine.set(name, "value", np.full(shape, 0.1, np.float32))
        assert engine.get(name)[0, 0] == np.float16(0.1)
        with pytest.raises(InputError, match="16 bits cannot hold"):
            engine.set(name, "value", np.full(shape, 1e5, np.float32))


def test_a_kernel_without_memory_is_an_error(tiny: Tiny) -> None:
    """And leaves an engine that works."""
    native = load_native()
    batch = make_batch(tiny.shape.n_vocab)
    with open_engine(tiny, threads=2) as engine:
        loss, _ = engine.evaluate(batch)
        native.fail_kernels("attention")
        try:
            with pytest.raises(ResourceError, match="out of memory in the kernel 'attention'"):
                engine.evaluate(batch)
        finally:
            native.fail_kernels("")
        assert engine.evaluate(batch)[0] == loss


LIMITED = """
import resource, sys
from dataclasses import replace
from ggft.engine.engine import Engine, load_native
from ggft.engine.settings import EngineSettings
from ggft.system.errors import ResourceError
load_native().devices()
settings = EngineSettings(
    paths=[sys.argv[1]], targets=["attn_q"], layer_first=0, layer_last=2, rank=2, alpha=4.0,
    device="cpu", kernels=sys.argv[2], threads=1,
)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (192 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
long = {"n_tokens": 1 << 20}
for changes in (long, {**long, "keep": True}, {"rank": 1 << 20}, {"threads": 400}):
    try:
        Engine(replace(settings, **changes))
    except ResourceError as error:
        assert "memory" in error.message or "allocate" in error.message, error.message
    else:
        sys.exit("it was opened")
Engine(replace(settings, n_tokens=16, prepacked_bytes=1 << 40))
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS ignores the limit")
@pytest.mark.parametrize("kernels", ["fused", "ggml"])
def test_memory_that_is_not_there_is_an_error(tiny: Tiny, kernels: str) -> None:
    """Also weights that cannot be prepacked, which is no error."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny.path), kernels],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr[-2000:]
