"""Runs on the true engine that do not end well: NaN in training, a base worse than chance."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from ggft.adapters.adapter import read_adapter
from ggft.cli import cli
from ggft.command import run as run_command
from ggft.engine.engine import Engine
from ggft.gguf.read import read_gguf
from ggft.recipes.finetune import finetune
from ggft.system.errors import NumericError
from tests.support.runs import Case, metrics

NAME = "blk.0.attn_q.weight.lora_b"


def test_nan_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing after the bad step is saved, and the remedy that is printed works."""
    optimizer_step = Engine.optimizer_step

    def too_large(self: Engine, lr: float, n_targets: int) -> float:
        norm = optimizer_step(self, lr, n_targets)
        if lr > 0.5 and self.step == 3:
            self.set(NAME, "value", np.full_like(self.get(NAME), np.nan))
        return norm

    monkeypatch.setattr(Engine, "optimizer_step", too_large)
    case = Case(tmp_path)
    message = case.fails(NumericError, lr=1, save_steps=1, warmup_steps=0, epochs=3)
    run = tmp_path / "run"
    assert message.startswith("step 3: ")
    assert NAME in message
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["step-000001", "step-000002"]
    for path in run.rglob("adapter.gguf"):  # which reads its values, too
        read_adapter(path, read_gguf(case.model))
    (command,) = re.findall(r"ggft (finetune .*)$", message)
    assert run_command(cli, shlex.split(command)) == 0
    assert len(metrics(run)) == 18
    read_adapter(run / "adapter.gguf", read_gguf(case.model))


def test_a_base_worse_than_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of the tiny model are random: a guess predicts the rows better."""
    finetune(Case(tmp_path).config(epochs=1))
    out, err = capsys.readouterr()
    assert err.index("worse than chance") < err.index("step 1/")
    assert "worse than chance" in out
