"""The only importer of llama_cpp: load, log, open a model."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ggft.gguf.read import read_gguf
from ggft.system.errors import InputError, ResourceError
from ggft.system.signals import deferred

_log = logging.getLogger("ggft.llama.model")
_LEVELS = {2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_first_complaint: str | None = None
_lib: Any = None
_callback: Any = None  # the C side holds no reference to it


def load() -> Any:
    """Import `llama_cpp` once, with its log sent to `logging`, and return its C API."""
    global _lib, _callback
    if _lib is None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:
            raise ResourceError(
                f"llama-cpp-python cannot be loaded: {error}", hint="make clean setup"
            ) from None
        _lib = llama_cpp.llama_cpp
        _callback = _lib.llama_log_callback(_on_log)
        _lib.llama_log_set(_callback, None)
        _lib.llama_backend_init()
    return _lib


def library_info() -> dict[str, str]:
    """Return the package's version, its folder, and the CPU features that it was built with."""
    from importlib.metadata import version

    api = load()
    features = api.llama_print_system_info().decode("utf-8", "replace")
    on = [part.partition("=")[0].strip() for part in features.split("|") if "= 1" in part]
    return {
        "package": version("llama-cpp-python"),
        "folder": str(Path(api.__file__).parent),
        "features": " ".join(name.rpartition(":")[2].strip() for name in on),
    }


def _on_log(level: int, text: bytes, _data: object) -> None:
    """Pass a line of llama.cpp's log on to `logging`; the levels are ggml_log_level's."""
    global _first_complaint
    line = text.decode("utf-8", "replace").rstrip()
    if level == 4 and line and _first_complaint is None:
        _first_complaint = line
    if line.strip("."):  # the loader's dots of progress
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


def complaint() -> str | None:
    """Return llama.cpp's first error line, without the name of the function that wrote it.

    The first one has the cause; those that follow say what could not be done therefore.
    """
    if _first_complaint is None:
        return None
    head, colon, rest = _first_complaint.partition(": ")
    return rest if colon and " " not in head else _first_complaint


def forget_complaints() -> None:
    """Begin anew: the next error line is the first."""
    global _first_complaint
    _first_complaint = None


def _open_model(path: Path, *, vocab_only: bool, on_gpu: bool) -> Any:
    """Check the file, then return llama.cpp's handle of it."""
    lib = load()
    # llama.cpp wants the first shard of a split model; any may be given.
    path = read_gguf(path).path
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = -1 if on_gpu else 0
    forget_complaints()
    with deferred():
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        reason = complaint() or "no reason given"
        if "alloc" in reason or "memory" in reason:
            raise ResourceError(
                "the model does not fit into memory", path=path, found=reason,
                hint="close other programs, or take a smaller model (ggft models)",
            )  # fmt: skip
        raise InputError("llama.cpp cannot load this model", path=path, found=reason)
    return model


def _free(handles: list[tuple[Any, Any]]) -> None:
    """Free a model's handles, the last one made first; the model frees its adapters."""
    while handles:
        free, handle = handles.pop()
        free(handle)
