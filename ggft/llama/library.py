"""The only importer of llama_cpp: load, log, open a model."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from enum import Enum, auto
from pathlib import Path
from types import ModuleType
from typing import Any

from ggft.system.errors import InputError, ResourceError
from ggft.system.signals import deferred
from ggft.system.supervisor import tell

_log = logging.getLogger("ggft.llama.model")
# Tokens per call of llama_decode: small enough that Ctrl-C is heard, large enough for fast GEMMs.
N_BATCH = 512
_LEVELS = {2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_first_complaint: str | None = None
_lib: Any = None
_callback: Any = None  # the C side holds no reference to it


class Part(Enum):
    """What of a model is loaded."""

    ALL = auto()
    HEADER = auto()  # hyper-parameters, vocabulary and tensors, without the weights' values
    VOCABULARY = auto()


def load() -> Any:
    """Import `llama_cpp` once, with its log sent to `logging`, and return its C API."""
    global _lib, _callback
    if _lib is None:
        try:
            _lib = _import()
        except (ImportError, OSError, RuntimeError) as error:
            raise ResourceError(
                f"llama-cpp-python cannot be loaded: {error}", hint="make clean setup"
            ) from None
        _callback = _lib.llama_log_callback(_on_log)
        _lib.llama_log_set(_callback, None)
        _lib.llama_backend_init()
    return _lib


def _import() -> Any:
    """Import `llama_cpp.llama_cpp`, the C API, without the package's own start.

    That imports servers, caches and templates that are of no use here, and takes four times as
    long as the rest.
    """
    name = "llama_cpp"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"no package {name}")
        bare = ModuleType(name)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = bare
        try:
            return importlib.import_module("llama_cpp.llama_cpp")
        finally:
            del sys.modules[name]  # who imports the package later gets all of it
    return importlib.import_module("llama_cpp.llama_cpp")


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
        tell(complaint=complaint())  # what follows may be a crash
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


def open_model(path: Path, part: Part = Part.ALL, *, on_gpu: bool = False) -> Any:
    """Return llama.cpp's handle of a file that `read_gguf` accepts.

    Raises:
        InputError: llama.cpp refuses it.
        ResourceError: Not enough memory.
    """
    lib = load()
    params = lib.llama_model_default_params()
    params.vocab_only = part is Part.VOCABULARY
    params.n_gpu_layers = -1 if on_gpu else 0
    if part is Part.HEADER:
        params.no_alloc = True
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
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


def open_context(model: Any, path: Path, *, n_ctx: int, threads: int | None = None) -> Any:
    """Return a context of `n_ctx` tokens of an open model.

    Raises:
        ResourceError: Not enough memory.
    """
    lib = load()
    params = lib.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = N_BATCH
    params.no_perf = True
    if threads:
        params.n_threads = params.n_threads_batch = threads
    forget_complaints()
    with deferred():
        context = lib.llama_init_from_model(model, params)
    if not context:
        raise ResourceError(
            f"no memory for a context of {n_ctx} tokens", path=path, found=complaint(),
            hint="ask for a shorter one: --context",
        )  # fmt: skip
    return context


def free(handles: list[tuple[Any, Any]]) -> None:
    """Free a model's handles, the last one made first; the model frees its adapters."""
    while handles:
        free, handle = handles.pop()
        free(handle)
