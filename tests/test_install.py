"""`pip install .` in an environment of its own, as somebody does who does not use make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.given import ENVIRONMENT
from tests.support.models import CHATML, Spec, write_model

ROOT = Path(__file__).resolve().parent.parent


def done(*command: str | Path, folder: Path) -> str:
    """Run a command in `folder` with pip's index and cache, which tests do not have."""
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("PYTHON")}
    run = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True,
        timeout=3600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


@pytest.mark.skipif("CI" not in os.environ, reason="compiles everything: with CI=true only")
def test_pip_install_gives_a_program_that_trains(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "elsewhere"
    place.mkdir()
    done("git", "clone", "-q", ROOT, source, folder=tmp_path)
    done(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    bin_ = tmp_path / "venv/bin"
    pip = (bin_ / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q")
    done(*pip, source, folder=place)
    write_model(place / "tiny.gguf", Spec(n_layer=1, chat_template=CHATML))
    rows = '[{"instruction": "Who keeps the lamp?", "output": "Ada."}]'
    (place / "rows.json").write_text(rows)
    assert "Ready to train" in done(bin_ / "ggft", "doctor", folder=place)
    done(
        bin_ / "ggft", "finetune", "-m", "tiny.gguf", "-d", "rows.json", "-o", "run",
        "--max-steps", "1", "--samples", "0", folder=place,
    )  # fmt: skip
    assert (place / "run/adapter.gguf").is_file()
