"""A run that has ended goes on for more epochs; an adapter is trained on with new data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import read_adapter
from ggft.recipes.finetune import finetune
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from tests.support.runs import ROWS, Case, metrics, resumed

CONSTANT: dict[str, Any] = {"lr_scheduler": "constant", "warmup_steps": 0}


def test_more_epochs_extend_a_run_as_if_it_had_been_longer(case: Case) -> None:
    whole = case.train("whole", epochs=3, **CONSTANT)
    parts = case.train("parts", epochs=1, **CONSTANT)
    finetune(resumed(output=str(parts), epochs=3), Progress("quiet"))
    assert metrics(parts) == metrics(whole)
    assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()
    assert "epochs: 3" in (parts / "config.yaml").read_text()
    case.train("parts", epochs=3, resume=True, **CONSTANT)
    assert len(metrics(parts)) == 18


def test_the_rate_follows_the_longer_schedule(case: Case) -> None:
    run = case.train(epochs=1)
    case.train(epochs=2, resume=True)
    rates = [line["lr"] for line in metrics(run) if "lr" in line]
    assert len(rates) == 12
    assert rates[6] > rates[5]
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_more_steps_and_varied_questions_extend_a_run(case: Case) -> None:
    given: dict[str, Any] = {"vary": "questions", "max_steps": 4, "epochs": 4}
    run = case.train(**given)
    assert len(metrics(run)) == 4
    case.train(**{**given, "max_steps": 20, "epochs": 6}, resume=True)
    assert len(metrics(run)) == 20


def test_a_run_is_extended_on_the_same_rows_only(case: Case) -> None:
    case.train(epochs=1)
    rows = json.loads(case.data.read_text())
    case.data.write_text(json.dumps(rows[::-1]))
    assert "sha256" in case.fails(InputError, epochs=2, resume=True)
    case.data.write_text(json.dumps(rows))
    assert "lr: " in case.fails(InputError, epochs=2, lr=1e-3, resume=True)


def test_a_run_that_was_stopped_is_not_extended(case: Case) -> None:
    run = case.train(epochs=2)
    newest = max((run / "checkpoints").iterdir())
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert "epochs: 2 → 3" in case.fails(InputError, epochs=3, resume=True)


def test_a_run_begins_with_an_adapter(case: Case) -> None:
    first = case.train("first", epochs=1, rank=3, lr=1e-2)
    trained = read_adapter(first / "adapter.gguf")
    again = case.train("again", epochs=1, lr=1e-9, init_adapter=str(first / "adapter.gguf"))
    kept = read_adapter(again / "adapter.gguf")
    assert (kept.meta.rank, kept.meta.alpha) == (3, trained.meta.alpha)
    for name in trained.tensors:
        assert np.allclose(kept.array(name), trained.array(name), atol=1e-6), name


def test_an_adapter_of_smaller_rank_keeps_its_delta(case: Case) -> None:
    path = case.train("first", epochs=1, rank=2, alpha=6.0, lr=1e-2) / "adapter.gguf"
    given: dict[str, Any] = {"epochs": 1, "lr": 1e-9, "init_adapter": str(path)}
    old = read_adapter(path)
    new = read_adapter(case.train("again", rank=5, alpha=4.0, **given) / "adapter.gguf")
    for name in old.base_names:
        before, after = [
            a.array(f"{name}.lora_b") @ a.array(f"{name}.lora_a") * a.meta.alpha / rank
            for a, rank in ((old, 2), (new, 5))
        ]
        assert np.allclose(before, after, atol=1e-6), name
        assert np.abs(new.array(f"{name}.lora_a")[2:]).min(axis=1).all()  # as drawn


def test_adapters_that_cannot_be_trained_on(case: Case, tmp_path: Path) -> None:
    path = str(case.train("first", epochs=1, rank=4) / "adapter.gguf")
    assert "higher rank" in case.fails(InputError, "a", rank=2, init_adapter=path)
    given: dict[str, Any] = {"target_modules": ("attention",), "init_adapter": path}
    assert "more than is trained" in case.fails(InputError, "a", **given)
    assert "no.gguf" in case.fails(InputError, "a", init_adapter=str(tmp_path / "no.gguf"))


def test_a_resumed_run_needs_its_first_adapter_no_more(case: Case) -> None:
    path = case.train("first", epochs=1, rank=3) / "adapter.gguf"
    run = case.train("again", epochs=1, init_adapter=str(path))
    path.unlink()
    finetune(resumed(output=str(run), epochs=2), Progress("quiet"))
    assert len(metrics(run)) == 12


def test_columns_that_are_not_used_are_listed_before_training(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "id": n, "frage": "x"} for n, row in enumerate(ROWS, 1)]
    case.data.write_text(json.dumps(rows))
    finetune(case.config(epochs=1, ignore_columns=["frage"]), Progress("auto"))
    out = "".join(capsys.readouterr())
    assert out.count("columns not used: id (23 rows); --columns NAME=ROLE uses one") == 1
    assert "columns ignored as asked: frage (23 rows)" in out
    assert "no row has a column" in case.fails(InputError, "b", columns=["nofrage=input"])
