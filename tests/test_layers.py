"""The import rule: a module imports its own package and those to the left of it, never rightwards.

ARCHITECTURE.md says what each package is for. Native code has a table of its own, held by its
includes.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ggft"
LAYERS = [
    "system", "prompts", "gguf", "settings", "llama", "legacy", "hub", "data", "engine",
    "adapters", "setup", "training", "recipes", "command", "cli", "__main__",
]  # fmt: skip
# Imported only where Python has no tomllib; and what an extra brings.
OLD_PYTHONS = {"tomli": ["tomli"]}
OPTIONAL = {"pyarrow", "tensorboardX", "wandb"}
NATIVE_LAYERS = [
    "base", "kernels", "calibrate", "trace", "model", "rules", "patterns", "segments", "engine",
    "bindings",
]  # fmt: skip
MOST_FILES = 15
# Who alone may import what is heavy or foreign.
ONLY = {
    "llama_cpp": {"llama.library"},
    "ggft._native": {"engine.engine"},
    "click": {"command", "cli"},
    "huggingface_hub": {"hub.download"},
    "httpx2": {"hub.fetch", "hub.download", "hub.dataset"},
    "jinja2": {"prompts.jinja"},
    "pyarrow": {"data.sources.parquet"},
    "yaml": {"settings.option"},
    "tqdm": {"system.progress"},
    "tensorboardX": {"training.callbacks"},
    "wandb": {"training.callbacks"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
SOURCES = sorted(
    path for path in (ROOT / "native").rglob("*") if path.suffix in (".cpp", ".h")
    and path.parent.name != "tests"
)  # fmt: skip


def name_of(path: Path) -> str:
    """Return a module's dotted name within the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Return every module that a file imports anywhere in it, and every name imported from one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_left(path: Path) -> None:
    name = name_of(path)
    own = name.partition(".")[0]
    assert own in LAYERS, "a new package: give it a place in LAYERS and in ARCHITECTURE.md"
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        package = rest.partition(".")[0]
        if top != "ggft" or package not in LAYERS:
            continue
        assert LAYERS.index(package) <= LAYERS.index(own), f"{name} may not import {imported}"
        if own == package == "recipes":
            pytest.fail(f"recipes never import one another: {imported}")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_foreign_modules_have_one_importer(path: Path) -> None:
    for imported in imports(path):
        for foreign, importers in ONLY.items():
            if imported == foreign or imported.startswith(foreign + "."):
                assert name_of(path) in importers, f"{name_of(path)} imports {foreign}"


def test_what_is_imported_is_declared_or_brought_by_what_is() -> None:
    declared = {
        _project(line) for line in metadata.requires("ggft") or [] if "extra ==" not in line
    }
    brought = {
        _project(line)
        for name in declared
        for line in metadata.requires(name) or []
        if "extra ==" not in line
    }
    projects = {**metadata.packages_distributions(), **OLD_PYTHONS}
    for path in MODULES:
        for imported in imports(path):
            top = imported.partition(".")[0]
            if top == "ggft" or top in sys.stdlib_module_names or top in OPTIONAL:
                continue
            names = {_project(name) for name in projects[top]}
            assert names & (declared | brought), f"{name_of(path)} imports {top}: declare it"


def _project(requirement: str) -> str:
    """Return the normalized name of the project in a requirement."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_every_folder_is_small_and_every_package_says_what_it_is() -> None:
    for folder in {path.parent for path in (*MODULES, *SOURCES)}:
        n_files = len([p for p in folder.iterdir() if p.is_file()])
        assert n_files <= MOST_FILES, f"{folder.relative_to(ROOT)} has {n_files} files"
    for package in {path.parent for path in MODULES}:
        tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{package.name}/__init__.py has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "native")))
def test_includes_go_left(path: Path) -> None:
    own = path.relative_to(ROOT / "native").parts[0]
    for included in re.findall(r'#include "([\w./]+)"', path.read_text(encoding="utf-8")):
        folder = included.partition("/")[0]
        if "/" in included and folder in NATIVE_LAYERS:
            assert NATIVE_LAYERS.index(folder) <= NATIVE_LAYERS.index(own), (
                f"{own} may not include {included}"
            )
