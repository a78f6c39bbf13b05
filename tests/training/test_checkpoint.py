from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import AdapterMeta, read_adapter
from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings
from ggft.gguf import write as gguf_write
from ggft.system.errors import InputError, ResourceError
from ggft.system.files import run_lock
from ggft.training import checkpoint
from ggft.training.checkpoint import check_same, load_newest, save, sweep
from tests.support.fakes import native_module
from tests.support.models import Spec, write_model

META = AdapterMeta(architecture="llama", rank=2, alpha=4.0)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("ggft.engine.engine.load_native", native_module)
    path = write_model(tmp_path / "base.gguf", Spec()).path
    settings = EngineSettings(
        paths=[str(path)], targets=["attn_q", "attn_v"], layer_first=0, layer_last=2, rank=2,
        alpha=4.0,
    )  # fmt: skip
    with Engine(settings) as engine:
        fill(engine, 0)
        yield engine


def fill(engine: Engine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for which in ("value", "m", "v"):
        for name, shape in engine.parameters.items():
            engine.set(name, which, rng.normal(size=shape).astype(np.float32))


def contents(engine: Engine) -> dict[str, Any]:
    return {
        f"{name}.{which}": engine.get(name, which)
        for which in ("value", "m", "v")
        for name in engine.parameters
    }


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_step(folder: Path, engine: Engine, step: int, keep: int = 9) -> Path:
    engine.step = step
    fill(engine, step)
    return save(folder, engine, META, {"note": f"ü {step}"}, keep=keep)


def test_what_is_saved_is_restored_to_the_bit(tmp_path: Path, engine: Engine) -> None:
    save_step(tmp_path / "c", engine, 7)
    before = contents(engine)
    fill(engine, 99)
    engine.step = 0
    found = load_newest(tmp_path / "c", pytest.fail)
    assert found is not None
    found.restore(engine)
    assert (engine.step, found.step, found.state) == (7, 7, {"note": "ü 7"})
    for name, array in contents(engine).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_saved_adapter_is_usable_as_it_is(tmp_path: Path, engine: Engine) -> None:
    path = save_step(tmp_path / "c", engine, 1)
    assert read_adapter(path / "adapter.gguf").meta.alpha == 4.0


def test_only_the_newest_are_kept(tmp_path: Path, engine: Engine) -> None:
    for step in (1, 2, 3, 1_000_000):
        save_step(tmp_path, engine, step, keep=2)
    names = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert sorted(names) == ["step-000003", "step-1000000"]
    found = load_newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "c"
    save_step(folder, engine, 5)
    (folder / "step-000005" / "adapter.gguf").write_bytes(b"damaged")
    save_step(folder, engine, 5)
    assert saved_steps(folder) == ["step-000005"]
    assert load_newest(folder, pytest.fail) is not None


def test_nothing_there() -> None:
    assert load_newest(Path("/nonexistent"), pytest.fail) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["adapter.gguf", "optimizer.gguf", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, engine: Engine, name: str, damage: Any
) -> None:
    folder = tmp_path / "c"
    save_step(folder, engine, 1)
    save_step(folder, engine, 2)
    damage(folder / "step-000002" / name)
    warnings: list[str] = []
    found = load_newest(folder, warnings.append)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    assert name in warnings[0]
    assert saved_steps(folder) == ["step-000001", "step-000002.damaged"]


def test_the_last_whole_one_stays_until_there_is_another(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "c"
    for step in (1, 2, 3):
        save_step(folder, engine, step)
    truncate(folder / "step-000002" / "optimizer.gguf")
    flip(folder / "step-000003" / "adapter.gguf")
    found = load_newest(folder, lambda text: None)
    assert found is not None
    found.restore(engine)
    save_step(folder, engine, 2, keep=1)
    again = load_newest(folder, pytest.fail)
    assert again is not None
    assert again.step == 2
    assert saved_steps(folder) == ["step-000002", "step-000002.damaged", "step-000003.damaged"]


def test_all_damaged_is_an_error_and_no_new_start(tmp_path: Path, engine: Engine) -> None:
    save_step(tmp_path / "c", engine, 1)
    (tmp_path / "c" / "step-000001" / "optimizer.gguf").unlink()
    with pytest.raises(InputError, match="no checkpoint is whole"):
        load_newest(tmp_path / "c", lambda text: None)


def test_a_newer_format_is_refused(tmp_path: Path, engine: Engine) -> None:
    path = save_step(tmp_path / "c", engine, 1) / "state.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": checkpoint.FORMAT_VERSION + 1}))
    with pytest.raises(InputError, match="newer ggft"):
        load_newest(tmp_path / "c", pytest.fail)


