from __future__ import annotations

import io
import json
import math
import os
from typing import Any

import pytest

from ggft.system.progress import Progress


class Terminal(io.StringIO):
    columns = 100

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1000 + self.columns


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((fd - 1000, 24)))


@pytest.mark.parametrize(
    ("columns", "mode"), [(100, "bar"), (40, "bar"), (39, "lines"), (0, "lines")]
)
def test_a_bar_needs_room(columns: int, mode: str) -> None:
    err = Terminal()
    err.columns = columns
    assert Progress("auto", out=io.StringIO(), err=err).mode == mode


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def steps(progress: Progress, n: int = 3) -> None:
    progress.start(n)
    for i in range(n):
        progress.step(i + 1, loss=2.0 - i / 2, lr=1e-3, tokens_per_s=123.0, log=True)
    progress.stop()


def made(mode: str, err: io.StringIO | None = None) -> tuple[Progress, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), err or io.StringIO()
    return Progress(mode, out=out, err=err), out, err


def test_lines_where_there_is_no_terminal() -> None:
    progress, out, err = made("auto")
    progress.note("hello")
    steps(progress)
    progress.result("done")
    assert out.getvalue() == "done\n"
    lines = err.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[1].startswith("step 1/3  loss 2.0000  lr 1.00e-03  123 tok/s")
    assert "\r" not in err.getvalue()


def test_a_bar_on_a_terminal() -> None:
    progress, _, err = made("auto", Terminal())
    steps(progress)
    assert "3/3" in err.getvalue()
    assert "loss 1.0000" in err.getvalue()


def test_events() -> None:
    progress, out, err = made("json")
    progress.note("for people")
    progress.result("for people")
    progress.event("step", loss=math.nan, deep={"x": [math.inf, 1.0]}, text="ü")
    progress.warn("careful")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert events == [
        {"event": "step", "loss": None, "deep": {"x": [None, 1.0]}, "text": "ü"},
        {"event": "warning", "message": "careful"},
    ]
    assert err.getvalue() == ""


def test_nothing_when_quiet() -> None:
    progress, out, err = made("quiet")
    progress.note("a")
    progress.warn("b")
    steps(progress)
    progress.result("c")
    assert out.getvalue() + err.getvalue() == ""


@pytest.mark.parametrize("mode", ["lines", "json"])
def test_a_reader_that_left_does_not_stop_the_work(mode: str) -> None:
    progress = Progress(mode, out=Broken(), err=Broken())
    progress.event("x")
    progress.note("x")
    steps(progress)
    assert progress.mode == "quiet"


def test_a_terminal_that_left_does_not_stop_the_work() -> None:
    class Leaving(Terminal):
        left = False

        def write(self, text: str) -> int:
            if self.left:
                raise OSError(5, "Input/output error")
            return super().write(text)

    err = Leaving()
    progress = Progress("auto", out=io.StringIO(), err=err)
    progress.start(3)
    err.left = True
    for i in range(3):
        progress.step(i + 1, loss=1.0, lr=1.0, tokens_per_s=1.0, log=True)
    progress.stop()
    progress.note("x")


def test_a_closed_pipe(tmp_path: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        progress = Progress("json", out=stream, err=io.StringIO())
        for _ in range(3):
            progress.event("x", text="y" * 100_000)
        assert progress.mode == "quiet"
        # What is left in the buffer fails again when the stream is closed; the command line
        # points stdout elsewhere before that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_what_a_terminal_would_obey_is_shown() -> None:
    name, out, err = "a\x1b[2Jb\x9bc", io.StringIO(), io.StringIO()
    progress = Progress("lines", out=out, err=err)
    progress.note(name)
    progress.result(name)
    assert out.getvalue() == err.getvalue() == "a\\x1b[2Jb\\x9bc\n"
    out = io.StringIO()
    Progress("json", out=out).event("x", name=name)
    assert "\x9b" not in out.getvalue()
    assert json.loads(out.getvalue())["name"] == name
