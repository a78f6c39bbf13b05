"""Python processes that do a part of the work: each runs one function and speaks over pipes."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # Python itself may need them
_KEPT_BYTES = 4096  # of a child's standard error, from its begin
_POLL_S = 0.2
TOO_LARGE = 77  # exit code of a process that outgrew its memory


class Child:
    """A process that runs one function, given as `ggft.module:name`.

    It has pipes for standard input and output, no environment, and the same folder and user. Python
    is isolated: nothing is imported from the current folder. Signals to this process's group, such
    as Ctrl-C, do not reach it: it ends with this process, whatever it is doing. Its standard error
    is read as it comes, so that it never waits for a reader.

    Args:
        function: What it runs.
        arguments: Its `sys.argv[1:]`.
    """

    def __init__(self, function: str, *arguments: str) -> None:
        folder = Path(__file__).resolve().parents[2]
        code = (
            f"import sys; sys.path.insert(0, sys.argv[1]); "
            f"from {__name__} import _run_child; _run_child()"
        )
        fill_descriptors()
        theirs, self._ours = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", "-c", code, str(folder), function,
                 str(theirs), *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=_child_environment(), close_fds=True, pass_fds=(theirs,),
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._ours)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self._errors = Drain(self._process.stderr)
        self._lock = threading.Lock()

    def kill(self) -> None:
        """Let it end at once; may be called from any thread."""
        self._process.kill()

    def poll(self) -> int | None:
        """Return the exit code, as Popen's; None while it runs."""
        return self._process.poll()

    def wait(self, watch: Callable[[], object] | None = None) -> int:
        """Wait for its end, calling `watch` now and then; return the exit code, as Popen's."""
        while watch is not None and self._process.poll() is None:
            time.sleep(_POLL_S)
            watch()
        return self._process.wait()

    def stop(self) -> None:
        """End it, whatever it does, and close the pipes."""
        self._process.kill()
        self._process.wait()
        with self._lock:
            if self._ours >= 0:
                os.close(self._ours)
            self._ours = -1
        self._errors.close()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def last_words(self) -> str:
        """Return why it ended: what it said first, else its exit code or signal."""
        self.kill()
        return self._errors.first_words() or ended_with(self._process.wait())


def run_module(module: str, *arguments: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """Run a Python module to its end, isolated, in a process that ends with this one.

    Unlike a `Child` it has this process's environment and hears Ctrl-C.

    Args:
        module: Its name, as after `python -m`.
        arguments: Its `sys.argv[1:]`.
        stdout: A descriptor, or what subprocess takes for one.
    """
    folder = Path(__file__).resolve().parents[2]
    code = (
        f"import sys; sys.path.append(sys.argv[1]); "
        f"from {__name__} import _run_module; _run_module()"
    )
    theirs, ours = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-I", "-c", code, str(folder), module, str(theirs), *arguments],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
            check=False, pass_fds=(theirs,),
        )  # fmt: skip
    finally:
        os.close(theirs)
        os.close(ours)


class Drain:
    """Reads a pipe to its end in a thread, so that its writer never waits; keeps the beginning."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._pipe.fileno(), _KEPT_BYTES):
                self._kept += chunk[: _KEPT_BYTES - len(self._kept)]

    def first_words(self) -> str:
        """Return the first line, or of a Python traceback the last, once the writer has ended."""
        self._thread.join(timeout=1.0)
        lines = self._kept.decode("utf-8", "replace").strip().splitlines()
        if not lines:
            return ""
        line = lines[-1] if lines[0].startswith("Traceback ") else lines[0]
        return ascii(line)[1:-1][:200]

    def close(self) -> None:
        """Close the pipe, whose writer has ended."""
        self._thread.join(timeout=1.0)
        with contextlib.suppress(OSError):
            self._pipe.close()


def fill_descriptors() -> None:
    """Open what of 0 to 2 is closed, lest a pipe to a child become one of them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def ended_with(code: int) -> str:
    """Say how a process ended, from its exit code as Popen gives it."""
    return f"exit code {code}" if code >= 0 else signal_name(-code)


def signal_name(number: int) -> str:
    """Return the name of a signal, which may be a real-time one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _child_environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _LIBRARY_PATHS if name in os.environ}
    # An assertion of ggml would start a debugger to print its stack.
    return {**kept, "GGML_NO_BACKTRACE": "1"}


def _run_child() -> None:
    """Run what `Child` was given; `sys.argv` has the folder, the function, a pipe, arguments."""
    _, _, function, pipe, *arguments = sys.argv
    threading.Thread(target=_die_with_parent, args=(int(pipe),), daemon=True).start()
    module, _, name = function.partition(":")
    sys.argv[1:] = arguments
    getattr(importlib.import_module(module), name)()


def _run_module() -> None:
    """Run what `run_module` was given; `sys.argv` has the folder, the module, a pipe, arguments."""
    import runpy

    _, _, module, pipe, *arguments = sys.argv
    threading.Thread(target=_die_with_parent, args=(int(pipe),), daemon=True).start()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _die_with_parent(pipe: int) -> None:
    """Wait for the parent's end of the pipe to close, then end whatever this process does."""
    os.read(pipe, 1)
    os._exit(128 + signal.SIGTERM)


def limit_memory(n_bytes: int) -> None:
    """Forbid this process files and core dumps, and so many more bytes of memory.

    Linux limits the address space. Elsewhere a thread looks at what is used, often enough: a text
    can only double between two looks.
    """
    import resource

    def used_bytes() -> int:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used << 10

    def watch() -> None:
        while used_bytes() < limit_bytes:
            time.sleep(0.02)
        os._exit(TOO_LARGE)

    limit_bytes = used_bytes() + n_bytes
    threading.Thread(target=watch, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + n_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_cpu(seconds: int) -> None:
    """Let this process be stopped after so many more seconds of CPU time."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
