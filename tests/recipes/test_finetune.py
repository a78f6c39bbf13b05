"""What `ggft plan` and `ggft finetune --dry-run` say before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.recipes.finetune import finetune, plan
from tests.support.runs import Case


def test_a_plan_with_data_is_that_of_a_dry_run(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    config = case.config(rank=None, lr=None, dropout=None, epochs=None, memory="2GiB")
    plan(config)
    planned = capsys.readouterr().out
    finetune(replace(config, dry_run=True))
    assert capsys.readouterr().out == planned
    for part in ("23 examples", "settings     ", "rank 8", "micro-batch", "--max-length"):
        assert part in planned
    assert not (case.folder / "run").exists()


def test_a_plan_of_data_that_is_not_there_is_an_error(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "-m", str(case.model), "-d", str(case.folder / "missing.json")]
    assert run(cli, arguments) == 2
    assert "missing.json" in capsys.readouterr().err


def test_a_plan_without_data_says_what_it_assumes(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(case.config(data=[], batch_size=3, max_length=64))
    out = capsys.readouterr().out
    assert "3 examples of up to 64 tokens per batch, rank 8" in out
    assert "with -d FILE the settings follow from the data" in out
    plan(case.config(data=[], json=True))
    event = json.loads(capsys.readouterr().out)
    assert event["assumed"] == {"max_length": 512, "batch_size": 4, "rank": 8}
