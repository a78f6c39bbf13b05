"""What the helper processes of tests do: each function but `is_gone` is the program of one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def chatter() -> None:
    """Write far more to standard error than a pipe holds, then fail."""
    sys.stderr.write("the cause\n" + "line after line\n" * 100_000)
    sys.exit(7)


def fail() -> None:
    """End in a traceback."""
    raise RuntimeError("can't start new thread")


def spin() -> None:
    """Compute for ever, and read nothing."""
    os.write(1, b"x")
    while time.monotonic():
        pass


def show() -> None:
    """Print arguments and what may be imported from."""
    print(sys.argv[1:], "" in sys.path or os.getcwd() in sys.path)


def abort() -> None:
    """Crash."""
    os.abort()


def is_gone(pid: int) -> bool:
    """Wait a little for the end of a process that is nobody's child here."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except OSError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    print(os.getpid(), flush=True)
    spin()
