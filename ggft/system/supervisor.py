"""A command that runs native code does so in a child, and its parent says what became of it.

The parent starts the same command again, passes signals on and waits; it is small and runs no
native code. The child says over a socket what it is about to do, so that the parent can name the
file or the run concerned. The child's descriptor 2 leads to the parent, which keeps what C and C++
write there; Python writes to the true standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ggft.system.errors import GgftError, InputError, Interrupted, ResourceError
from ggft.system.processes import Drain, fill_descriptors, signal_name

# Set in the child to its end of the socket, and to the true standard error or -1.
_CHILD = "GGFT_SUPERVISED"
_PASSED_ON = tuple(
    getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)
)
# Ctrl-C reaches parent and child, and the parent passes it on: what comes this soon is the same.
SAME_WISH_S = 0.5
# A model file that is read for longer than this, and a second for so many bytes of it, hangs.
LOADING_S = 60.0
LOADING_BYTES_PER_S = 10e6
_CAUSES = {
    "SIGKILL": "most likely the system ran out of memory",
    "SIGBUS": "a mapped file became shorter or unreadable; is the model still whole?",
    "SIGABRT": "an assertion in native code failed",
    "SIGSEGV": "native code crashed",
    "SIGILL": "native code was built for another processor",
}
_channel: socket.socket | None = None
_loading = False


def supervise() -> int | None:
    """Run this very command again as a child and return its exit code; None in the child.

    Raises:
        InputError: llama.cpp crashed, or did not end, while it read a model.
        Interrupted: A signal ended the child before it could say so.
        ResourceError: The child was killed, or crashed elsewhere.
    """
    if given := os.environ.pop(_CHILD, None):
        _begin_child(*map(int, given.split(",")))
        return None
    parent = _Parent()
    with parent.passing_signals_on():
        return parent.run()


class _Parent:
    """What the parent knows: of its child, and of what the child said last."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []
        self._said: dict[str, Any] = {}
        self._is_late = False

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """Pass signals on to the child."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)
            self._pass_on(number)

        previous = {}
        for number in _PASSED_ON:
            # A run started by nohup ignores SIGHUP; keep that.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int) -> None:
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.send_signal(number)

    def run(self) -> int:
        fill_descriptors()
        ours, theirs = socket.socketpair()
        # With --debug native code writes to the true standard error itself.
        keeps_errors = "--debug" not in sys.argv
        errors = os.dup(2) if keeps_errors and sys.stderr is not None else -1
        passed = [theirs.fileno(), *([errors] if errors >= 0 else [])]
        # A crash of ggml would start a debugger to print its stack.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        environment[_CHILD] = f"{theirs.fileno()},{errors if keeps_errors else 2}"
        with ours:
            try:
                self._child = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=passed,
                    stderr=subprocess.PIPE if keeps_errors else None,
                )  # fmt: skip
            finally:
                theirs.close()
                if errors >= 0:
                    os.close(errors)
            drain = None if self._child.stderr is None else Drain(self._child.stderr)
            if self._signals:  # it came before there was a child
                self._pass_on(self._signals[0])
            self._listen(ours)
            code = self._child.wait()
        # An assertion begins with the path that its source had where it was compiled.
        words = "" if drain is None else re.sub(r"^/\S*/", "", drain.first_words())
        if drain is not None:
            drain.close()
        if code >= 0 and self._said.get("ended"):
            return code
        raise self._what_happened(code, words)

    def _listen(self, channel: socket.socket) -> None:
        """Hear what the child says until it ends; end it when it is late."""
        data = b""
        while True:
            limit_s = self._said.get("limit_s")
            channel.settimeout(limit_s)
            try:
                received = channel.recv(1 << 16)
            except TimeoutError:
                self._is_late = True
                self._pass_on(signal.SIGKILL)
                return
            except ConnectionError:
                return
            if not received:
                return
            *lines, data = (data + received).split(b"\n")
            for line in lines:
                self._said.update(json.loads(line))

    def _what_happened(self, code: int, words: str) -> GgftError:
        """Return the error for a child that ended without having said why."""
        name = signal_name(-code) if code < 0 else f"exit code {code}"
        if self._signals and (code >= 0 or -code in self._signals):
            return Interrupted("interrupted", signal_number=self._signals[0])
        if loading := self._said.get("loading"):
            if self._is_late:
                return InputError(
                    "llama.cpp comes to no end with this model", path=loading,
                    found=f"nothing after {self._said['limit_s']:.0f} s",
                    hint="its vocabulary is most likely damaged: take the model from elsewhere",
                )  # fmt: skip
            if name != "SIGKILL":
                return InputError(
                    "llama.cpp stops at this model", path=loading,
                    found=self._said.get("complaint") or words or name,
                    hint="it is damaged or of a kind that llama.cpp does not know: take another",
                )  # fmt: skip
        cause = words or _CAUSES.get(name, "the cause is not known")
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        remedy = self._said.get("remedy")
        if remedy is None:
            remedy = "close other programs or use a smaller model; --debug shows more"
        elif name == "SIGKILL":
            remedy += " and a smaller --memory"
        return ResourceError(f"ggft {command} was ended by {name}: {cause}", hint=remedy)


def _begin_child(channel: int, errors: int) -> None:
    """Become the child: end with the parent, and let Python write to the true standard error."""
    global _channel
    _channel = socket.socket(fileno=channel)
    _channel.set_inheritable(False)
    if errors > 2:
        os.set_inheritable(errors, False)
        old = sys.stderr
        sys.stderr = open(  # noqa: SIM115  # for the rest of the process
            errors, "w", buffering=1, encoding=old.encoding, errors=old.errors
        )
    elif errors < 0:
        sys.stderr = None
    threading.Thread(target=_end_with_parent, args=(_channel,), daemon=True).start()


class OneInterrupt:
    """A handler that raises KeyboardInterrupt, once for a Ctrl-C that comes twice."""

    _last_s = -SAME_WISH_S

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now_s = time.monotonic()
        if now_s - self._last_s > SAME_WISH_S:
            self._last_s = now_s
            raise KeyboardInterrupt


def _end_with_parent(channel: socket.socket) -> None:
    """Wait for the parent's end of the socket to close; then stop this process as SIGTERM does.

    A signal is heard by Python, and so not while llama.cpp reads a model: nothing is lost then.
    """
    with contextlib.suppress(OSError):
        channel.recv(1)
    if _loading:
        os._exit(128 + signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def tell(**fields: Any) -> None:
    """Tell the parent, where there is one: `ended` at the end, `remedy` for when it is killed."""
    if _channel is not None:
        with contextlib.suppress(OSError):
            _channel.sendall(json.dumps(fields).encode() + b"\n")


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Say that native code reads this model meanwhile: if it crashes or hangs, that is why."""
    global _loading
    limit_s = LOADING_S + path.stat().st_size / LOADING_BYTES_PER_S
    tell(loading=str(path), limit_s=limit_s, complaint=None)
    _loading = True
    try:
        yield
    finally:
        _loading = False
        tell(loading=None, limit_s=None)
