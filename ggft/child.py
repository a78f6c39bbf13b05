"""Python processes that do a part of the work: each runs one function and speaks over pipes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # Python itself may need them


def start_child(function: str) -> subprocess.Popen[bytes]:
    """Start a process that runs a function of this package, given as `module:name`.

    It has pipes for standard input and output, no environment, and the same folder and user.
    Signals to this process's group, such as Ctrl-C, do not reach it: it ends with its input.
    """
    package = Path(__file__).parent
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
