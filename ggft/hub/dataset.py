"""Data sets of the Hugging Face hub: which files a split has, brought here and checked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggft.hub.download import connect, endpoint, offline_told
from ggft.hub.fetch import N_TRIES, Remote, check_status, fetch, reason, with_tries
from ggft.system.errors import InputError, NetworkError
from ggft.system.files import atomic_output, make_folder
from ggft.system.progress import print_note

if TYPE_CHECKING:
    import httpx2

PREFIX = "hf:"
_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w.-]+(?:/[\w.-]+)*))?(?::(?P<split>[\w.-]+))?"
)
# Rows come rather from a file that needs no extra.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
REVISIONS = ("main", "refs/convert/parquet")  # the second is made by the hub of any data set
HELD_OUT = {"valid", "validation", "val", "dev", "eval", "test"}
MAX_PAGES = 50
_ABOUT = {"dataset_infos.json", "dataset_info.json", "config.json", "requirements.txt"}


@dataclass(frozen=True)
class DatasetName:
    """What `hf:owner/dataset[/folder][:split]` names."""

    repo: str
    folder: str | None
    split: str | None


def parse_name(text: str) -> DatasetName:
    """Return the parts of a data set's name.

    Raises:
        InputError: It is none.
    """
    match = _NAME.fullmatch(text)
    parts = text.removeprefix(PREFIX).partition(":")[0].split("/")
    if match is None or any(part in (".", "..") for part in parts):
        raise InputError(
            "this is no name of a data set", found=repr(text),
            expected="hf:owner/dataset, with /folder and :split where it has several",
        )  # fmt: skip
    return DatasetName(match["repo"], match["folder"], match["split"])


def bring(text: str, note: Callable[[str], None] = print_note) -> list[Path]:
    """Return the files of a data set's split, here, after downloading those that are not.

    Without a split it is the training one.

    Raises:
        InputError: No such split, or it is not clear which files are meant.
        NetworkError, ResourceError: As `fetch`.
    """
    name = parse_name(text)
    folder = _folder() / name.repo
    try:
        client: httpx2.Client | None
        client, headers = connect()
        with offline_told("data set"):
            revision, files = _listing(client, headers, name)
    except NetworkError:
        client, revision, files = None, "", _known(folder)
        if not files:
            raise
        note(f"{endpoint()} cannot be reached: the files of {name.repo} that are here are used")
    chosen = choose(name, files)
    make_folder(folder, "the data set cannot be put here", hint="choose another XDG_CACHE_HOME")
    known = _known(folder)
    paths = [folder / file for file in chosen]
    for file, path in zip(chosen, paths, strict=True):
        is_here = path.is_file() and path.stat().st_size == files[file]["size"]
        if client is not None and not (is_here and known.get(file) == files[file]):
            note(f"Downloading {name.repo}/{file} to {path}")
            fetch(client, _remote(name.repo, revision, file, files[file], headers), path)
        elif not is_here:
            raise NetworkError(
                f"{name.repo}/{file} is not here, and {endpoint()} cannot be reached",
                hint="check the connection",
            )
    if client is not None:
        with atomic_output(folder / ".files.json") as temporary:
            temporary.write_text(json.dumps(files), encoding="utf-8")
    return paths


def choose(name: DatasetName, files: Mapping[str, Any]) -> list[str]:
    """Return the files of a split.

    Raises:
        InputError: There is none, or files of several folders could be meant.
    """
    found = [
        file
        for file in sorted(files)
        if _suffix(file) in SUFFIXES
        and file.rpartition("/")[2].lower() not in _ABOUT
        and (name.folder is None or f"{file}/".startswith(f"{name.folder}/"))
    ]
    if name.split is not None:
        chosen = [file for file in found if name.split.lower() in _words(file)]
    else:
        chosen = [file for file in found if "train" in _words(file)]
        chosen = chosen or [file for file in found if not HELD_OUT & _words(file)]
    if not chosen:
        raise InputError(
            f"{name.repo} has no such data", found=", ".join(found[:8]) or "no files of data",
            expected=f"files of {name.split or 'train'}", hint="name the split behind a colon",
        )  # fmt: skip
    suffix = min((_suffix(file) for file in chosen), key=SUFFIXES.index)
    chosen = [file for file in chosen if _suffix(file) == suffix]
    folders = sorted({file.rpartition("/")[0] for file in chosen})
    if len(folders) > 1:
        raise InputError(
            f"{name.repo} has data in several folders", found=", ".join(folders[:8]),
            expected="one", hint=f"name it: hf:{name.repo}/{folders[0]}",
        )  # fmt: skip
    return chosen


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ggft" / "datasets"


def _known(folder: Path) -> dict[str, Any]:
    """Return what was said of the files that were brought before."""
    try:
        known = json.loads((folder / ".files.json").read_text(encoding="utf-8"))
        return {file: {**known[file], "size": int(known[file]["size"])} for file in known}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _stays(file: str) -> bool:
    """Whether a file's name leads to no other folder than the data set's."""
    return not {"", ".", ".."} & set(file.split("/"))


def _suffix(file: str) -> str:
    return Path(file.lower().removesuffix(".gz")).suffix


def _words(file: str) -> set[str]:
    return set(re.split(r"[\W_]+", file.lower()))


def _listing(
    client: httpx2.Client, headers: Mapping[str, str], name: DatasetName
) -> tuple[str, dict[str, Any]]:
    """Return the revision that has data, and size and version of each of its files."""
    for revision in REVISIONS:
        files: dict[str, Any] = {}
        path = f"{endpoint()}/api/datasets/{name.repo}/tree/{revision.replace('/', '%2F')}"
        url: str | None = path + "?recursive=true"
        for _ in range(MAX_PAGES):
            if url is None:
                break
            items, url = with_tries(
                lambda url=url: _page(client, url, headers, name),  # type: ignore[misc]
                N_TRIES,
                lambda error: NetworkError(
                    f"{endpoint()} cannot be reached ({reason(error)})",
                    hint="check the connection, or give files that you have",
                ),
                is_first=True,
            )
            files |= items
        if any(_suffix(file) in SUFFIXES for file in files) or revision == REVISIONS[-1]:
            return revision, files
    raise AssertionError


def _page(
    client: httpx2.Client, url: str, headers: Mapping[str, str], name: DatasetName
) -> tuple[dict[str, Any], str | None]:
    """Return the files on a page of a listing, and the next page's address."""
    answer = client.get(url, headers=dict(headers), timeout=10.0, follow_redirects=True)
    page = f"{endpoint()}/datasets/{name.repo}"
    if answer.status_code == 401:  # of private and of missing data sets alike
        raise NetworkError(
            f"there is no data set {name.repo}, or it is private (HTTP 401)",
            hint=f"look at {page}; for a private one set HF_TOKEN to a token of your account",
        )
    check_status(answer, f"the list of {name.repo}", page)
    try:
        found = {
            item["path"]: {
                "size": int(item["size"]),
                "version": str(item.get("lfs", item)["oid"]),
                "sha256": item["lfs"]["oid"] if "lfs" in item else None,
            }
            for item in answer.json()
            if item["type"] == "file" and _stays(item["path"])
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        raise NetworkError(
            f"what came is not the list of {name.repo}'s files",
            hint="this network or server may answer with a page of its own: try another one",
        ) from None
    following = answer.links.get("next", {}).get("url")
    return found, following if following and following.startswith(endpoint()) else None


def _remote(
    repo: str, revision: str, file: str, said: Mapping[str, Any], headers: Mapping[str, str]
) -> Remote:
    branch = revision.replace("/", "%2F")
    return Remote(
        url=f"{endpoint()}/datasets/{repo}/resolve/{branch}/{file}", name=f"{repo}/{file}",
        page=f"{endpoint()}/datasets/{repo}", version=said["version"], size=said["size"],
        sha256=said["sha256"], headers=headers,
    )  # fmt: skip