def test_differences_are_named() -> None:
    then = {"seed": 1, "rank": 8, "data_sha256": "a"}
    check_same(then, dict(then), Path("c"))
    with pytest.raises(InputError, match="rank: 8 → 4; threads: None → 2"):
        check_same(then, {"seed": 1, "rank": 4, "data_sha256": "a", "threads": 2}, Path("c"))


def test_a_setting_that_a_run_does_not_know_was_off() -> None:
    then = {"seed": 1}
    check_same(then, {"seed": 1, "rslora": False}, Path("c"))
    check_same({"seed": 1, "gone": None}, then, Path("c"))
    with pytest.raises(InputError, match="mix: None → 'auto'"):
        check_same(then, {"seed": 1, "mix": "auto"}, Path("c"))


class FailingDisk:
    """Let the n-th call of what writes fail; counts calls with n < 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.n, self.count = n, 0
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (Path, "rename"),
            (Path, "mkdir"),
            (gguf_write, "_write_tensor"),
        ):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.n:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call


def test_a_full_disk_at_any_point_keeps_the_older_one(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counter = FailingDisk(patch, -1)
        save_step(tmp_path / "count", engine, 1)
    assert counter.count > 20
    folder = tmp_path / "c"
    save_step(folder, engine, 1)
    for n in range(1, counter.count + 1):
        with monkeypatch.context() as patch:
            FailingDisk(patch, n)
            with pytest.raises(ResourceError, match="No space left"):
                save_step(folder, engine, 2, keep=1)
        found = load_newest(folder, pytest.fail)
        assert found is not None
        # The last flush, of the folder, may fail after the new one has its name.
        assert found.step in (1, 2)
        assert not list(folder.glob(".step-*"))
        if found.step == 2:
            shutil.rmtree(folder)
            save_step(folder, engine, 1)


def test_killed_between_any_two_operations(tmp_path: Path, engine: Engine) -> None:
    """What a kill leaves is what the copied folder shows at each of these moments."""
    folder = tmp_path / "c"
    save_step(folder, engine, 1)
    snapshots: list[Path] = []

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename.endswith(("checkpoint.py", "write.py")):
            if event == "line" and frame.f_code.co_name in (
                "save", "_replace_folder", "write_gguf", "atomic_output", "_write_state",
            ):  # fmt: skip
                sys.settrace(None)
                copy = tmp_path / f"snapshot-{len(snapshots)}"
                shutil.copytree(folder, copy)
                snapshots.append(copy)
                sys.settrace(trace)
            return trace
        return None

    sys.settrace(trace)
    try:
        save_step(folder, engine, 2, keep=1)
        save_step(folder, engine, 2, keep=1)
    finally:
        sys.settrace(None)
    assert len(snapshots) > 50
    for copy in snapshots:
        sweep(copy)
        assert not list(copy.glob(".step-*"))
        found = load_newest(copy, pytest.fail)
        assert found is not None
        assert found.step in (1, 2)


HOLD = """
import sys, time
from pathlib import Path
from ggft.system.files import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match=f"process {holder.pid}"), run_lock(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with run_lock(tmp_path):
        pass
