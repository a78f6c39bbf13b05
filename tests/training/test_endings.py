"""How runs end: NaN, a loss that rises, adapters and checkpoints that are not there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import read_adapter
from ggft.cli import cli
from ggft.command import run as run_command
from ggft.recipes.finetune import finetune
from ggft.system.errors import Interrupted, NumericError, ResourceError
from ggft.system.progress import Progress
from ggft.training.checkpoint import load_newest
from ggft.training.kept import KeptAdapter
from tests.support.fakes import FakeEngine
from tests.support.runs import Case, metrics, resumed, snapshot, use_engine


def test_nan_stops_with_step_and_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, nan_at_step=7)
    message = case.fails(NumericError, epochs=3)
    assert "step 8" in message
    assert "attn_q.weight.lora_a" in message
    found = load_newest(case.folder / "run" / "checkpoints", pytest.fail)
    assert found is not None
    assert found.step == 5


def test_the_remedy_for_nan_works(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of what gives NaN is saved, and the command that is printed runs."""

    def optimizer_step(self: FakeEngine, lr: float, n_targets: int) -> float:
        if lr > 0.5:
            self.state["blk.0.attn_q.weight.lora_a"]["value"][:] = np.nan
        return FakeEngine.optimizer_step(self, lr, n_targets)

    use_engine(monkeypatch, optimizer_step=optimizer_step)
    message = case.fails(NumericError, "it's a run", epochs=3, lr=1, save_steps=1)
    assert "step 1: " in message
    run = case.folder / "it's a run"
    assert not list((run / "checkpoints").glob("*"))
    assert not (run / "adapter.gguf").exists()
    (command,) = re.findall(r"ggft (finetune .*)$", message)
    assert run_command(cli, shlex.split(command)) == 0
    assert len(metrics(run)) == 18
    assert "learned" in capsys.readouterr().out


def test_nan_of_the_base_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, token_nats=lambda self, tokens, *_: np.full(tokens.shape, np.nan))
    assert "--precision f32" in case.fails(NumericError)


