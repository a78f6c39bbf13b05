"""What a run says while it works: a bar on a terminal, lines elsewhere, JSON events on request.

A run must outlive its audience: when the terminal or the pipe is gone, output stops and the
training goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from ggft.system.errors import ResourceError
from ggft.system.signals import silence_stdout
from ggft.system.text import finite, printable

# What writing to a file may fail with, and to a reader not.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
MIN_COLUMNS = 40
BAR_DELAY_S = 2.0
# DEL and C1, which a terminal may obey, and json.dumps leaves as they are.
_JSON_CONTROLS = {code: f"\\u{code:04x}" for code in range(127, 160)}
MODES = ("auto", "bar", "lines", "json", "quiet")


class Output:
    """Standard output, which remembers whether something could not be written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write text."""
        with self._remembering():
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is not written yet."""
        with self._remembering():
            self._stream.flush()

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A reader that left lost nothing that it wanted.
            if error.errno in _NO_ROOM and self.lost is None:
                self.lost = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def require(self) -> None:
        """Write what is not written yet; refuse to call done what is lost.

        Raises:
            ResourceError: Something could not be written.
        """
        try:
            self.flush()
        except (OSError, ValueError):  # full, closed, or its reader left
            silence_stdout()
        if self.lost is not None:
            raise ResourceError(
                f"the output is lost: {self.lost.strerror}", path="standard output",
                hint="free some space, or write to another disk",
            )  # fmt: skip


class Progress:
    """The one way to print from a command.

    `mode` is one of MODES; `auto` is a bar on a terminal and lines elsewhere. People read stderr,
    programs read the JSON lines of stdout.
    """

    def __init__(
        self, mode: str = "auto", *, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        if mode == "auto":
            mode = "bar" if _is_terminal(self._err) else "lines"
        self.mode = mode
        self._bar: Any = None
        self._total = 0
        self._started_s = 0.0
        self._first = 0

    def note(self, text: str) -> None:
        """Print a line for people."""
        if self.mode in ("bar", "lines"):
            self._write(self._err, printable(text))

    def warn(self, text: str) -> None:
        """Print a warning; in JSON mode it is an event."""
        self.event("warning", message=text)
        self.note(f"warning: {text}")

    def result(self, text: str) -> None:
        """Print what the command was asked for, on stdout."""
        if self.mode in ("bar", "lines"):
            self._write(self._out, printable(text))

    def event(self, kind: str, **fields: Any) -> None:
        """Print one JSON line in JSON mode; NaN and infinity, which JSON lacks, become null."""
        if self.mode == "json":
            record = {"event": kind, **fields}
            text = json.dumps(finite(record), ensure_ascii=False)
            self._write(self._out, text.translate(_JSON_CONTROLS))

    def start(self, total: int, first: int = 0) -> None:
        """Begin counting steps; `first` of `total` are done already."""
        self._total, self._first, self._started_s = total, first, time.monotonic()
        if self.mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=first, file=self._err, dynamic_ncols=True, unit="step",
                smoothing=0.1,
            )  # fmt: skip

    def step(self, done: int, *, loss: float, lr: float, tokens_per_s: float, log: bool) -> None:
        """Show a finished step; `log` says whether it also earns a line or an event."""
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(
                    f"loss {loss:.4f}, lr {lr:.2e}, {tokens_per_s:.0f} tok/s", refresh=False
                )
                self._bar.update(done - self._bar.n)
            except (OSError, ValueError):
                self._bar, self.mode = None, "quiet"
        elif log and self.mode == "lines":
            left_s = (time.monotonic() - self._started_s) / max(1, done - self._first)
            left_s *= self._total - done
            self._write(
                self._err,
                f"step {done}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{tokens_per_s:.0f} tok/s  {_clock(left_s)} left",
            )

    def stop(self) -> None:
        """Close the bar; more steps may be started."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.write(text, file=stream)
            else:
                stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError):
            # The reader is gone (SIGPIPE, closed terminal), or the disk is full, which `Output`
            # tells at the end: go on in silence.
            self._bar = None
            self.mode = "quiet"


def print_note(text: str) -> None:
    """Print a line for people, on stderr, where there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(printable(text), file=sys.stderr, flush=True)


class ByteBar:
    """A bar of bytes on stderr, shown on a terminal once the work has taken a moment.

    Args:
        name: What is worked on; empty where the command says it.
        total: Bytes in all, None where it is not known.
        first: Bytes that are done already.
        delay_s: How long the work takes before the bar is drawn.
    """

    def __init__(
        self, name: str = "", total: int | None = None, *, first: int = 0, delay_s: float = 0.0
    ) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=name or None, total=total, initial=first, unit="iB", unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr, disable=None, leave=False, delay=delay_s,
        )  # fmt: skip

    def move_to(self, done: float, after: float = 0) -> None:
        """Show that `done` bytes are done, after those of what went before."""
        if after + done > self._bar.n:
            self._bar.update(after + done - self._bar.n)

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _is_terminal(stream: TextIO) -> bool:
    """Return whether a bar can be drawn; some pseudo-terminals say that they have no columns."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns >= MIN_COLUMNS
    except (OSError, ValueError):
        return False


def _clock(seconds: float) -> str:
    """Return a duration as `m:ss` or `h:mm:ss`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"
