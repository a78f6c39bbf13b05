"""Python processes that do a part of the work: each runs one function and speaks over pipes."""

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

from ggft.system.errors import ResourceError

_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # Python itself may need them


def start_child(function: str) -> subprocess.Popen[bytes]:
    """Start a process that runs a function of this package, given as `module:name`.

    It has pipes for standard input and output, no environment, and the same folder and user.
    Signals to this process's group, such as Ctrl-C, do not reach it: it ends with its input.
    """
    package = Path(__file__).resolve().parents[1]
    module, _, name = function.partition(":")
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); "
        f"from {package.name}.{module} import {name}; {name}()"
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", "-c", code, str(package.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _LIBRARY_PATHS if name in os.environ},
        close_fds=True,
        start_new_session=True,
    )


def stop_child(process: subprocess.Popen[bytes]) -> None:
    """End a child, whatever it does."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


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
