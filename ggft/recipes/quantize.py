"""Writes a model in another type: llama.cpp's quantizer, run safely.

The quantizer stops its process at what it does not expect and writes to the final path; so the
input is checked first, the work is done by a child process into a temporary file, and the result is
read back before it gets its name.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggft.gguf.finite import check_values
from ggft.gguf.read import GGMLType, GGUFFile, read_gguf
from ggft.hub.download import find_model
from ggft.llama.library import complaint, load
from ggft.settings.commands import QuantizeConfig
from ggft.system.errors import InputError, ResourceError
from ggft.system.files import atomic_output, require_new
from ggft.system.processes import Child
from ggft.system.progress import ByteBar
from ggft.system.text import format_bytes

# llama.cpp's numbers of the types that need no measured importances, and about how many bits each
# weight takes in them. Source: llama.h, enum llama_ftype.
FILE_TYPES: dict[str, tuple[int, float]] = {
    "F32": (0, 32.0),
    "F16": (1, 16.0),
    "BF16": (32, 16.0),
    "Q8_0": (7, 8.5),
    "Q6_K": (18, 6.6),
    "Q5_K_M": (17, 5.7),
    "Q5_K_S": (16, 5.6),
    "Q5_1": (9, 6.0),
    "Q5_0": (8, 5.5),
    "Q4_K_M": (15, 4.9),
    "Q4_K_S": (14, 4.6),
    "Q4_1": (3, 5.0),
    "Q4_0": (2, 4.6),
    "IQ4_NL": (25, 4.6),
    "IQ4_XS": (30, 4.4),
    "Q3_K_L": (13, 4.3),
    "Q3_K_M": (12, 4.0),
    "Q3_K_S": (11, 3.6),
    "IQ3_M": (27, 3.7),
    "IQ3_S": (26, 3.5),
    "Q2_K": (10, 3.2),
}
_WHOLE_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did: sizes in bytes, and the number of tensors of each type."""

    output: Path
    old_bytes: int
    new_bytes: int
    types: dict[str, int]


def quantize(
    path: str | Path,
    output: str | Path,
    type_name: str,
    config: QuantizeConfig | None = None,
    progress: Callable[[int], object] | None = None,
) -> QuantizeReport:
    """Write a model in another type, whole or not at all.

    Args:
        path: The model's GGUF, or a shard of it; the output is one file.
        output: The GGUF to write.
        type_name: A name of FILE_TYPES.
        config: How.
        progress: Called now and then with the number of bytes written so far.

    Raises:
        InputError: The type or the model cannot be used.
        ResourceError: The disk is full, or the quantizer failed.
    """
    config = config or QuantizeConfig()
    if type_name.upper() not in FILE_TYPES:
        raise InputError("unknown type", found=ascii(type_name), expected=", ".join(FILE_TYPES))
    number, bits = FILE_TYPES[type_name.upper()]
    file = read_gguf(find_model(str(path)))
    require_new(output, force=config.force, inputs=file.paths)
    _check_input(file, config)
    n_elements = sum(tensor.n_elements for tensor in file.tensors.values())
    expected_bytes = file.tensors[next(iter(file.tensors))].offset + int(n_elements * bits / 8)
    with atomic_output(output, expected_bytes=expected_bytes, inputs=file.paths) as temporary:
        _run_child(file.path, temporary, number, config, progress)
        result = read_gguf(temporary)
        if set(result.tensors) != set(file.tensors):
            raise ResourceError("the quantizer left tensors out", path=output)
    types: dict[str, int] = {}
    for tensor in result.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    return QuantizeReport(Path(output), file.file_bytes, Path(output).stat().st_size, types)


def _check_input(file: GGUFFile, config: QuantizeConfig) -> None:
    """Refuse what is no model, has NaN in it, or is quantized already."""
    if file.get("general.type", "model") != "model" or not file.tensors:
        raise InputError("not a model", path=file.path, found=ascii(file.get("general.type")))
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    coarse = next((tensor for tensor in matrices if tensor.type not in _WHOLE_TYPES), None)
    if coarse is not None and not config.requantize:
        raise InputError(
            "the model is quantized already",
            path=file.path,
            offset=coarse.header_offset,
            found=f"{coarse.name!a} in {coarse.type.name}",
            expected="F32, F16 or BF16",
            hint="start from the original for best quality, or accept the loss with --requantize",
        )
    check_values(file)


def _run_child(
    path: Path,
    output: Path,
    number: int,
    config: QuantizeConfig,
    progress: Callable[[int], object] | None,
) -> None:
    """Run `serve` in a child process, and watch the output grow.

    Raises:
        OSError: The disk takes no more.
        ResourceError: The quantizer failed.
    """
    settings = (number, config.threads or 0, int(config.requantize), int(config.pure))
    child = Child("ggft.recipes.quantize:serve", str(path), str(output), *map(str, settings))
    try:
        code = child.wait(progress and (lambda: progress(output.stat().st_size)))
        if not code:
            return
        # The quantizer knows only that writing failed; the system says why.
        with output.open("ab") as file:
            file.write(bytes(1 << 20))
        raise ResourceError("the quantizer failed", path=path, found=child.last_words())
    finally:
        # Also when interrupted: nothing may go on writing.
        child.stop()


def serve() -> None:
    """Quantize in this process. Arguments: input, output, type number, threads, two flags."""
    source, output = map(os.fsencode, sys.argv[1:3])
    number, threads, requantize, pure = map(int, sys.argv[3:])
    api = load()
    params = api.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = threads
    params.allow_requantize = bool(requantize)
    params.pure = bool(pure)
    if api.llama_model_quantize(source, output, ctypes.byref(params)):
        sys.exit(complaint() or "no reason given")


def quantize_file(path: str, output: str, type_name: str, config: QuantizeConfig) -> str:
    """Quantize with a progress bar where somebody watches; return what `ggft quantize` prints."""
    with ByteBar() as bar:
        report = quantize(path, output, type_name, config, bar.move_to)
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    sizes = f"{format_bytes(report.old_bytes)} → {format_bytes(report.new_bytes)}"
    return f"wrote {report.output}: {sizes}, tensors: {types}"
