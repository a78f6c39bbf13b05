"""Thousands of damaged model files: no crash, no hang, no memory spent on lies.

A child process tries the mutants, so that a crash of native code is a failed test. The number is
set by GGFT_MUTANTS (`make fuzz MUTANTS=100000`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.mutants import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = int(os.environ.get("GGFT_MUTANTS", "1500"))
# How many of the files that mean nonsense are tried; 0 is all.
SEMANTIC = int(os.environ.get("GGFT_SEMANTIC_MUTANTS", "200"))
SEED = int(os.environ.get("GGFT_FUZZ_SEED", "0"))


def test_mutants(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.support.mutants",
        str(tmp_path),
        str(SEED),
        str(MUTANTS),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60 + LIMIT_S * MUTANTS
    )
    current = tmp_path / "current"
    last = current.read_text() if current.exists() else "none"
    assert done.returncode == 0, f"after seed, number, file {last}\n{done.stderr[-3000:]}"
    print(done.stdout)
    assert f"{MUTANTS} mutants" in done.stdout
    # The mutants must reach all readers, or the test would test nothing.
    for reader in ("described", "converted", "loaded by llama.cpp", "opened by the engine"):
        assert reader in done.stdout


def test_semantic_mutants(tmp_path: Path) -> None:
    """Files that are well formed and mean nonsense, through every command that reads models."""
    command = [sys.executable, "-m", "tests.support.semantic", str(tmp_path), str(SEED)]
    done = subprocess.run(
        [*command, str(SEMANTIC)], cwd=ROOT, capture_output=True, text=True,
        timeout=60 + 100 * (SEMANTIC or 2000),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert "exit code 0:" in done.stdout
    assert "exit code 2:" in done.stdout
