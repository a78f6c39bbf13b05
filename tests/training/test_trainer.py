from __future__ import annotations

import json
import os
import shutil
import signal
from typing import Any

import pytest

from ggft.adapters.adapter import read_adapter
from ggft.gguf.read import read_gguf
from ggft.recipes.finetune import finetune
from ggft.settings.option import make
from ggft.settings.training import FinetuneConfig
from ggft.system.errors import GgftError, InputError, Interrupted, ResourceError
from ggft.system.progress import Progress
from ggft.training.checkpoint import load_newest
from tests.support.fakes import FakeEngine, native_module
from tests.support.models import Spec, write_model
from tests.support.runs import ROWS, Case, metrics, resumed, snapshot, use_engine


def test_a_run_directory_holds_all_that_it_should(case: Case) -> None:
    run = case.train(epochs=3)
    adapter = read_adapter(run / "adapter.gguf", read_gguf(case.model))
    assert len(adapter.base_names) == 7
    assert adapter.meta.template == "instruction"
    assert adapter.meta.base_sha256 == read_gguf(case.model).sha256()
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert lines[-1]["epoch"] == 3
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000015", "step-000018"]
    report = json.loads((run / "report.json").read_text())
    assert report["verdict"]
    again = make(FinetuneConfig, {"output": str(run)}, run / "config.yaml")
    assert (again.rank, again.lr, again.epochs, again.batch_size) == (8, 3e-4, 3, 4)


def test_the_last_partial_batch_is_trained(case: Case) -> None:
    lines = metrics(case.train(epochs=1))
    per_example = [line["trained_tokens"] for line in lines]
    assert len(per_example) == 6
    # 23 rows in steps of 4: the last step has 3 of them.
    assert per_example[-1] < min(per_example[:-1])


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_fewer_rows_than_a_batch(case: Case, n_rows: int) -> None:
    case.data.write_text(json.dumps(ROWS[:n_rows]))
    assert len(metrics(case.train(epochs=2))) == 2


def test_the_same_seed_gives_the_same_adapter(case: Case) -> None:
    first, second = case.train("a", epochs=1), case.train("b", epochs=1)
    other = case.train("c", epochs=1, seed=7)
    assert (first / "adapter.gguf").read_bytes() == (second / "adapter.gguf").read_bytes()
    assert (first / "adapter.gguf").read_bytes() != (other / "adapter.gguf").read_bytes()


def test_grad_accum_is_a_larger_batch(case: Case) -> None:
    large = case.train("a", epochs=1, batch_size=8)
    summed = case.train("b", epochs=1, batch_size=4, grad_accum=2)
    assert metrics(large) == metrics(summed)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 11, 17])
@pytest.mark.parametrize("how", ["between", "within"])
def test_resumed_equals_uninterrupted(
    case: Case, monkeypatch: pytest.MonkeyPatch, stop_at: int, how: str
) -> None:
    """A signal between two calls or within one; to the bit, dropout included."""
    whole = case.train("whole", epochs=3)

    def forward_backward(self: FakeEngine, *args: Any) -> tuple[float, int]:
        if self.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            if how == "within":
                assert self._cancel.wait(5)
        return FakeEngine.forward_backward(self, *args)

    use_engine(monkeypatch, forward_backward=forward_backward)
    with pytest.raises(Interrupted) as caught:
        case.train("parts", epochs=3)
    assert caught.value.exit_code == 143
    monkeypatch.setattr("ggft.engine.engine.load_native", native_module)
    read_adapter(case.folder / "parts" / "adapter.gguf", read_gguf(case.model))
    parts = case.train("parts", epochs=3, resume=True)
    assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()
    assert metrics(parts) == metrics(whole)
    saved = [load_newest(run / "checkpoints", pytest.fail) for run in (parts, whole)]
    assert saved[0] is not None
    assert saved[1] is not None
    for name in ("adapter.gguf", "optimizer.gguf"):
        assert (saved[0].path / name).read_bytes() == (saved[1].path / name).read_bytes()


