"""`import ggft`: what it offers, and the example that shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ggft
from tests.conftest import ROOT
from tests.support.models import Spec, write_model

ROWS = [{"instruction": f"say {i}", "output": f"it is {i * 7 % 10}"} for i in range(30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ggft.BaseModel:
    return ggft.open_model(write_model(tmp_path_factory.mktemp("api") / "m.gguf", Spec()).path)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_everything_public_is_there_and_documented() -> None:
    for name in ggft.__all__:
        value: Any = getattr(ggft, name)
        assert value.__doc__
        assert value.__name__ == name
        assert name in dir(ggft)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = ggft.unknown  # type: ignore[attr-defined]


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, ggft; assert not {'numpy', 'click', 'llama_cpp'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_runs(model: ggft.BaseModel, rows: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_api.py"
    command = [sys.executable, str(example), str(model.file.path), str(rows), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    for name in ("adapter.gguf", "merged.gguf"):
        assert (tmp_path / name).is_file()


class Notes(ggft.Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def on_start(self, n_steps: int, done: int) -> None:
        self.told.append(("start", (n_steps, done)))

    def on_step(self, step: ggft.Step) -> None:
        self.told.append(("step", step.step))

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        self.told.append(("evaluation", step))

    def on_save(self, step: int, checkpoint: Path) -> None:
        assert checkpoint.is_dir()
        self.told.append(("save", step))

    def on_end(self) -> None:
        self.told.append(("end", None))


def test_callbacks_are_told_in_order(model: ggft.BaseModel, rows: Path, tmp_path: Path) -> None:
    data = ggft.load_data(model, rows, val_split=0.1)
    notes = Notes()
    run = tmp_path / "run"
    given: dict[str, Any] = {"max_steps": 3, "epochs": 1, "samples": 0, "mix": "none"}
    result = ggft.train(model, data, output=run, callbacks=[notes], show="quiet", **given)
    assert notes.told == [
        ("start", (3, 0)), ("evaluation", 0), ("step", 1), ("step", 2), ("step", 3),
        ("evaluation", 3), ("save", 3), ("end", None),
    ]  # fmt: skip
    assert (run / "report.html").is_file()
    assert result.losses.n_val == len(data.validation)
    assert ggft.evaluate(model, data, result.adapter.path).tokens > 0


def test_a_run_is_resumed_with_its_own_settings(
    model: ggft.BaseModel, rows: Path, tmp_path: Path
) -> None:
    data = ggft.load_data(model, rows, val_split=0)
    given: dict[str, Any] = {"output": tmp_path / "run", "show": "quiet"}
    chosen: dict[str, Any] = {"max_steps": 2, "epochs": 1, "samples": 0, "ask": 0, "mix": "none"}
    first = ggft.train(model, data, **given, **chosen, rank=3, lr=2e-3)
    begun: dict[str, Any] = {**given, "output": tmp_path / "b", **chosen, "lr": 2e-3}
    ggft.train(model, data, **begun, init_adapter=str(first.adapter.path))
    again = ggft.train(
        model, data, **{**given, "output": tmp_path / "b"}, resume=True,
        init_adapter=str(first.adapter.path),
    )  # fmt: skip
    assert again.adapter.meta.rank == 3
    assert again.outcome.settings["lr"] == 2e-3


def test_a_temporary_run_goes_with_its_adapter(model: ggft.BaseModel, rows: Path) -> None:
    data = ggft.load_data(model, rows, val_split=0)
    adapter = ggft.train(model, data, max_steps=1, samples=0, mix="none", show="quiet").adapter
    folder = adapter.path.parent
    assert folder.is_dir()
    del adapter
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"rnk": 4}, ["unknown setting `rnk`", "rank"]),
        ({"rank": -1}, ["--rank is out of range"]),
        ({"max_length": 64}, ["`max_length` is not a setting of training", "load_data"]),
        ({"columns": ["a=input"]}, ["`columns` is not a setting of training", "load_data"]),
        ({"ignore_columns": ["a"]}, ["`ignore_columns` is not a setting", "load_data"]),
        ({"template_arg": ["a=1"]}, ["`template_arg` is not a setting", "open_model"]),
        ({"thinking": "drop"}, ["`thinking` is not a setting", "open_model"]),
        ({"report_to": "wandb"}, ["`report_to` is not a setting", "`callbacks`"]),
    ],
)
def test_settings_are_checked(
    model: ggft.BaseModel, rows: Path, settings: dict[str, Any], parts: list[str]
) -> None:
    data = ggft.load_data(model, rows)
    with pytest.raises(ggft.InputError) as caught:
        ggft.train(model, data, show="quiet", **settings)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("module", "make"), [("tensorboardX", lambda: ggft.TensorBoard("x")), ("wandb", ggft.WandB)]
)
def test_an_extra_that_is_missing_is_named(
    module: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ggft.InputError, match=r"pip install 'ggft\[(tensorboard|wandb)\]'"):
        make()


def test_losses_reach_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[tuple[Any, ...]] = []
    methods = {"add_scalar": lambda _, *point: points.append(point), "close": lambda _: None}
    writer = type("Writer", (), methods)
    fake = type(sys)("tensorboardX")
    fake.SummaryWriter = lambda folder: writer()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    board = ggft.TensorBoard("x")
    board.on_evaluation(2, 0.5, 10)
    board.on_end()
    assert points == [("held-out/loss", 0.5, 2)]


def test_an_unknown_instruction_set_is_an_input_error(
    model: ggft.BaseModel, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ggft.load_data(model, rows)
    monkeypatch.setenv("GGFT_ISA", "mmx")
    with pytest.raises(ggft.InputError, match="GGFT_ISA is 'mmx'"):
        ggft.train(model, data, output=tmp_path / "run")
    with pytest.raises(ggft.InputError, match="GGFT_ISA is 'mmx'"):
        ggft.evaluate(model, data)
    assert not (tmp_path / "run").exists()
