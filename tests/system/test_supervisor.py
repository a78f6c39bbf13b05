"""Runs in a process of their own: killed, interrupted, and left by their reader."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ggft.adapters.adapter import read_adapter
from ggft.gguf.read import read_gguf
from tests.support.runs import Case, metrics

KILLED = """
import os, sys
import ggft.engine.engine
from tests.support.fakes import FakeEngine, native_module
class Engine(FakeEngine):
    def optimizer_step(self, *args):
        if self.step == 7:
            os.kill(os.getpid(), {number})
        return super().optimizer_step(*args)
ggft.engine.engine.load_native = lambda: native_module(Engine)
from ggft.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (signal.SIGKILL, ["SIGKILL", "out of memory", "smaller --memory"]),
        (signal.SIGBUS, ["SIGBUS", "mapped file"]),
        (signal.SIGABRT, ["SIGABRT", "assertion"]),
    ],
)
def test_the_parent_names_what_killed_the_run(case: Case, number: int, parts: list[str]) -> None:
    run = case.folder / "run"
    arguments = ["finetune", "-m", str(case.model), "-d", str(case.data), "-o", str(run)]
    settings = ["--save-steps", "5", "--epochs", "3", "--val-split", "0"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(number=number), *arguments, *settings],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    for part in [*parts, "step-000005", "--resume"]:
        assert part in done.stderr
    assert "Traceback" not in done.stderr


CHILD = """
import sys
import ggft.engine.engine
from tests.support.fakes import FakeEngine, native_module
FakeEngine.delay_s = 0.2
ggft.engine.engine.load_native = native_module
from ggft.__main__ import main
main()
"""


def start(case: Case) -> tuple[Path, subprocess.Popen[str]]:
    """Start a slow run; return its directory and the parent process."""
    run = case.folder / "run"
    arguments = ["finetune", "-m", str(case.model), "-d", str(case.data), "-o", str(run)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments, "--val-split", "0", "--epochs", "3"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return run, child


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_a_usable_adapter(case: Case, number: int, code: int) -> None:
    run, child = start(case)
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.startswith("step 2/"):
            break
    child.send_signal(number)
    _, rest = child.communicate(timeout=20)
    assert child.returncode == code, (lines, rest)
    assert "stopped after step" in rest
    assert "--resume" in rest
    read_adapter(run / "adapter.gguf", read_gguf(case.model))
    assert not list(run.rglob("*.tmp"))


def test_a_killed_parent_takes_the_run_along(case: Case) -> None:
    """The child stops as on SIGTERM: it saves, and nothing goes on unseen."""
    run, parent = start(case)
    with parent:
        assert parent.stderr is not None
        while not parent.stderr.readline().startswith("step 2/"):
            pass
        parent.kill()
        rest = parent.stderr.read()  # until the child, too, has closed it
        assert parent.wait(timeout=20) == -signal.SIGKILL
    assert "stopped after step" in rest
    assert 2 <= len(metrics(run)) < 18
    read_adapter(run / "adapter.gguf", read_gguf(case.model))


def test_a_reader_that_leaves_does_not_stop_the_run(case: Case) -> None:
    """As in `ggft finetune --json | head -1`, with the terminal gone as well."""
    run = case.folder / "run"
    arguments = ["finetune", "-m", str(case.model), "-d", str(case.data), "-o", str(run)]
    settings = ["--val-split", "0", "--epochs", "1", "--samples", "0", "--json", "--mix", "none"]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments, *settings],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert json.loads(child.stdout.readline())["event"] == "plan"
        child.stdout.close()
        child.stderr.close()
        assert child.wait(timeout=60) == 0
    assert len(metrics(run)) == 6
    assert (run / "report.html").is_file()


LOADER = """
import os, sys, time
import ggft.llama.model, ggft.system.supervisor
from ggft.llama.library import _on_log
ggft.system.supervisor.LOADING_S = 1.0
def open_model(*_, **__):
    {action}
ggft.llama.model.open_model = open_model
from ggft.__main__ import main
main()
"""
COMPLAIN = "_on_log(4, b'loader: the cause', None); _on_log(4, b'loader: it failed', None); "


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("os.write(2, b'a.cpp:7: ASSERT\\nmore\\n'); os.abort()", "found a.cpp:7: ASSERT"),
        (COMPLAIN + "os.abort()", "found the cause"),
        ("os.kill(os.getpid(), 11)", "found SIGSEGV"),
        ("time.sleep(60)", "comes to no end with this model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "prepare", "finetune"])
def test_a_model_that_llama_cpp_cannot_read_is_refused(
    case: Case, command: str, action: str, says: str
) -> None:
    data = ["-d", str(case.data)]
    rest = {"generate": ["hi"], "prepare": data, "finetune": [*data, "-o", f"{case.folder}/run"]}
    done = subprocess.run(
        [sys.executable, "-c", LOADER.format(action=action), command, "-m", str(case.model),
         *rest[command]],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ggft: {case.model}: llama.cpp ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 2, "the message and its remedy"
    assert not (case.folder / "run").exists()
