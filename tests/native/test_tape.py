"""The reference for every architecture: its values against llama.cpp, its slopes by differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.native.test_architectures import logits
from tests.support.architectures import Tiny, write_tiny
from tests.support.tape import nats, record, slope, write_lora

TOKENS = [7 * i % 200 for i in range(16)]
TARGETS = [*TOKENS[1:], -1]
# The CPU backend looks GELU up in a table of F16 values.
TOLERANCE = {"gpt2": 1e-3, "gemma3": 1e-3}


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("arch", ["gpt2", "phi3", "gemma3", "qwen35", "gpt-oss", "mamba2"])
def test_the_logits_are_those_of_llama_cpp(arch: str, flash: bool, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", Tiny(arch, hard=True))
    row = record(path, TOKENS, flash=flash).logits()[-1].real
    expected = logits(path, len(TOKENS))
    error = np.sqrt(np.mean((row - expected) ** 2) / np.mean(expected**2))
    assert error < TOLERANCE.get(arch, 1e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "falcon", "olmoe", "mamba"])
def test_a_slope_is_the_quotient_of_small_differences(arch: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", Tiny(arch))
    adapter = write_lora(tmp_path / "a.gguf", path, rank=2)
    tape = record(path, TOKENS, adapter=adapter)
    values = tape.parameters()
    assert len(values) >= 4
    rng = np.random.default_rng(1)
    direction = {name: rng.normal(size=value.shape) for name, value in values.items()}
    step = 1e-6
    ends = [
        nats(tape.logits({n: v + s * step * direction[n] for n, v in values.items()}), TARGETS).real
        for s in (1, -1)
    ]
    quotient = (ends[0] - ends[1]) / (2 * step)
    assert slope(tape, values, direction, TARGETS) == pytest.approx(quotient, rel=1e-6)
