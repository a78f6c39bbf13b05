"""Helper processes: isolated, drained, and gone with their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ggft.system.processes import Child
from tests.support.children import is_gone


def test_a_child_that_writes_much_never_waits() -> None:
    child = Child("tests.support.children:chatter")
    assert child.wait() == 7
    assert child.last_words() == "the cause"
    child.stop()


def test_last_words_of_a_traceback_are_its_error() -> None:
    child = Child("tests.support.children:fail")
    assert child.wait() == 1
    assert child.last_words() == "RuntimeError: can't start new thread"
    child.stop()
    child = Child("tests.support.children:spin")
    assert child.last_words() == "SIGKILL"
    child.stop()


def test_a_child_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("contextlib", "ctypes", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('was-run', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("tests.support.children:show", "an argument", "é")
    assert child.wait() == 0
    assert child.stdout.read().decode() == "['an argument', 'é'] False\n"
    child.stop()
    assert not (tmp_path / "was-run").exists()


BUSY = """
import os, signal
from ggft.system.processes import Child
from tests.support.children import is_gone
child = Child("tests.support.children:spin")
child.stdout.read(1)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_busy_child_dies_with_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    assert is_gone(int(done.stdout)), "the process outlives its parent"


MODULE = """
import os, signal, sys, threading
from ggft.system.processes import run_module
theirs, ours = os.pipe()
run = threading.Thread(target=run_module, args=("tests.support.children",), kwargs={"stdout": ours})
run.daemon = True
run.start()
print(os.read(theirs, 99).split()[0].decode(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_module_dies_with_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", MODULE], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    assert is_gone(int(done.stdout))
