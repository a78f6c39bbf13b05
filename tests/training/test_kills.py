"""SIGKILL at random moments: nothing is lost, nothing half-written stays, nobody goes on working.

GGFT_KILLS is the number of kills per command; a handful by default. Every second one is aimed: at
the time after the last checkpoint of a run, or after the first file that a command has made.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.adapters import random_adapter
from tests.support.hub_server import serve
from tests.support.legacy_files import RawGGML
from tests.support.models import CHATML, Spec, write_model

N_KILLS = int(os.environ.get("GGFT_KILLS", "3"))
# Of an idle machine; a busy one takes longer to end a process.
ORPHAN_S = float(os.environ.get("GGFT_ORPHAN_S", "2"))
# After so many kills, and at the end, a command is run to its end.
KILLS_PER_RUN = 10
pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes")

# The program as it is, but what is killed most is what was lost once: the time between the last
# checkpoint and the adapter is made as long as the rest.
RUNNER = """
import time
from ggft.__main__ import main
from ggft.training.kept import KeptAdapter
write = KeptAdapter.write
def slow_write(self):
    time.sleep(0.1)
    return write(self)
KeptAdapter.write = slow_write
main()
"""
# Nine steps: the losses of blocks of six choose the adapter, so that after the last step it is
# written after the last checkpoint only.
FINETUNE = (
    "finetune -m m.gguf -d rows.json -o out --threads 1 --epochs 3 --save-steps 2 --samples 0 "
    "--rank 2 --val-split 0 --device cpu --ask 1 --mix none"
)
COMMANDS = {
    "merge": "merge m.gguf a.gguf out --force",
    "prepare": "prepare -m m.gguf -d rows.json -o out --force",
    "quantize": "quantize m.gguf out Q8_0 --force",
    "convert": "convert old.bin out --force",
    "export": "export m.gguf out --to ollama --adapter a.gguf --force",
    "download": "download me/repo/m.gguf --to out",
}


class Case:
    """A folder with models, an adapter and data, and commands that are run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.environment = dict(os.environ)
        tiny = write_model(folder / "m.gguf", Spec(chat_template=CHATML))
        random_adapter(folder / "a.gguf", tiny)
        (folder / "old.bin").write_bytes(RawGGML().bytes())
        rows = [{"instruction": f"ask {i}", "output": f"say {i * i}"} for i in range(12)]
        (folder / "rows.json").write_text(json.dumps(rows))
        self.inputs = set(self.files())
        self.rng = random.Random(11)

    def start(self, line: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", RUNNER, *line.split()], cwd=self.folder, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, line: str) -> float:
        """Run a command to its end and return the seconds that it took."""
        started_s = time.monotonic()
        with self.start(line) as process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        return time.monotonic() - started_s

    def kill(self, line: str, after_s: float, begins: Callable[[], bool] | None) -> bool:
        """Start a command, kill it or a process of it, and see that nothing of it goes on.

        Args:
            line: The command.
            after_s: When, in seconds from the start, or from when it has begun something.
            begins: Says whether it has; None: from the start.

        Returns: Whether it was there to be killed.
        """
        with self.start(line) as process:
            while begins and not begins() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(after_s)
            is_running = process.poll() is None
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                victim = self.rng.choice([process.pid, *map(int, children.split())])
                os.kill(victim, signal.SIGKILL)
            process.communicate()
        killed_s = time.monotonic()
        while left := self.processes():
            time.sleep(0.02)
            assert time.monotonic() - killed_s < ORPHAN_S, left
        return is_running

    def processes(self) -> list[str]:
        """Return the processes that work in this folder."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/cwd") == str(self.folder):
                    found.append(Path(f"/proc/{name}/cmdline").read_text().replace("\0", " "))
        return found

    def files(self) -> list[str]:
        """Return the names of all files in the folder."""
        paths = [Path(top, name) for top, _, names in os.walk(self.folder) for name in names]
        return sorted(str(path.relative_to(self.folder)) for path in paths)

    def contents(self) -> dict[str, bytes]:
        """Return the files that a command has made, by name, without those that are hidden."""
        names = [name for name in self.files() if not Path(name).name.startswith(".")]
        return {n: (self.folder / n).read_bytes() for n in names if n not in self.inputs}

    def litter(self) -> list[str]:
        return [n for n in self.files() if Path(n).name.startswith(".") and Path(n).name != ".lock"]

    def remove(self) -> None:
        for name in ("out", *self.litter()):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("kills").resolve()
    case = Case(folder)
    with serve({"m.gguf": (folder / "m.gguf").read_bytes()}, {"m.gguf": "slow"}) as hub:
        case.environment["HF_ENDPOINT"] = hub.url
        yield case


def test_finetune(case: Case) -> None:
    """A run that was killed ends, resumed, with the adapter of one that was not, bit by bit."""
    took_s = case.run(FINETUNE)
    wanted = (case.out / "adapter.gguf").read_bytes()
    last = max((case.out / "checkpoints").iterdir())
    kills, after_the_last_checkpoint = 0, 0
    while kills < N_KILLS:
        case.remove()
        is_aimed = kills % 2 == 0
        after_s = case.rng.uniform(0, 0.08 if is_aimed else took_s)
        kills += case.kill(FINETUNE, after_s, last.exists if is_aimed else None)
        adapter = case.out / "adapter.gguf"
        is_written = adapter.exists() and adapter.read_bytes() == wanted
        after_the_last_checkpoint += last.exists() and not is_written
        case.run(f"{FINETUNE} --resume")
        assert adapter.read_bytes() == wanted
        assert not case.litter()
    assert after_the_last_checkpoint or N_KILLS < 20  # a few may all miss
    print(f"finetune: {kills} kills, {after_the_last_checkpoint} after the last checkpoint")


@pytest.mark.parametrize("command", COMMANDS)
def test_written_whole_or_not_at_all(case: Case, command: str) -> None:
    line = COMMANDS[command]
    case.remove()
    took_s = case.run(line)
    wanted = case.contents()
    kills, within = 0, 0
    while kills < N_KILLS:
        case.remove()
        is_aimed = kills % 2 == 0
        after_s = case.rng.uniform(0, 0.004 if is_aimed else took_s)
        kills += case.kill(
            line, after_s, (lambda: len(case.files()) > len(case.inputs)) if is_aimed else None
        )
        found = case.contents()
        assert found == {name: wanted[name] for name in found}
        within += bool(case.litter())
        if kills % KILLS_PER_RUN == 0 or kills == N_KILLS:
            case.run(line)
            assert case.contents() == wanted
            assert not case.litter()
    print(f"{command}: {kills} kills, {within} while it wrote")
