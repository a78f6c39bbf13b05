"""Bring one large file from a server: resumed, checked, and whole or not there.

Bytes go to a hidden part file beside the target, whose name holds the remote file's version, so
that a part of an older version is never continued. The part survives a broken connection, a full
disk and kill -9; the target appears only after its SHA-256 is right.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ggft.gguf.header import read_header
from ggft.system.errors import InputError, NetworkError, ResourceError
from ggft.system.files import flush, require_space
from ggft.system.progress import ByteBar

if TYPE_CHECKING:
    import httpx2

ResultT = TypeVar("ResultT")
N_TRIES = 5
WAIT_S = 1.0  # before the second try; doubled each time
MAX_WAIT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
FIRST_CONNECT_TIMEOUT_S = 2.5  # of a hub that may not be there: said within 3 seconds
STALL_TIMEOUT_S = 30.0
_HOPELESS = ("TooManyRedirects", "UnsupportedProtocol", "LocalProtocolError")
_UNREACHABLE = ("ConnectError", "ConnectTimeout")
_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Remote:
    """A file on a server, and what must arrive.

    Args:
        url: Where it is.
        name: What messages call it.
        page: Where a person can read about it and accept its licence.
        version: Text that changes when the file does.
        size: Its bytes, where known.
        sha256: Its hash in hexadecimal, where known.
        headers: Sent to the url's own host only, never to one that it redirects to.
    """

    url: str
    name: str
    page: str
    version: str
    size: int | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class BusyError(Exception):
    """A failure that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Part:
    """The part file: its bytes on disk, their count and their hash so far."""

    def __init__(self, file: BinaryIO, limit: int | None) -> None:
        self._file = file
        self.n_bytes = 0
        self.digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            self.digest.update(chunk)
            self.n_bytes += len(chunk)
        if limit is not None and self.n_bytes > limit:
            self.restart()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.n_bytes = 0
        self.digest = hashlib.sha256()

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.digest.update(chunk)
        self.n_bytes += len(chunk)


def fetch(client: httpx2.Client, remote: Remote, target: Path) -> None:
    """Download `remote` to `target`, going on where an earlier attempt stopped.

    Raises:
        NetworkError: Not to be had, or not what it should be; the part is kept unless damaged.
        ResourceError: No room, or another process is downloading the same file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = hashlib.sha256(remote.version.encode()).hexdigest()[:12]
    path = target.with_name(f".{target.name}.{tag}.part")
    for old in target.parent.glob(f".{target.name}.*.part"):
        if old != path and _is_unused(old):
            old.unlink(missing_ok=True)
    with _locked(path, target) as file:
        try:
            part = _Part(file, remote.size)
            if remote.size is not None:
                require_space(target, remote.size - part.n_bytes, spare_bytes=_SPARE_BYTES)
            _fill(client, remote, part)
            file.flush()
        except OSError as error:
            raise ResourceError(
                f"writing failed: {error.strerror}", path=path,
                hint="free some space, then run the same command again: it goes on from here",
            ) from error  # fmt: skip
        found = part.digest.hexdigest()
        if remote.sha256 is not None and found != remote.sha256:
            path.unlink()
            raise NetworkError(
                f"{remote.name} arrived damaged", found=f"SHA-256 {found}", expected=remote.sha256,
                hint="run the same command again; if it stays so, ask who runs the server or proxy",
            )  # fmt: skip
        if remote.sha256 is None:
            _check_content(path, remote, target)
        flush(path)
        os.replace(path, target)
        flush(target.parent)


def _check_content(path: Path, remote: Remote, target: Path) -> None:
    """Refuse what is no whole GGUF file, where no hash tells: a page, an error, half a file.

    Raises:
        NetworkError: It is not; what was there before stays.
    """
    if target.suffix != ".gguf":
        return
    try:
        read_header(path)
    except InputError as error:
        found = f"{error.message} (found {error.found})"
        path.unlink()
        raise NetworkError(
            f"what came is not {remote.name}", found=found, expected="a whole GGUF file",
            hint="this network or server may answer with a page of its own: try another one",
        ) from None  # fmt: skip


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[BinaryIO]:
    """Open the part file for this process alone."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                "another process is downloading this file", path=target, hint="wait for it to end"
            ) from None
        file.seek(0)
        try:
            yield file
        finally:
            file.flush()
            if path.exists() and not path.stat().st_size:
                path.unlink()


