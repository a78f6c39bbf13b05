"""Run a command in a child process, and say what a killed child cannot say itself.

The system's out-of-memory killer, a model file cut off while it is mapped, or a failed assertion
in native code end a process without a word. The parent, which needs hardly any memory, names the
cause, the last checkpoint, and how to go on. A parent that is killed itself takes the child along.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ggft.errors import ResourceError

# Set in the child, which does the work, to the end of a pipe that closes with the parent.
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
    if pipe := os.environ.pop(_CHILD, None):
        threading.Thread(target=_end_with_parent, args=(int(pipe),), daemon=True).start()
        return None
    command = [sys.executable, *sys.orig_argv[1:]]
    theirs, ours = os.pipe()
    try:
        environment = {**os.environ, _CHILD: str(theirs)}
        with (
            subprocess.Popen(command, env=environment, pass_fds=(theirs,)) as child,
            _forwarding(child),
        ):
            code = child.wait()
    finally:
        os.close(theirs)
        os.close(ours)
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


def _end_with_parent(pipe: int) -> None:
    """Wait for the parent's end of the pipe to close; then stop this process as SIGTERM does."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


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
