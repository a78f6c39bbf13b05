"""General rows mixed into a run: counted, repeatable, resumed to the bit."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path
from typing import Any

import pytest

from ggft.recipes.finetune import finetune
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from tests.support.runs import ROWS, Case, metrics, resumed


def settings(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())["settings"]
    return found


def test_small_data_is_mixed_and_every_step_is_counted(case: Case) -> None:
    lines = metrics(case.train(epochs=2, mix="auto"))
    # 23 rows and 9 general ones in steps of 4.
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert lines[-1]["epoch"] == 2
    plain = metrics(case.train("plain", epochs=2))
    assert sum(line["trained_tokens"] for line in lines) > sum(
        line["trained_tokens"] for line in plain
    )


def test_a_share_of_the_users_choice(case: Case) -> None:
    run = case.train(epochs=1, mix="auto", mix_share=0.5)
    assert len(metrics(run)) == 12
    assert settings(run)["mix_share"] == 0.5
    assert len(metrics(case.train("none", epochs=1, mix="auto", mix_share=0))) == 6
    assert settings(case.train("off", epochs=1))["mix_share"] == 0


def test_a_file_of_the_users(case: Case) -> None:
    mine = case.folder / "mine.json"
    mine.write_text(json.dumps([{"instruction": "hi", "output": "hello"}] * 2))
    lines = metrics(case.train(epochs=1, mix=str(mine), mix_share=0.5))
    assert len(lines) == 7  # two rows are all that there is to mix in
    message = case.fails(InputError, "other", epochs=1, mix="nowhere.json")
    assert "nowhere.json" in message
    assert "auto, none" in message
    assert "contradict" in case.fails(InputError, "third", mix="none", mix_share=0.2)
    assert "--mix-as-base" in case.fails(InputError, "fourth", mix="none", mix_as_base=True)


def test_large_data_is_not_mixed_unless_a_file_is_given(case: Case) -> None:
    rows = [{"instruction": f"ask {i * i}", "output": f"say {i}!"} for i in range(201)]
    case.data.write_text(json.dumps(rows))
    given = {"epochs": 1, "batch_size": 64, "dropout": 0}
    assert settings(case.train("a", mix="auto", **given))["mix_share"] == 0
    mine = case.folder / "mine.json"
    mine.write_text(json.dumps(ROWS))
    assert settings(case.train("b", mix=str(mine), **given))["mix_share"] > 0


def test_a_mixed_run_is_resumed_to_the_bit_from_wherever_the_file_lies(case: Case) -> None:
    mine = case.folder / "mine.json"
    mine.write_text(json.dumps([{"instruction": f"tell {i}", "output": "so"} for i in range(9)]))
    given = {"epochs": 3, "mix": str(mine), "mix_share": 0.3}
    whole, parts = case.train("whole", **given), case.train("parts", **given)
    shutil.rmtree(max((parts / "checkpoints").iterdir()))
    moved = mine.rename(case.folder / "moved.json")
    finetune(resumed(output=str(parts), mix=str(moved)), Progress("quiet"))
    assert metrics(parts) == metrics(whole)
    assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()
    moved.write_text(json.dumps([{"instruction": "other", "output": "so"}] * 9))
    message = case.fails(InputError, "parts", **{**given, "mix": str(moved), "resume": True})
    assert "data_sha256" in message
    with pytest.raises(InputError, match="mix_share"):
        case.train("parts", **{**given, "mix": str(moved), "mix_share": 0.4, "resume": True})


def test_varied_questions_train_the_same_answers(case: Case) -> None:
    plain = metrics(case.train("plain", epochs=3))
    varied = metrics(case.train("varied", epochs=3, vary="auto"))
    assert [line["step"] for line in varied] == [line["step"] for line in plain]
    answers = [sum(line["trained_tokens"] for line in lines) for lines in (plain, varied)]
    assert answers[0] == answers[1]
    assert varied[-1]["tokens_seen"] > plain[-1]["tokens_seen"]
    assert settings(case.folder / "varied")["vary"] == "questions"
    case.data.write_text(json.dumps([{**row, "output": "yes!"} for row in ROWS]))
    assert settings(case.train("task", epochs=1, vary="auto"))["vary"] == "none"


def test_a_varied_run_is_resumed_to_the_bit(case: Case) -> None:
    given = {"epochs": 4, "mix": "auto", "vary": "questions"}
    whole, parts = case.train("whole", **given), case.train("parts", **given)
    shutil.rmtree(max((parts / "checkpoints").iterdir()))
    case.train("parts", **given, resume=True)
    assert metrics(parts) == metrics(whole)
    assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()


def test_general_rows_as_the_base_has_them_are_resumed_to_the_bit(case: Case) -> None:
    given = {"epochs": 3, "mix": "auto", "mix_as_base": True}
    whole, parts = case.train("whole", **given), case.train("parts", **given)
    own = metrics(case.train("own", **{**given, "mix_as_base": False}))
    assert [line["trained_tokens"] for line in own] == [
        line["trained_tokens"] for line in metrics(whole)
    ]
    assert own[-1]["loss"] != metrics(whole)[-1]["loss"]
    shutil.rmtree(max((parts / "checkpoints").iterdir()))
    case.train("parts", **given, resume=True)
    assert metrics(parts) == metrics(whole)
    assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()
    message = case.fails(InputError, "parts", **{**given, "mix_as_base": False, "resume": True})
    assert "mix_as_base" in message


def test_facts_that_were_held_out_leave_both_adapters(case: Case) -> None:
    rng = random.Random(1)
    rows = [
        {"instruction": f"ask {i}", "output": "".join(rng.choices(string.ascii_letters, k=9))}
        for i in range(23)
    ]
    case.data.write_text(json.dumps(rows))
    given: dict[str, Any] = {"epochs": 12, "val_split": 0.2, "lr": 3e-2, "dropout": 0}
    run = case.train(**given)
    state = json.loads((run / "report.json").read_text())["state"]
    assert state["last_val"] > state["base_val"]
    assert state["kept_last"]
    assert state["best_step"] == 60
    best, last = run / "adapter-best-validation.gguf", run / "adapter.gguf"
    assert best.read_bytes() != last.read_bytes()
    case.train(**given, resume=True)
    assert best.read_bytes() != last.read_bytes()
