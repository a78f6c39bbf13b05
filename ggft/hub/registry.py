"""The models that ggft knows by name, where they are kept, and which fit this machine."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ggft.settings.commands import ModelsConfig
from ggft.system.errors import InputError
from ggft.system.machine import memory_bytes
from ggft.system.text import format_bytes

# What training needs beside the weights, and what the system keeps for itself: a rule of thumb for
# lists and for refusing a download; `ggft plan` computes it for a file.
TRAINING_BYTES = 1_500_000_000
SYSTEM_BYTES = 2_000_000_000

_HUB_FILE = re.compile(
    r"(?:hf:|https://(?:huggingface\.co|hf\.co)/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/"
    r"(?:(?:resolve|blob)/(?P<branch>[\w.-]+)/)?"
    r"(?P<file>[^@?#]+)(?:@(?P<revision>[\w./-]+))?(?:\?download=true)?"
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file on the hub, by a name of ours or by its own."""

    name: str
    title: str
    repo: str
    file: str
    revision: str = "main"
    size: int | None = None
    about_bytes: int = 0
    sha256: str | None = None
    pypi: str | None = None
    pypi_member: str = ""

    @property
    def n_bytes(self) -> int:
        """The file's size, or about that; 0 if unknown."""
        return self.size or self.about_bytes

    @property
    def local_name(self) -> str:
        """The file's name in the models folder."""
        return self.file.rsplit("/", 1)[-1]

    def fits(self, memory_bytes: int) -> bool:
        """Whether a machine with this much memory can train it."""
        return self.n_bytes + TRAINING_BYTES + SYSTEM_BYTES <= memory_bytes or not self.n_bytes


def registry() -> dict[str, Entry]:
    """Return the models known by name."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # huggingface-hub brings it there
        import tomli as tomllib
    text = Path(__file__).with_name("registry.toml").read_text(encoding="utf-8")
    return {name: Entry(name=name, **fields) for name, fields in tomllib.loads(text).items()}


def models_folder(entry: Entry) -> Path:
    """Return where a model is kept: in $GGFT_MODELS, the checkout's models/ or the user's cache.

    Repositories name their files alike, so what the registry does not know gets folders of its own.
    """
    chosen = os.environ.get("GGFT_MODELS")
    checkout = Path(__file__).resolve().parents[2]
    if chosen:
        folder = Path(chosen).expanduser()
    elif (checkout / "pyproject.toml").is_file():
        folder = checkout / "models"
    else:
        cache = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(cache) if cache else Path.home() / ".cache") / "ggft" / "models"
    return folder if entry.name in registry() else folder / entry.repo


def entry_of(text: str) -> Entry:
    """Return the entry of a registry name, `owner/repository/file[@revision]` or a hub address.

    Raises:
        InputError: None of these, or a file name that leads out of its folder.
    """
    known = registry()
    if text.lower() in known:
        return known[text.lower()]
    match = _HUB_FILE.fullmatch(text)
    if match is None:
        near = difflib.get_close_matches(text.lower(), known, n=1)
        raise InputError(
            f"unknown model `{text}`", expected="a name, or owner/repository/file.gguf",
            hint=f"did you mean `{near[0]}`?" if near else "ggft models shows the names",
        )  # fmt: skip
    file = match["file"]
    if any(part in ("", ".", "..") for part in file.split("/")) or "\\" in file:
        raise InputError("the file's name leads out of its folder", found=repr(file))
    revision = match["revision"] or match["branch"] or "main"
    return Entry(name=text, title="", repo=match["repo"], file=file, revision=revision)


def models_text(config: ModelsConfig) -> str:
    """Return the registry for people or, with --json, for programs."""
    memory, entries = memory_bytes(), list(registry().values())
    here = {entry.name: (models_folder(entry) / entry.local_name).is_file() for entry in entries}
    if config.json:
        rows = [
            {
                "name": entry.name,
                "bytes": entry.n_bytes,
                "fits": entry.fits(memory),
                "here": here[entry.name],
                "title": entry.title,
            }
            for entry in entries
        ]
        return json.dumps(rows, indent=2)
    width = max(len(entry.name) for entry in entries)
    lines = []
    for entry in entries:
        state = "here" if here[entry.name] else "" if entry.fits(memory) else "too large"
        size = format_bytes(entry.n_bytes)
        lines.append(f"{entry.name:{width}}  {size:>9}  {state:9}  {entry.title}")
    return "\n".join(lines)
