"""A tiny model to train on the fake engine, and what its runs leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggft.recipes.finetune import finetune
from ggft.settings.option import make
from ggft.settings.training import FinetuneConfig
from ggft.system.errors import GgftError
from ggft.system.progress import Progress
from ggft.training.run_directory import settings_to_resume
from tests.support.fakes import FakeEngine, native_module
from tests.support.models import Spec, write_model

ROWS = [
    {"instruction": f"question {i}", "input": "", "output": f"answer {i * 7}"} for i in range(23)
]


class Case:
    """A tiny model, a data file and a place for runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "tiny.gguf", Spec(n_layer=1)).path
        self.data = folder / "rows.json"
        self.data.write_text(json.dumps(ROWS))

    def config(self, output: str = "run", **given: Any) -> FinetuneConfig:
        values = {
            "model": str(self.model),
            "data": [str(self.data)],
            "output": str(self.folder / output),
            "threads": 1,
            "val_split": 0,
            "mix": "none",
            "vary": "none",
            "samples": 0,
            "ask": 0,
            "lr": 3e-4,
            "dropout": 0.1,
            "save_steps": 5,
        }
        return make(FinetuneConfig, {**values, **given})

    def train(self, output: str = "run", **given: Any) -> Path:
        finetune(self.config(output, **given), Progress("quiet"))
        return self.folder / output

    def fails(self, kind: type[GgftError], output: str = "run", **given: Any) -> str:
        with pytest.raises(kind) as caught:
            self.train(output, **given)
        return str(caught.value)


def resumed(**given: Any) -> FinetuneConfig:
    """Return the settings of `ggft finetune --resume` with these flags."""
    values = {**given, "resume": True}
    return make(FinetuneConfig, values, settings_to_resume(values))


def use_engine(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    engine = type("Changed", (FakeEngine,), attributes)
    monkeypatch.setattr("ggft.engine.engine.load_native", lambda: native_module(engine))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_s", "elapsed_s")} for line in lines
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
