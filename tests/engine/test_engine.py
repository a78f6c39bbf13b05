from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ggft.engine.engine import EngineSettings, load_native
from tests.support.models import Spec, write_model


def given(folder: Path) -> dict[str, Any]:
    path = write_model(folder / "m.gguf", Spec()).path
    return asdict(
        EngineSettings(
            paths=[str(path)], targets=["attn_q"], layer_first=0, layer_last=1, rank=2, alpha=4.0,
            n_tokens=32, device="cpu",
        )
    )  # fmt: skip


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
