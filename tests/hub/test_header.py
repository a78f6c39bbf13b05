from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.gguf import cursor
from ggft.gguf.read import read_gguf
from ggft.hub import download as hub_module
from ggft.hub import fetch, registry
from ggft.hub import header as outline
from ggft.hub.header import model_outline
from ggft.system.errors import InputError, NetworkError
from tests.support.hub_server import Hub, serve
from tests.support.models import CHATML, Spec, write_model

NAME = "hf:me/repo/m.gguf"


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    return write_model(tmp_path / "tiny.gguf", Spec(chat_template=CHATML)).path.read_bytes()


@pytest.fixture
def hub(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a model whose header takes several ranges; nothing may stay in the temporary folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(fetch, "WAIT_S", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(cursor.Cursor.__init__, "__defaults__", (1024,))
    with serve({"m.gguf": model}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "models").exists()


def n_sent(hub: Hub) -> int:
    """Return how many bytes were asked for."""
    ranges = [str(wanted).removeprefix("bytes=") for wanted, _ in hub.seen("storage", "GET")]
    return sum(int(last) - int(first) + 1 for first, last in (text.split("-") for text in ranges))


def test_only_the_header_is_read(hub: Hub, model: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    with model_outline(NAME, said.append) as path:
        outline, whole = read_gguf(path), read_gguf(tmp_path / "tiny.gguf")
        assert path.name == "m.gguf"
        assert path.stat().st_size == len(model)
    assert outline.metadata.keys() == whole.metadata.keys()
    assert [t.shape for t in outline.tensors.values()] == [t.shape for t in whole.tensors.values()]
    assert len(hub.seen("storage", "GET")) > 2
    assert n_sent(hub) < len(model) / 4
    assert "is not here: planned from its header" in said[0]


def test_a_model_that_is_here_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    with model_outline(str(tmp_path / "tiny.gguf")) as path:
        assert path == tmp_path / "tiny.gguf"
    assert hub.requests == []


def test_plan_and_dry_run_say_what_the_file_would(
    hub: Hub, model: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "the rain", "completion": "in spain"}\n' * 4, encoding="utf-8")
    dry_run = ["finetune", "--dry-run", "-d", str(data), "-o", str(tmp_path / "out")]
    for command in (["plan"], dry_run):
        plans = []
        for name in (NAME, str(tmp_path / "tiny.gguf")):
            assert run(cli, [*command, "--json", "--memory", "1G", "-m", name]) == 0
            events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            plans += [event["plan"] for event in events if event["event"] == "plan"]
            plans[-1].pop("free_bytes")
        assert plans[0] == plans[1]
    assert n_sent(hub) < len(model) / 2
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_the_download(
    hub: Hub, model: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["plan", "-m", NAME, "--memory", "64M"]) == 3
    assert "would not fit into memory" in capsys.readouterr().err
    assert n_sent(hub) < len(model) / 4


def test_finetune_asks_for_the_size_first(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (registry, hub_module):
        monkeypatch.setattr(module, "memory_bytes", lambda: registry.SYSTEM_BYTES)
    assert run(cli, ["finetune", "-m", NAME]) == 3
    assert "too large to train on this machine" in capsys.readouterr().err
    assert hub.seen("storage", "GET") == []


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no-file", "me/repo has no file m.gguf"),
        ("gated", "accept its licence"),
        ("down", "the server is busy"),
        ("drops-always", "could not be read: the connection broke"),
        ("login", "a web page came instead"),
        ("login-at-storage", "a web page came instead"),
    ],
)
def test_failures(fault: str, says: str, hub: Hub) -> None:
    hub.faults["m.gguf"] = fault
    with pytest.raises(NetworkError, match=says) as error, model_outline(NAME):
        pass
    assert error.value.hint
    assert len(hub.requests) <= 1 + 2 * fetch.N_TRIES


def test_a_server_without_ranges(hub: Hub, model: bytes) -> None:
    hub.faults["m.gguf"] = "ignores-range"
    with model_outline(NAME, lambda _: None) as path:
        assert len(read_gguf(path).tensors) > 10


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"tjgg" + bytes(600), "ggft convert"),
        (b"GGUF" + bytes(600), "unsupported GGUF version"),
    ],
)
def test_no_model(data: bytes, says: str, hub: Hub) -> None:
    hub.files["m.gguf"] = data
    with pytest.raises(InputError, match=says) as error, model_outline(NAME):
        pass
    assert str(error.value).startswith("me/repo/m.gguf")


def test_a_header_without_end(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "MAX_HEADER_BYTES", 4096)
    with pytest.raises(InputError, match="no header ends"), model_outline(NAME):
        pass
    assert n_sent(hub) <= 4096


def test_a_part_of_a_split_model(hub: Hub, tmp_path: Path) -> None:
    spec = Spec(extra={"split.count": 2, "split.no": 0})
    hub.files["m.gguf"] = write_model(tmp_path / "part.gguf", spec).path.read_bytes()
    with pytest.raises(InputError, match="one part of a split model"), model_outline(NAME):
        pass


def test_without_the_hub() -> None:
    with pytest.raises(NetworkError) as error, model_outline("smollm2-135m-instruct"):
        pass
    assert "a plan needs the header" in str(error.value)
    assert "ggft download smollm2-135m-instruct takes it (93.8 MiB)" in str(error.value)