def _is_unused(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _fill(client: httpx2.Client, remote: Remote, part: _Part) -> None:
    """Receive until the part is complete; bounded tries, counted anew when bytes arrived."""
    import httpx2

    bar = ByteBar(remote.name, remote.size, first=part.n_bytes)
    best, failures = part.n_bytes, 0
    with bar:
        while remote.size is None or part.n_bytes < remote.size:
            try:
                _receive(client, remote, part, bar)
                if remote.size is None:
                    return
                raise BusyError("the connection ended early")
            except (httpx2.RequestError, BusyError) as error:
                _require_hope(error, remote.name)
                if remote.size is not None and part.n_bytes == remote.size:
                    return
                failures = 1 if part.n_bytes > best else failures + 1
                best = max(best, part.n_bytes)
                if failures >= N_TRIES:
                    raise NetworkError(
                        f"{remote.name} could not be downloaded: {reason(error)}",
                        found=f"{part.n_bytes} bytes after {failures} tries",
                        hint="run the same command again later: it goes on from here",
                    ) from None
                pause(failures, error)


def _is_hopeless(error: Exception) -> bool:
    """Return whether the same request would fail again: it leads in a circle, or nowhere."""
    return type(error).__name__ in _HOPELESS


def _require_hope(error: Exception, name: str) -> None:
    if _is_hopeless(error):
        raise NetworkError(
            f"{name} could not be downloaded: its address leads in a circle or nowhere",
            hint="ask who runs the server or proxy",
        ) from None


def pause(failures: int, error: Exception) -> None:
    """Wait before the next try, longer each time, or as long as the server asked for."""
    wait_s = max(WAIT_S * 2 ** (failures - 1), getattr(error, "wait_s", 0.0))
    time.sleep(min(wait_s, MAX_WAIT_S))


def reason(error: Exception) -> str:
    """Say in a few words why a request failed; no address, since it may hold a signature."""
    text = str(error).strip()
    kind = type(error).__name__
    if kind == "ConnectError":
        return text.removeprefix("[Errno -2] ") or "no connection"
    if "Timeout" in kind:
        return "no answer in time"
    return text if isinstance(error, BusyError) else f"the connection broke ({kind})"


def _receive(client: httpx2.Client, remote: Remote, part: _Part, bar: ByteBar) -> None:
    """Make one request and append what arrives."""
    import httpx2

    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if part.n_bytes:
        headers["Range"] = f"bytes={part.n_bytes}-"
    timeout = httpx2.Timeout(STALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with client.stream(
        "GET", remote.url, headers=headers, timeout=timeout, follow_redirects=True
    ) as answer:
        if answer.status_code == 416:  # what is here is longer than what is there
            part.restart()
        _check_answer(answer, remote)
        if not _begins_at(answer, part.n_bytes):
            # A server may ignore the range and send the whole file.
            part.restart()
        for chunk in answer.iter_raw():  # as it comes, so that a break loses nothing
            part.append(chunk)
            bar.move_to(part.n_bytes)
            if remote.size is not None and part.n_bytes > remote.size:
                part.restart()
                raise BusyError(f"more than the expected {remote.size} bytes came")


def fetch_range(client: httpx2.Client, remote: Remote, first: int, n_bytes: int) -> bytes:
    """Return `n_bytes` of a remote file from byte `first` on; bounded tries.

    Raises:
        NetworkError: Not to be had.
    """
    return with_tries(
        lambda: _receive_range(client, remote, first, n_bytes),
        N_TRIES,
        lambda error: NetworkError(
            f"{remote.name} could not be read: {reason(error)}",
            hint="check the connection, then run the same command again",
        ),
    )


def with_tries(
    request: Callable[[], ResultT],
    n_tries: int,
    failed: Callable[[Exception], NetworkError],
    *,
    is_first: bool = False,
) -> ResultT:
    """Return what `request` returns, tried again after pauses where the network is at fault.

    Where the first request of all reaches nobody, most likely none will: that is said at once.

    Raises:
        NetworkError: `failed` of the last error.
    """
    import httpx2

    failures = 0
    while True:
        try:
            return request()
        except (httpx2.RequestError, BusyError) as error:
            failures += 1
            is_vain = is_first and type(error).__name__ in _UNREACHABLE
            if failures >= n_tries or is_vain or _is_hopeless(error):
                raise failed(error) from None
            pause(failures, error)


def _receive_range(client: httpx2.Client, remote: Remote, first: int, n_bytes: int) -> bytes:
    """Make one request; a server that ignores the range is listened to until it was sent."""
    import httpx2

    headers = {**remote.headers, "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={first}-{first + n_bytes - 1}"
    timeout = httpx2.Timeout(STALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with client.stream(
        "GET", remote.url, headers=headers, timeout=timeout, follow_redirects=True
    ) as answer:
        _check_answer(answer, remote)
        begin = first if _begins_at(answer, first) else 0
        data = bytearray()
        for chunk in answer.iter_raw(_CHUNK_BYTES):
            data += chunk
            if begin + len(data) >= first + n_bytes:
                return bytes(data[first - begin :][:n_bytes])
    raise BusyError("the connection ended early")


def _begins_at(answer: httpx2.Response, first: int) -> bool:
    """Return whether the range that was asked for comes, and not the whole file."""
    begins = f"bytes {first}-"
    return answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(begins)


def _check_answer(answer: httpx2.Response, remote: Remote) -> None:
    """Refuse an error, or a page instead of the file.

    Raises:
        BusyError, NetworkError: As `check_status`.
    """
    check_status(answer, remote.name, remote.page)
    if "text/html" in answer.headers.get("Content-Type", ""):
        raise NetworkError(
            f"a web page came instead of {remote.name}",
            hint="this network may want you to sign in first: open any page in a browser",
        )


def whole_number(text: str | None) -> int | None:
    """Return the value of a numeric header, None if it has none; `²` is a digit, but no number."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else None


def check_status(answer: httpx2.Response, name: str, page: str) -> None:
    """Turn an HTTP error into what the user can do about it.

    Raises:
        BusyError: The server is busy (408, 416, 429, 5xx).
        NetworkError: Any other error.
    """
    status = answer.status_code
    if status < 400:
        return
    if status in (401, 403):
        raise NetworkError(
            f"{name} is not open to everybody (HTTP {status})",
            hint=f"accept its licence at {page}, then set HF_TOKEN to a token of your account",
        )
    if status in (404, 410):
        raise NetworkError(f"{name} does not exist (HTTP {status})", hint=f"see {page}")
    if status in (408, 416, 429) or status >= 500:
        after = answer.headers.get("Retry-After", "")
        raise BusyError(f"the server is busy (HTTP {status})", float(whole_number(after) or 0))
    raise NetworkError(f"{name} was refused (HTTP {status})", hint=f"see {page}")
