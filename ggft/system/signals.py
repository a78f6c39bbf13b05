"""Stop on a signal without losing work.

Python runs its own signal handlers only between bytecodes, so a handler would wait for a native
call that takes seconds. Here the C-level handler writes the signal's number into a socket, and a
watching thread, which runs while native code works without the GIL, passes the request on at
once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from ggft.system.errors import Interrupted

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

REPEAT_S = 0.1
# Ctrl-C reaches a whole group of processes, and some (timeout, scripts) pass it on: what comes this
# soon after the first is the same request.
SAME_WISH_S = 0.5


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP ask for a stop; a second SIGINT exits at once.

    Outside the main thread nothing can be installed; then it only carries `request`.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._since_s = 0.0
        self._on_stop: Callable[[], None] | None = None
        self._lock = threading.RLock()
        self._previous: dict[int, object] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._previous_fd = -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = (reader, writer)
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            # A run started by nohup ignores SIGHUP; keep that.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._python_handler)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sockets is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        for end in self._sockets:
            # Shutting down wakes the watcher, which may be blocked in recv.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._sockets = None

    def on_stop(self, action: Callable[[], None] | None) -> None:
        """Set what interrupts the running work, such as the engine's `cancel`.

        After the call with None the previous action is not running and will not run again.
        """
        with self._lock:
            self._on_stop = action
            self._act()

    def request(self, number: int) -> None:
        """Ask for a stop as signal `number` does."""
        if self.signal_number is not None:
            if number == signal.SIGINT and time.monotonic() - self._since_s > SAME_WISH_S:
                # Not sys.exit: cleaning up is what the user no longer wants to wait for. Saved
                # files are renamed into place, so nothing half-written can be left behind.
                os._exit(128 + number)
            return
        self.signal_number, self._since_s = number, time.monotonic()
        self._act()

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.signal_number is not None:
            raise Interrupted("interrupted", signal_number=self.signal_number)

    def _act(self) -> None:
        with self._lock:
            if self._on_stop is not None and self.signal_number is not None:
                self._on_stop()

    def _watch(self, reader: socket.socket) -> None:
        while True:
            try:
                numbers = reader.recv(64)
            except TimeoutError:
                # A request that fell between two native calls is repeated until one has heard it.
                self._act()
                continue
            except OSError:
                return
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self.request(number)
            with contextlib.suppress(OSError):
                reader.settimeout(REPEAT_S if self.signal_number is not None else None)

    def _python_handler(self, number: int, frame: FrameType | None) -> None:
        """Do nothing: the watcher acts, this keeps Python's default from acting."""


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let signals wait until the end of native code that calls back into Python.

    A handler that raises within such a callback would be lost: C knows no exceptions.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous = {n: h for n in SIGNALS if callable(h := signal.getsignal(n))}
    for number in previous:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        previous[signal.Signals(came[0])](came[0], None)


def silence_stdout() -> None:
    """Point stdout at nothing, once its reader is gone, so that exit does not fail on a flush."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
