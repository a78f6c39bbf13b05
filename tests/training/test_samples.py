from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ggft.llama.model import LlamaModel
from ggft.recipes.finetune import finetune
from ggft.settings.option import make
from ggft.settings.training import FinetuneConfig
from ggft.system.errors import Interrupted, ResourceError
from ggft.system.progress import Progress
from tests.support.fakes import native_module
from tests.support.models import CHATML, Spec, write_model


def train(folder: Path, answer: str = "yes", **given: Any) -> list[dict[str, str]]:
    model = write_model(folder / "tiny.gguf", Spec(n_layer=1, chat_template=CHATML)).path
    rows = [{"instruction": f"<question {i}>", "output": answer} for i in range(9)]
    (folder / "rows.json").write_text(json.dumps(rows))
    values = {
        "model": str(model), "data": [str(folder / "rows.json")], "output": str(folder / "run"),
        "threads": 1, "epochs": 1, "device": "cpu", "mix": "none", "vary": "none", "ask": 0,
    }  # fmt: skip
    finetune(make(FinetuneConfig, {**values, **given}), Progress("quiet"))
    samples: list[dict[str, str]] = json.loads((folder / "run" / "report.json").read_text())[
        "samples"
    ]
    return samples


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggft.engine.engine.load_native", native_module)


def test_questions_are_answered_before_and_after(tmp_path: Path) -> None:
    samples = train(tmp_path)
    assert len(samples) == 3
    assert len({sample["question"] for sample in samples}) == 3
    assert samples[0]["question"] == "<question 0>"  # without the template around it
    for sample in samples:
        assert sample["before"] != sample["after"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;question 0&gt;" in page


def test_rows_are_asked_and_compared_with_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(["yes", " yes ", "no"])

    class Telling(LlamaModel):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            assert kwargs["temperature"] == 0
            yield from self.vocabulary.encode(next(told), special=False)

    monkeypatch.setattr("ggft.training.samples.LlamaModel", Telling)
    train(tmp_path, samples=0, ask=2, val_split=0.1)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    asked = report["asked"]
    assert [record["expected"] for record in asked] == ["yes"] * 3
    assert [record["as_given"] for record in asked] == [True, True, False]
    assert [record["held_out"] for record in asked] == [False, False, True]
    assert asked[2]["given"] == "no"
    assert (
        "2 of 2 trained rows answered as given, 0 of 1 held-out ones" in report["verdict"]["text"]
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Rows asked at the end" in page
    assert "held out, otherwise" in page
    assert set(report["measured"]) == {
        "rows_before", "rows_after", "general_before", "general_after"
    }  # fmt: skip
    assert report["losses"]["train_after"] == report["measured"]["rows_after"]


def test_long_answers_are_not_asked(tmp_path: Path) -> None:
    train(tmp_path, answer="y" * 100, samples=0, ask=9)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["asked"] == []


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 1), (5, 5), (50, 9)])
def test_as_many_as_asked_for(tmp_path: Path, n: int, expected: int) -> None:
    assert len(train(tmp_path, samples=n)) == expected


def test_no_memory_for_the_model_costs_only_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ResourceError("no memory")

    monkeypatch.setattr("ggft.training.samples.LlamaModel", fail)
    assert train(tmp_path) == []


def test_a_signal_meanwhile_costs_only_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(LlamaModel):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            yield from super().generate(*args, **kwargs)

    monkeypatch.setattr("ggft.training.samples.LlamaModel", Interrupting)
    with pytest.raises(Interrupted):
        train(tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["samples"] == []
    assert (tmp_path / "run" / "adapter.gguf").is_file()