@pytest.mark.parametrize("where", ["evaluation", "first evaluation", "save"])
def test_a_signal_while_evaluating_or_saving(
    case: Case, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    given = {"epochs": 3, "val_split": 0.2, "save_steps": 2, "lr": 1e-2, "patience": 0}
    whole = case.train("whole", **given)
    stop_at = 0 if where == "first evaluation" else 5
    sent: list[int] = []

    def token_nats(self: FakeEngine, *args: Any) -> Any:
        if self.step == stop_at and where != "save" and not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert self._cancel.wait(5)
        return FakeEngine.token_nats(self, *args)

    def get_tensor(self: FakeEngine, name: str, which: str) -> Any:
        if self.step == stop_at - 1 and where == "save" and which == "m":
            os.kill(os.getpid(), signal.SIGTERM)
        return FakeEngine.get_tensor(self, name, which)

    use_engine(monkeypatch, token_nats=token_nats, get_tensor=get_tensor)
    with pytest.raises(Interrupted):
        case.train("parts", **given)
    monkeypatch.setattr("ggft.engine.engine.load_native", native_module)
    parts = case.train("parts", **given, resume=True)
    assert metrics(parts) == metrics(whole)
    assert any("val_loss" in line for line in metrics(whole))
    assert (parts / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()


def test_resuming_after_a_kill_goes_back_to_the_checkpoint(case: Case) -> None:
    """A killed run has metrics after its last checkpoint; they are not doubled."""
    whole = case.train("whole", epochs=3)
    killed = case.train("killed", epochs=3)
    shutil.rmtree(killed / "checkpoints" / "step-000018")
    path = killed / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 19, "los')
    case.train("killed", epochs=3, resume=True)
    assert metrics(killed) == metrics(whole)
    assert (killed / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()


def test_resume_takes_the_settings_of_the_run(case: Case) -> None:
    run = case.train(epochs=2, rank=3, lr=1e-3)
    (newest,) = (run / "checkpoints").glob("step-000012")
    shutil.rmtree(newest)
    config = resumed(output=str(run))
    assert (config.rank, config.lr, config.epochs) == (3, 1e-3, 2)
    finetune(config, Progress("quiet"))
    assert len(metrics(run)) == 12


def test_what_was_chosen_from_the_data_stays_when_resuming(case: Case) -> None:
    rows = [{"instruction": f"ask {i * i}", "output": f"say {i}!"} for i in range(61)]
    case.data.write_text(json.dumps(rows))
    given = {"val_split": None, "lr": None, "dropout": None, "epochs": 2, "patience": 0}
    whole, parts = case.train("whole", **given), case.train("parts", **given)
    assert any("val_loss" in line for line in metrics(whole))
    newest = max((parts / "checkpoints").iterdir())
    shutil.rmtree(newest)
    config = resumed(output=str(parts), samples=0)
    assert config.val_split
    finetune(config, Progress("quiet"))
    assert metrics(parts) == metrics(whole)


@pytest.mark.parametrize(
    ("given", "n_steps"),
    [
        ({"max_steps": 20}, 20),
        ({"max_steps": 4}, 4),
        ({"max_steps": 20, "epochs": 2}, 12),
        ({"max_steps": 3, "epochs": 2}, 3),
    ],
)
def test_max_steps(case: Case, given: dict[str, Any], n_steps: int) -> None:
    assert len(metrics(case.train(**given))) == n_steps


def test_resuming_a_finished_run_does_nothing(case: Case) -> None:
    run = case.train(epochs=1)
    before = (run / "adapter.gguf").read_bytes()
    case.train(epochs=1, resume=True)
    assert (run / "adapter.gguf").read_bytes() == before
    assert len(metrics(run)) == 6


def test_resume_with_nothing_there_starts(case: Case) -> None:
    assert len(metrics(case.train(epochs=1, resume=True))) == 6


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": 7}, "seed: 42 → 7"),
        ({"threads": 2}, "threads: 1 → 2"),
        ({"lr": 1e-3}, "lr: 0.0003 → 0.001"),
        ({"epochs": 2}, "epochs: 3 → 2"),
        ({"packing": False}, "packing: True → False"),
    ],
)
def test_resuming_otherwise_is_refused(case: Case, changes: dict[str, Any], part: str) -> None:
    case.train(epochs=3)
    assert part in case.fails(InputError, **{"epochs": 3, "resume": True, **changes})


def test_resuming_with_other_data_or_model_is_refused(case: Case) -> None:
    case.train(epochs=1)
    case.data.write_text(json.dumps([*ROWS[1:], ROWS[0]]))
    assert "data_sha256" in case.fails(InputError, epochs=1, resume=True)
    case.data.write_text(json.dumps(ROWS))
    write_model(case.model, Spec(n_layer=1, seed=5))
    assert "model_sha256" in case.fails(InputError, epochs=1, resume=True)


def test_an_adapter_without_a_checkpoint_is_not_resumed(case: Case) -> None:
    run = case.train(epochs=1)
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint" in case.fails(InputError, epochs=1, resume=True)


def test_an_older_run_is_neither_overwritten_nor_touched(case: Case) -> None:
    run = case.train(epochs=1)
    before = snapshot(run)
    message = case.fails(InputError, epochs=1)
    assert "--resume" in message
    assert "--overwrite" in message
    assert snapshot(run) == before
    assert len(metrics(case.train(epochs=2, overwrite=True))) == 12


def test_a_stopped_run_does_not_pass_an_older_adapter_off_as_its_own(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (case.train(epochs=1) / "adapter.gguf").read_bytes()

    def token_nats(self: FakeEngine, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        assert self._cancel.wait(5)
        return FakeEngine.token_nats(self, *args)

    use_engine(monkeypatch, token_nats=token_nats)
    message = case.fails(Interrupted, epochs=1, val_split=0.2, seed=7, overwrite=True)
    assert "learned nothing yet" in message
    adapter = read_adapter(case.folder / "run" / "adapter.gguf")
    assert adapter.path.read_bytes() != old
    assert not any(a.any() for n, a in adapter.arrays().items() if n.endswith("lora_b"))


def test_nothing_is_written_by_a_dry_run(case: Case) -> None:
    before = snapshot(case.folder)
    case.train(dry_run=True)
    assert snapshot(case.folder) == before
    assert not (case.folder / "run").exists()


@pytest.mark.parametrize(
    ("given", "kind", "parts"),
    [
        ({"target_modules": "q_prj"}, InputError, ["'q_prj'", "q_proj"]),
        ({"layers": "9"}, InputError, ["--layers", "0-0"]),
        ({"data": []}, InputError, ["--data"]),
        ({"data": ["none.json"]}, InputError, ["none.json"]),
        ({"model": "none.gguf"}, InputError, ["none.gguf"]),
        ({"template": "nope"}, InputError, ["'nope'"]),
        ({"memory": "1M"}, ResourceError, ["--memory", "needed", "at most 1.0 MiB"]),
        ({"max_length": 8}, InputError, ["nothing to train on"]),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    case: Case, given: dict[str, Any], kind: type[GgftError], parts: list[str]
) -> None:
    before = snapshot(case.folder)
    message = case.fails(kind, "deep/run", **given)
    for part in parts:
        assert part in message
    assert snapshot(case.folder) == before
    assert not (case.folder / "deep").exists()


def test_a_run_shrinks_rather_than_fails(case: Case) -> None:
    """In ever less memory internals are recomputed and rows get shorter; steps stay the same."""
    write_model(case.model, Spec(n_layer=4))  # of one block, little is saved by recomputing it
    given: dict[str, Any] = {"epochs": 1, "dropout": 0, "batch_size": 23, "overwrite": True}
    plans, losses = [], []
    while True:
        run = case.train(**given)
        plans.append(json.loads((run / "report.json").read_text())["plan"])
        losses.append(metrics(run)[-1]["loss"])
        given["memory"] = f"{plans[-1]['total_bytes'] // 1024 - 1}K"
        try:
            case.train(**{**given, "dry_run": True})
        except ResourceError:
            break
    assert plans[0]["keep"]
    assert not plans[-1]["keep"]
    assert plans[-1]["row_tokens"] < plans[0]["row_tokens"]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_a_file_in_the_way(case: Case) -> None:
    (case.folder / "run").write_text("mine")
    assert "not a directory" in case.fails(InputError)
    assert "not a directory" in case.fails(InputError, "run/deeper")
    assert (case.folder / "run").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(case: Case) -> None:
    (case.folder / "locked").mkdir(mode=0o500)
    assert "no permission" in case.fails(InputError, "locked/run")


def test_too_little_disk_space(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(case.folder)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = case.fails(ResourceError)
    assert "1.0 MiB" in message
    assert not (case.folder / "run").exists()


def test_events_are_json_lines(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(case.config(epochs=1, json=True))
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["plan", *["step"] * 6, "done"]
    assert err == ""


def test_lines_for_people_without_a_terminal(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(case.config(epochs=1))
    out, err = capsys.readouterr()
    assert "step 6/6" in err
    assert "\r" not in err
    assert str(case.folder / "run" / "adapter.gguf") in out
