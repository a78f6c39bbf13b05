"""The start of the program, before there is a command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ggft
from ggft.command import report

INTERRUPTED = """
import sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from ggft.__main__ import main
main()
"""


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_package_runs_as_a_module() -> None:
    done = start("-m", "ggft", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ggft {ggft.__version__}\n", "")


def test_ctrl_c_while_modules_are_imported_ends_in_one_line() -> None:
    done = start("-c", INTERRUPTED)
    assert (done.returncode, done.stderr) == (130, "ggft: interrupted\n")


CTRL_C = """
import os, signal, threading, time
import ggft.__main__ as program
def press():
    time.sleep({after_s})
    os.kill(os.getpid(), signal.SIGINT)
run = program._run
def pressed(is_heard):
    threading.Thread(target=press, daemon=True).start()
    return run(is_heard)
program._run = pressed
program.main()
"""


@pytest.mark.parametrize("after_s", [0.0, 0.03, 0.06, 0.1])
def test_ctrl_c_at_the_start_is_one_line(after_s: float) -> None:
    """Wherever it falls: into imports, into the start of the child, or into the child's own."""
    done = start("-c", CTRL_C.format(after_s=after_s), "chat", "-m", "smollm2-135m-instruct")
    assert (done.returncode, done.stderr) == (130, "ggft: interrupted\n")


def test_ctrl_c_that_became_another_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As Python 3.11 makes of one that comes while a class is made."""
    error = RuntimeError("Error calling __set_name__")
    error.__cause__ = KeyboardInterrupt()
    assert report(error) == 130
    assert capsys.readouterr().err == "ggft: interrupted\n"
