"""What `--data` names: files, folders, standard input, data sets of the hub, each with a share."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggft.data.sources.standard_input import STDIN, stdin_bytes
from ggft.hub.dataset import PREFIX, bring
from ggft.system.errors import InputError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md")
TRAIN_NAMES = ("train", "training")
VALID_NAMES = ("valid", "validation", "val", "dev", "eval")
_SHARE = re.compile(r"(.+)@(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class DataFiles:
    """The files that a list of sources stands for.

    Attributes:
        train: Files of training rows.
        valid: Files of rows to hold out.
        source: For each training file the number of the source that it belongs to.
        shares: Of the training rows, by source; empty where nothing is said.
    """

    train: list[Path]
    valid: list[Path]
    source: list[int]
    shares: list[float]


def find_files(sources: Iterable[str | Path]) -> DataFiles:
    """Return the files behind sources; a folder gives its train and valid files.

    A folder without a file called `train…` gives all its data files but those called `valid…`
    or `test…`.

    Raises:
        InputError: Nothing there, not a file, a folder without data, or shares that do not add up.
        NetworkError, ResourceError: A data set of the hub cannot be had.
    """
    train: list[Path] = []
    valid: list[Path] = []
    number: list[int] = []
    shares: list[float | None] = []
    for text in map(str, sources):
        name, share = split_share(text)
        found, held_out = _files_of(name)
        train += found
        valid += held_out
        number += [len(shares)] * len(found)
        shares.append(share)
    if not train:
        raise InputError("no training data given", hint="name a file or folder with --data")
    return DataFiles(train, valid, number, _checked(shares))


def split_share(text: str) -> tuple[str, float | None]:
    """Return a source without `@SHARE%`, and the share; a file of that very name comes first."""
    match = _SHARE.fullmatch(text)
    if match is None or Path(text).exists():
        return text, None
    return match[1], float(match[2]) / 100


def is_here(text: str) -> bool:
    """Whether a source can be read again without asking anybody."""
    return Path(split_share(text)[0]).exists()


def absolute(text: str) -> str:
    """Return a source so that it is found from any folder."""
    name, _ = split_share(text)
    return text if name == "-" or name.startswith(PREFIX) else os.path.abspath(text)


def size_of(path: Path) -> int:
    """Return how many bytes a file of data has."""
    return stdin_bytes() if path == STDIN else path.stat().st_size


def check_regular(path: Path) -> None:
    """Raise InputError unless a file of data is one that can be read."""
    if path == STDIN:
        return
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise InputError(f"cannot read the data: {reason}", path=path) from None
    if not stat.S_ISREG(mode):
        raise InputError(
            "the data is not a regular file", path=path,
            hint="save the data in a file first, or pipe it to --data -",
        )  # fmt: skip


def suffix_of(path: Path) -> str:
    """Return a file's suffix, that of gzip left out."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _files_of(name: str) -> tuple[list[Path], list[Path]]:
    """Return the training and validation files of a source."""
    path = Path(name)
    if name == "-":
        return [STDIN], []
    if name.startswith(PREFIX) and not path.exists():
        return bring(name), []
    if not path.is_dir():
        check_regular(path)
        return [path], []
    found = sorted(p for p in path.iterdir() if suffix_of(p) in SUFFIXES and p.is_file())
    named = [p for p in found if _called(p, TRAIN_NAMES)]
    held_out = [p for p in found if _called(p, VALID_NAMES)]
    rest = [p for p in found if p not in held_out and not _called(p, ("test",))]
    if not (named or rest):
        raise InputError(
            "no training data in this folder",
            path=path,
            expected="a file train.jsonl, or others of " + " ".join(SUFFIXES),
            hint="name the files themselves with --data",
        )
    return named or rest, held_out


def _called(path: Path, names: tuple[str, ...]) -> bool:
    stem = path.name.split(".")[0].lower()
    return any(stem == n or stem.startswith((n + "-", n + "_")) for n in names)


def _checked(shares: Sequence[float | None]) -> list[float]:
    """Return the shares of all sources, or none where none has one."""
    said = [share for share in shares if share is not None]
    if not said:
        return []
    if len(said) < len(shares) or abs(sum(said) - 1) > 0.005 or min(said) <= 0:
        raise InputError(
            "shares of sources must add up to 100%",
            found=" + ".join("none" if s is None else f"{s:.4g}" for s in shares),
            expected="one behind each source: -d mine.json@30% -d general.json@70%",
        )
    return said
