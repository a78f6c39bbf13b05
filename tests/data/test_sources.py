"""Where rows come from: several sources with shares, standard input, Parquet, the hub."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.data.files import read_rows
from ggft.data.sources import standard_input
from ggft.data.sources.find import find_files, split_share
from ggft.data.sources.standard_input import STDIN
from ggft.hub import fetch
from ggft.hub.dataset import bring, choose, parse_name
from ggft.system.errors import GgftError, InputError, NetworkError
from tests.support.hub_server import Hub, serve
from tests.support.models import Spec, write_model

ROWS = [{"instruction": f"ask {n} about it", "output": f"say {n * n}"} for n in range(40)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Return a function that puts bytes on standard input."""
    kept = standard_input._kept
    kept.cache_clear()
    yield lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    if kept.cache_info().currsize:
        kept().close()
    kept.cache_clear()


def test_standard_input_is_read_as_often_as_it_takes(
    stdin: Callable[[bytes], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(jsonl(ROWS))
    assert find_files(["-"]).train == [STDIN]
    for _ in range(2):
        assert [row.value for row in read_rows(STDIN)] == ROWS
    model = write_model(tmp_path / "m.gguf", Spec()).path
    out = str(tmp_path / "out")
    assert run(cli, ["prepare", "-m", str(model), "-d", "-", "--preview", "1", "-o", out]) == 0
    assert "standard input>:1 ·" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl").is_file()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"hello", "unknown kind of data"),
        (b'{"a": 1,', "malformed JSON"),
    ],
)
def test_standard_input_that_is_no_data(
    stdin: Callable[[bytes], None], data: bytes, says: str
) -> None:
    stdin(data)
    with pytest.raises(InputError, match=says) as refused:
        list(read_rows(STDIN))
    assert str(refused.value).startswith("<standard input>:1: ")


def test_a_terminal_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"")
    monkeypatch.setattr(sys.stdin.buffer, "isatty", lambda: True, raising=False)
    with pytest.raises(InputError, match="no data comes"):
        list(read_rows(STDIN))


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = [{**row, "messages": None, "n": n} for n, row in enumerate(ROWS)]
    path = tmp_path / "x.parquet"
    write_table(pyarrow.Table.from_pylist(rows), path)
    read = list(read_rows(path))
    assert [row.value for row in read] == rows
    assert read[3].line == 4
    assert find_files([tmp_path]).train == [path]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged Parquet file"):
        list(read_rows(path))


def test_parquet_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="pyarrow is not installed") as refused:
        list(read_rows(path))
    assert "ggft[parquet]" in str(refused.value)


def test_sources_have_the_shares_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m.gguf", Spec()).path
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:30]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[30:]))
    arguments = ["prepare", "-m", str(model), "--val-split", "0", "--out", str(tmp_path / "out")]
    sources = ["-d", f"{tmp_path}/a.jsonl@75%", "-d", f"{tmp_path}/b.jsonl@25%"]
    assert run(cli, [*arguments, *sources, "--keep-duplicates"]) == 0
    assert "30 of 30 rows of a.jsonl: 0.75 of all" in capsys.readouterr().err
    few = [s.replace("75", "2").replace("25", "98") for s in sources]
    assert run(cli, [*arguments, "--force", *few]) == 2
    assert "a.jsonl: no row is left of a source for its share" in capsys.readouterr().err
    half = [s.replace("75", "50").replace("25", "50") for s in sources]
    assert run(cli, [*arguments, "--force", *half]) == 0
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    asked = [json.loads(line)["messages"][0]["content"] for line in lines]
    known = {row["instruction"]: n < 30 for n, row in enumerate(ROWS)}
    assert Counter(known[a.partition("\n")[0]] for a in asked) == {True: 10, False: 10}


