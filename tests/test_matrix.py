"""Every command in surroundings that are against it: the exit codes are as promised.

Each pair of command and surroundings is one run of the program, in a process of its own, on a tiny
model. None may end by a signal or in an internal error (1), and none may run code that lies in the
current folder.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.world import COMMANDS, arguments, make_world, run_program

# Modules that commands import, by the names that they would have in the current folder.
TRAPS = (
    "click", "contextlib", "ctypes", "gguf", "ggft", "huggingface_hub", "jinja2", "json",
    "llama_cpp", "numpy", "pip", "platform", "queue", "sitecustomize", "subprocess", "tqdm",
    "usercustomize", "yaml",
)  # fmt: skip
TRAP = "open(__file__ + '.was-run', 'w').close()\n"
# Those that make a file or folder in the current folder.
WRITES = ("finetune", "prepare", "download", "convert", "merge", "quantize", "export")
NO_FOLDER_FLUSH = """
import errno, os, stat
_fsync = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    _fsync(descriptor)
os.fsync = fsync
from ggft.__main__ import main
main()
"""
# What the system says of a group that may take 64 MB, of which 8 are free.
IN_A_GROUP = """
from pathlib import Path
files = {
    "/proc/self/cgroup": "0::/small\\n",
    "/sys/fs/cgroup/small/memory.max": str(64 << 20),
    "/sys/fs/cgroup/small/memory.current": str(56 << 20),
    "/sys/fs/cgroup/small/memory.stat": "inactive_file 0\\n",
}
_read_text = Path.read_text
def read_text(self, *rest, **options):
    return files.get(str(self)) or _read_text(self, *rest, **options)
Path.read_text = read_text
from ggft.__main__ import main
main()
"""
GROUP_BYTES = 96 << 20
# They plan their memory, and refuse what does not fit.
PLANNED = ("finetune", "plan", "eval", "bench")


@dataclass
class Place:
    """Where a command runs, and what may come of it."""

    folder: Path
    codes: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)


def as_usual(folder: Path, command: str, stack: ExitStack) -> Place:
    return Place(folder)


def among_traps(folder: Path, command: str, stack: ExitStack) -> Place:
    for name in TRAPS:
        (folder / f"{name}.py").write_text(TRAP)
    return Place(folder)


def into_a_full_disk(folder: Path, command: str, stack: ExitStack) -> Place:
    return Place(folder, (3,), {"stdout": stack.enter_context(open("/dev/full", "w"))})


def where_nothing_can_be_written(folder: Path, command: str, stack: ExitStack) -> Place:
    if os.geteuid() == 0:  # whom permissions do not stop: /proc stops everybody
        folder = Path("/proc")
    else:
        folder.chmod(0o500)
        stack.callback(folder.chmod, 0o700)
    return Place(folder, (2, 3) if command in WRITES else (0,))


def without_folder_flush(folder: Path, command: str, stack: ExitStack) -> Place:
    return Place(folder, options={"program": [sys.executable, "-c", NO_FOLDER_FLUSH]})


def with_memory(n_bytes: int) -> Callable[[Path, str, ExitStack], Place]:
    def limited(folder: Path, command: str, stack: ExitStack) -> Place:
        def before() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))

        return Place(folder, (0, 2, 3), {"before": before})

    return limited


def where_a_group_looks_small(folder: Path, command: str, stack: ExitStack) -> Place:
    program = [sys.executable, "-c", IN_A_GROUP]
    return Place(folder, (3,) if command in PLANNED else (0, 3), {"program": program})


def in_a_small_group(folder: Path, command: str, stack: ExitStack) -> Place:
    """In a true group of processes, whose limit the kernel enforces by killing."""
    group, limit = _new_group(stack)
    limit.write_text(str(GROUP_BYTES))

    def before() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return Place(folder, (0, 3), {"before": before})


def _new_group(stack: ExitStack) -> tuple[Path, Path]:
    """Make a group of processes and return it with the file of its limit, or skip the test."""
    name = f"ggft-test-{os.getpid()}"
    for top, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", top, name)
        with contextlib.suppress(OSError):
            group.mkdir()
            stack.callback(group.rmdir)
            if (group / limit).exists():
                return group, group / limit
    pytest.skip("needs the right to make a memory cgroup")


def in_a_plain_locale(folder: Path, command: str, stack: ExitStack) -> Place:
    return Place(folder, options={"environment": {"LC_ALL": "C", "PYTHONUTF8": "0"}})


PLACES: dict[str, Callable[[Path, str, ExitStack], Place]] = {
    "as usual": as_usual,
    "traps": among_traps,
    "full disk": into_a_full_disk,
    "read-only": where_nothing_can_be_written,
    "no folder flush": without_folder_flush,
    "200 MB": with_memory(200 << 20),
    "64 MB": with_memory(64 << 20),
    "group that looks small": where_a_group_looks_small,
    "small group": in_a_small_group,
    "plain locale": in_a_plain_locale,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES)
def test_exit_codes(world: Path, tmp_path: Path, command: str, place: str) -> None:
    with ExitStack() as stack:
        where = PLACES[place](tmp_path, command, stack)
        line = arguments(command, world, where.folder / "out")
        done = run_program(line, cwd=where.folder, **where.options)
    # There is no network in tests: a download that begins ends with 4.
    codes = {*where.codes, 4} if command == "download" else set(where.codes)
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert "terminate called" not in done.stderr
    assert "SIGKILL" not in done.stderr
    assert list(tmp_path.glob("*.was-run")) == []
    if done.returncode:
        assert sum(text.startswith("ggft: ") for text in done.stderr.splitlines()) == 1
