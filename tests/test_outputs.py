"""What a command writes: nothing is replaced unasked, and what cannot be written is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggft.cli import cli
from ggft.command import run
from tests.support.world import arguments, make_world

# What is written at {out}, or in it.
WRITES = {
    "convert": "", "merge": "", "quantize": "", "prepare": "train.jsonl", "export": "Modelfile",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def occupied(out: Path, inner: str) -> Path:
    """Put a file where the output goes; return it."""
    if inner:
        out.mkdir()
    path = out / inner if inner else out
    path.write_bytes(b"mine")
    return path


@pytest.mark.parametrize("command", WRITES)
def test_what_exists_is_replaced_only_when_asked(
    world: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    path = occupied(out, WRITES[command])
    line = arguments(command, world, out)
    assert run(cli, line) == 2
    captured = capsys.readouterr()
    assert "--force" in captured.err
    assert captured.out == ""
    assert path.read_bytes() == b"mine"
    assert run(cli, [*line, "--force"]) == 0
    assert path.read_bytes() != b"mine"
    assert [p for p in tmp_path.rglob("*") if ".tmp" in p.name] == []


@pytest.mark.parametrize("command", WRITES)
def test_a_link_is_followed_and_stays(world: Path, tmp_path: Path, command: str) -> None:
    out, place = tmp_path / "out", tmp_path / "place"
    place.mkdir()
    path = occupied(place / "real", WRITES[command])
    out.symlink_to(place / "real")
    line = arguments(command, world, out)
    assert run(cli, line) == 2
    assert path.read_bytes() == b"mine"
    assert run(cli, [*line, "--force"]) == 0
    assert out.is_symlink()
    assert path.read_bytes() != b"mine"


@pytest.mark.parametrize("command", [*WRITES, "finetune"])
def test_a_name_that_commands_the_terminal_is_refused(
    world: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("new\nline", "\x1b[2J", "\x9b1m"):
        line = arguments(command, world, tmp_path / "@")
        assert run(cli, [str(tmp_path / name) if "@" in word else word for word in line]) == 2
        captured = capsys.readouterr()
        assert "control characters" in captured.err
        assert "\x1b" not in captured.err
        assert list(tmp_path.iterdir()) == []