@pytest.mark.parametrize(
    "sources", [["a@50%"], ["a@50%", "b"], ["a@60%", "b@60%"], ["a@0%", "b@100%"]]
)
def test_shares_that_do_not_add_up(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(name).write_bytes(jsonl(ROWS))
    with pytest.raises(InputError, match="add up to 100%"):
        find_files(sources)
    Path("a@50%").write_bytes(jsonl(ROWS))
    assert split_share("a@50%") == ("a@50%", None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a data set of two splits."""
    monkeypatch.setattr(fetch, "WAIT_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {
        "train-00000.jsonl": jsonl(ROWS[:5]), "train-00001.jsonl": jsonl(ROWS[5:9]),
        "test-00000.jsonl": jsonl(ROWS[9:12]), "README.md": b"# about",
    }  # fmt: skip
    with serve(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_data_set_of_the_hub(hub: Hub) -> None:
    paths = find_files(["hf:me/rows"]).train
    assert [row.value for path in paths for row in read_rows(path)] == ROWS[:9]
    n_requests = len(hub.seen("storage", "GET"))
    (tested,) = bring("hf:me/rows:test")
    assert [row.value for row in read_rows(tested)] == ROWS[9:12]
    assert bring("hf:me/rows") == paths
    assert len(hub.seen("storage", "GET")) == n_requests + 1  # what is here is not fetched again
    hub.files["train-00000.jsonl"] = jsonl(ROWS[20:25])
    bring("hf:me/rows")
    assert next(read_rows(paths[0])).value == ROWS[20]


def test_without_the_hub_the_files_that_are_here_are_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = bring("hf:me/rows")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    assert bring("hf:me/rows", said.append) == paths
    assert "are used" in said[0]
    with pytest.raises(NetworkError, match="is not here"):
        bring("hf:me/rows:test")
    with pytest.raises(NetworkError, match="cannot be reached"):
        bring("hf:me/others")
    (paths[0].parent / ".files.json").write_text('{"x": 1}')
    with pytest.raises(NetworkError, match="cannot be reached"):
        bring("hf:me/rows")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("private", "or it is private"), ("no-repository", "does not exist"),
        ("page", "is not the list"),
    ],
)  # fmt: skip
def test_hubs_that_fail(hub: Hub, fault: str, says: str) -> None:
    hub.faults["listing"] = fault
    with pytest.raises(NetworkError, match=says):
        bring("hf:me/rows")


@pytest.mark.parametrize("folder", ["../", "/elsewhere/", "a//"])
def test_files_that_lead_elsewhere_are_not_brought(hub: Hub, folder: str) -> None:
    hub.folders["train-00000.jsonl"] = folder
    assert [path.name for path in bring("hf:me/rows")] == ["train-00001.jsonl"]


def test_a_file_that_arrives_damaged(hub: Hub) -> None:
    hub.faults["train-00001.jsonl"] = "corrupt"
    with pytest.raises(NetworkError, match="arrived damaged"):
        bring("hf:me/rows")


@pytest.mark.parametrize(
    ("name", "files", "chosen"),
    [
        ("hf:a/b", ["data/train.json", "data/train.parquet"], ["data/train.json"]),
        ("hf:a/b", ["rows.csv", "README.md", "dataset_infos.json"], ["rows.csv"]),
        ("hf:a/b:validation", ["train.json", "validation.json.gz"], ["validation.json.gz"]),
        ("hf:a/b/main", ["main/train-0.json", "other/train-0.json"], ["main/train-0.json"]),
    ],
)  # fmt: skip
def test_which_files_a_split_has(name: str, files: list[str], chosen: list[str]) -> None:
    assert choose(parse_name(name), dict.fromkeys(files)) == chosen


@pytest.mark.parametrize(
    ("name", "files", "says"),
    [
        ("hf:a/b", ["x/train.json", "y/train.json"], "several folders"),
        ("hf:a/b:dev", ["train.json"], "no such data"),
        ("hf:a/b", ["README.md", "model.bin"], "no such data"),
        ("hf:b", [], "no name of a data set"),
        ("hf:a/b/../c", [], "no name of a data set"),
        ("hf:../b", [], "no name of a data set"),
    ],
)
def test_data_sets_that_cannot_be_meant(name: str, files: list[str], says: str) -> None:
    with pytest.raises(GgftError, match=says):
        choose(parse_name(name), dict.fromkeys(files))
