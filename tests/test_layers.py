"""The import rule: a module imports only lower layers, or earlier names of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ggft"

# One line a layer; within a line, a module may import what stands before it. Verbs never import
# one another.
LAYERS = """
errors terminal file_kinds options common_options config description progress interrupt
supervise child
gguf_types architectures cursor gguf_parse gguf_vocab gguf_check gguf gguf_write metal
safetensors matmul_peak machine
chat_template jinja encoding word_cache builtin_templates templates ollama vocabulary
json_stream formats datasets dedup recipe token_store batching
row_encoding row_table corpus schedule steps
legacy_blocks legacy_parse legacy legacy_family legacy_vocab block_scales
llamacpp crew ggml_quants receipt engine adapter peft checkpoint planner fetch registry hub outline
base rundir chart report samples trainer
evaluate train prepare convert inspect merge quantize export generate doctor bench
command cli __main__
"""
ROWS = [line.split() for line in LAYERS.strip().splitlines()]
VERBS = len(ROWS) - 2
LEVEL = {name: (row, column) for row, names in enumerate(ROWS) for column, name in enumerate(names)}
# Who alone may import what is heavy or foreign.
ONLY = {
    "llama_cpp": {"llamacpp"},
    "_native": {"engine"},
    "click": {"command", "cli"},
    "huggingface_hub": {"hub"},
    "httpx2": {"fetch", "hub"},
    "jinja2": {"jinja"},
}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the modules of ggft that a file imports anywhere in it, and the foreign packages."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["ggft" if node.level else "", node.module or ""]))
            names = [f"{base}.{alias.name}" if base == "ggft" else base for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "ggft":
                own.add(rest.partition(".")[0])
            else:
                foreign.add(top)
    return own, foreign


MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    assert path.stem in LEVEL, "a new module: give it a place in LAYERS"
    own = LEVEL[path.stem]
    for name in imports(path)[0] & LEVEL.keys():
        assert LEVEL[name] < own, f"{path.stem} may not import {name}"
        assert not (own[0] == VERBS == LEVEL[name][0]), f"verb {path.stem} imports verb {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_foreign_modules_have_one_importer(path: Path) -> None:
    own, foreign = imports(path)
    for name in (own | foreign) & ONLY.keys():
        assert path.stem in ONLY[name], f"{path.stem} imports {name}"


def test_the_table_names_only_what_exists() -> None:
    assert set(LEVEL) == {path.stem for path in MODULES}