@pytest.mark.parametrize("given", [{}, {"val_split": 0.2}, {"epochs": 1}])
def test_a_diverged_run_stops_and_keeps_the_best(case: Case, given: dict[str, Any]) -> None:
    given = {"epochs": 10, "lr": 1.0, **given}
    run = case.train(**given)
    report = json.loads((run / "report.json").read_text())
    assert report["verdict"]["kind"] == "diverged"
    assert "--lr 0.001" in report["verdict"]["text"]
    before_after = re.search(r"training loss ([\d.]+) → ([\d.]+)", report["verdict"]["text"])
    assert before_after is not None
    assert float(before_after[2]) > float(before_after[1]), "the loss that it rose to is said"
    assert len(metrics(run)) <= 20
    assert report["state"]["best_step"] == 0
    lora_b = [a for n, a in read_adapter(run / "adapter.gguf").arrays().items() if n[-1] == "b"]
    assert not any(array.any() for array in lora_b)
    before = snapshot(run)
    case.train(**given, resume=True)
    assert snapshot(run)["adapter.gguf"] == before["adapter.gguf"]
    assert snapshot(run)["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize("stop_at", [0, 2, None])
def test_a_run_that_diverged_has_the_adapter_that_it_began_with(
    case: Case, stop_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was interrupted or not, and whatever became of the file that was given."""
    first = case.train("first", epochs=1, rank=3, lr=1e-2) / "adapter.gguf"
    given: dict[str, Any] = {"epochs": 10, "lr": 1.0, "init_adapter": str(first)}
    whole = (case.train("whole", **given) / "adapter.gguf").read_bytes()
    began = read_adapter(first).arrays()

    def forward_backward(self: FakeEngine, *args: Any) -> tuple[float, int]:
        if self.step == stop_at and first.exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return FakeEngine.forward_backward(self, *args)

    use_engine(monkeypatch, forward_backward=forward_backward)
    run = case.folder / "run"
    if stop_at is None:
        (case.train(**given) / "adapter.gguf").unlink()
    else:
        case.fails(Interrupted, **given)
    first.unlink()
    finetune(resumed(output=str(run)), Progress("quiet"))
    assert json.loads((run / "report.json").read_text())["state"]["best_step"] == 0
    assert (run / "adapter.gguf").read_bytes() == whole
    kept = read_adapter(run / "adapter.gguf").arrays()
    assert all(np.allclose(kept[name], array, atol=1e-6) for name, array in began.items())


def test_an_overwritten_run_leaves_no_adapter_to_begin_with(case: Case) -> None:
    first = case.train("first", epochs=1) / "adapter.gguf"
    run = case.train(epochs=1, init_adapter=str(first))
    assert (run / "initial.gguf").read_bytes() == first.read_bytes()
    case.train(epochs=1, init_adapter=str(run / "initial.gguf"), overwrite=True)
    assert (run / "initial.gguf").read_bytes() == first.read_bytes()
    case.train(epochs=1, overwrite=True)
    assert not (run / "initial.gguf").exists()


def test_what_was_learned_before_the_loss_rose_is_kept(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimizer_step(self: FakeEngine, lr: float, n_targets: int) -> float:
        return FakeEngine.optimizer_step(self, lr if self.step < 12 else 1.0, n_targets)

    use_engine(monkeypatch, optimizer_step=optimizer_step)
    given: dict[str, Any] = {"epochs": 9, "lr": 1e-2, "keep_checkpoints": 9}
    run = case.train(**given)
    state = json.loads((run / "report.json").read_text())["state"]
    assert state["ended"] == "the loss rose"
    assert state["best_step"] == 10
    adapter, saved = run / "adapter.gguf", run / "checkpoints" / "step-000010"
    assert adapter.read_bytes() == (saved / "adapter.gguf").read_bytes()
    adapter.write_bytes(b"damaged")
    case.train(**given, resume=True)
    assert adapter.read_bytes() == (saved / "adapter.gguf").read_bytes()


def test_a_base_worse_than_chance_is_said_before_training(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(self: FakeEngine, settings: dict[str, Any]) -> None:
        FakeEngine.__init__(self, settings)
        self.base *= 40

    use_engine(monkeypatch, __init__=init)
    for split in (0, 0.2):
        finetune(case.config(epochs=1, val_split=split, overwrite=True))
        out, err = capsys.readouterr()
        assert err.index("worse than chance") < err.index("step 1/")
        assert "worse than chance" in out


@pytest.mark.parametrize("given", [{}, {"val_split": 0.2, "lr": 1e-2, "patience": 0}])
@pytest.mark.parametrize("kind", [ResourceError, KeyboardInterrupt])
def test_an_adapter_that_was_not_written_is_written_when_resuming(
    case: Case, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], kind: type[BaseException]
) -> None:
    """The disk is full, or the run is killed, at any of its writes of adapter.gguf."""
    whole = case.train("whole", epochs=3, **given)
    n_writes, parts = 0, case.folder / "parts"

    def write(self: KeptAdapter) -> str:
        nonlocal n_writes
        n_writes += 1
        if n_writes == fails_at:
            raise kind("the disk is full")
        return original(self)

    original = KeptAdapter.write
    monkeypatch.setattr(KeptAdapter, "write", write)
    fails_at = -1
    case.train("count", epochs=3, **given)
    n_all = n_writes
    assert n_all >= 2
    for number in range(1, n_all + 1):
        n_writes, fails_at = 0, number
        with pytest.raises(kind):
            case.train("parts", epochs=3, **given)
        case.train("parts", epochs=3, resume=True, **given)
        assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()
        assert metrics(parts) == metrics(whole)
        shutil.rmtree(parts)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"GGUF")])
def test_a_finished_run_that_lost_its_adapter_has_it_again(case: Case, damage: Any) -> None:
    run = case.train(epochs=1)
    adapter = (run / "adapter.gguf").read_bytes()
    damage(run / "adapter.gguf")
    case.train(epochs=1, resume=True)
    assert (run / "adapter.gguf").read_bytes() == adapter


def test_damaged_checkpoints_are_set_aside(case: Case) -> None:
    """What is saved after falling back is newer than the damaged ones, whatever its number."""
    whole = case.train("whole", epochs=3, keep_checkpoints=9)
    run = case.train(epochs=3, keep_checkpoints=9)
    for name in ("step-000010", "step-000015", "step-000018"):
        (run / "checkpoints" / name / "state.json").write_text("{")
    saves = []

    def stop(path: Path) -> None:
        saves.append(sorted(p.name for p in path.iterdir() if not p.name.startswith(".")))

    case.train(epochs=3, keep_checkpoints=1, resume=True)
    stop(run / "checkpoints")
    assert saves == [
        ["step-000010.damaged", "step-000015.damaged", "step-000018", "step-000018.damaged"]
    ]
    assert (run / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()
    case.train(epochs=3, resume=True)
