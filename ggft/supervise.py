"""Run a command in a child process, and say what a killed child cannot say itself.

The system's out-of-memory killer, a model file cut off while it is mapped, or a failed assertion
in native code end a process without a word. The parent, which needs hardly any memory, names the
cause, the last checkpoint, and how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ggft.errors import ResourceError

# Set in the child, which does the work.
_CHILD = "GGFT_SUPERVISED"
_CAUSES = {
    "SIGKILL": "most likely the system ran out of memory",
    "SIGBUS": "a mapped file became shorter or unreadable; is the model still whole?",
    "SIGABRT": "an assertion in native code failed",
    "SIGSEGV": "native code crashed",
    "SIGILL": "native code was built for another processor",
}


def supervise(run: Path) -> int | None:
    """Run this very command again as a child and return its exit code; None in the child.

    `run` is the run directory, whose newest checkpoint is named when the child is killed.

    Raises:
        ResourceError: the child was killed; the exit code is 128 + the signal's number.
    """
    if os.environ.pop(_CHILD, None):
        return None
    command = [sys.executable, *sys.orig_argv[1:]]
    with subprocess.Popen(command, env={**os.environ, _CHILD: "1"}) as child, _forwarding(child):
        code = child.wait()
    if code >= 0:
        return code
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    error = ResourceError(
        f"training was killed by {name}: {_CAUSES.get(name, 'the cause is not known')}",
        hint=_advice(run, name),
    )
    error.exit_code = 128 - code
    raise error


def _advice(run: Path, name: str) -> str:
    """Return how to go on."""
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if not checkpoints:
        text = "there is no checkpoint yet; start again"
    else:
        text = f"the last checkpoint is {checkpoints[-1]}; continue with --resume"
    if name == "SIGKILL":
        text += " and a smaller --memory"
    return text


@contextlib.contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to the child; it takes a Ctrl-C that reaches both as one."""

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            child.send_signal(number)

    previous = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
