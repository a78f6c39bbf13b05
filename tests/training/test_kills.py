"""SIGKILL at random moments: nothing is lost, nothing half-written stays, nobody goes on working.

GGFT_KILLS is the number of kills per command; a handful by default.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, write_model

N_KILLS = int(os.environ.get("GGFT_KILLS", "3"))
ORPHAN_S = 2.0
pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes")

# The commands as they are, but what is killed most is what was lost once: the time between the last
# checkpoint and the adapter is made as long as the rest.
RUNNER = """
import time
from ggft.cli import main
from ggft.training.kept import KeptAdapter
write = KeptAdapter.write
def slow_write(self):
    time.sleep(0.1)
    return write(self)
KeptAdapter.write = slow_write
main()
"""


class Case:
    """A folder with a model, an adapter and data, and commands that are run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny = write_model(folder / "m.gguf", Spec(chat_template=CHATML))
        random_adapter(folder / "a.gguf", tiny)
        rows = [{"instruction": f"ask {i}", "output": f"say {i * i}"} for i in range(12)]
        (folder / "rows.json").write_text(json.dumps(rows))
        self.rng = random.Random(11)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", RUNNER, *arguments], cwd=self.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, *arguments: str) -> float:
        """Run a command to its end and return the seconds that it took."""
        started_s = time.monotonic()
        assert self.start(*arguments).wait() == 0, arguments
        return time.monotonic() - started_s

    def kill(self, after_s: float, *arguments: str) -> None:
        """Start a command, kill it, and see that no process of it goes on."""
        process = self.start(*arguments)
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline_s = time.monotonic() + ORPHAN_S
        while self.processes() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert not self.processes()

    def processes(self) -> list[str]:
        """Return the processes that work in this folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "cwd") == str(self.folder):
                    found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
        return found

    def contents(self, name: str) -> dict[str, bytes]:
        """Return the files below a path, by name."""
        path = self.folder / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in files}

    def litter(self) -> list[str]:
        return [p.name for p in self.folder.rglob(".*") if p.name != ".lock"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("kills").resolve())


FINETUNE = (
    "finetune", "-m", "m.gguf", "-d", "rows.json", "-o", "out", "--threads", "1", "--epochs", "2",
    "--save-steps", "2", "--samples", "0", "--rank", "2", "--val-split", "0", "--device", "cpu",
)  # fmt: skip
MERGE = ("merge", "m.gguf", "a.gguf", "out")
PREPARE = ("prepare", "-m", "m.gguf", "-d", "rows.json", "-o", "out")


def kills(case: Case, check: Callable[[], None], *arguments: str) -> None:
    """Kill a command N_KILLS times and let `check` look at what is there."""
    took_s = case.run(*arguments)
    check()
    for _ in range(N_KILLS):
        remove(case.folder / "out")
        case.kill(case.rng.uniform(0, 1.1 * took_s), *arguments)
        check()
    remove(case.folder / "out")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_finetune(case: Case) -> None:
    wanted: list[bytes] = []

    def resumed() -> None:
        case.run(*FINETUNE, "--resume")
        adapter = (case.folder / "out" / "adapter.gguf").read_bytes()
        wanted.append(adapter)
        assert adapter == wanted[0]
        assert not case.litter()

    kills(case, resumed, *FINETUNE)


@pytest.mark.parametrize(("arguments", "again"), [(MERGE, "--force"), (PREPARE, "--force")])
def test_written_whole_or_not_at_all(case: Case, arguments: tuple[str, ...], again: str) -> None:
    wanted: list[dict[str, bytes]] = []

    def whole_or_not() -> None:
        found = case.contents("out")
        found = {k: v for k, v in found.items() if not Path(k).name.startswith(".")}
        assert not wanted or all(wanted[0][name] == data for name, data in found.items())
        case.run(*arguments, again)
        wanted.append(case.contents("out"))
        assert wanted[-1] == wanted[0]
        assert not case.litter()

    kills(case, whole_or_not, *arguments)
