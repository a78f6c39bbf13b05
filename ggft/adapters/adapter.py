"""LoRA adapters as GGUF files: written as llama.cpp reads them, read with every check.

A pair `<tensor>.lora_a` (R, C_in) and `<tensor>.lora_b` (C_out, R) adds
`alpha / R * lora_b @ lora_a` to the base tensor (C_out, C_in); shapes here are NumPy's, a file's
`ne` is the reverse. Beside llama.cpp's keys, ours under `ggft.*` say which base file the adapter
belongs to and with which prompt template it was trained.

Source: the adapter loader in llama.cpp's src/llama-adapter.cpp.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ggft import __version__
from ggft.adapters.base import check_base
from ggft.gguf.read import (
    GGMLType,
    GGUFFile,
    TensorInfo,
    Value,
    ValueType,
    dequantize,
    read_gguf,
)
from ggft.gguf.write import TensorSource, write_gguf
from ggft.system.errors import InputError, NumericError
from ggft.system.files import copy_file

if TYPE_CHECKING:
    from ggft.engine.engine import FloatArray

A_SUFFIX, B_SUFFIX = ".lora_a", ".lora_b"


@dataclass(frozen=True, kw_only=True)
class AdapterMeta:
    """What an adapter file says about itself; None where it does not say.

    Attributes:
        template_source: The template itself; `template` is what it was called.
        template_arguments: Variables that it was given, a JSON object.
        base_norms_sha256: Of the base's norms, which no quantization changes.
        vocabulary_sha256: Of the base's tokens.
    """

    architecture: str
    rank: int
    alpha: float
    dropout: float | None = None
    base_sha256: str | None = None
    base_name: str | None = None
    template: str | None = None
    template_sha256: str | None = None
    template_source: str | None = None
    template_arguments: str | None = None
    base_norms_sha256: str | None = None
    vocabulary_sha256: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter file.

    Attributes:
        path: The file.
        meta: What it says about itself.
        tensors: Every lora_a and lora_b by full name.
        note: What to know of the base that it was read for.
    """

    path: Path
    meta: AdapterMeta
    tensors: dict[str, TensorInfo] = field(repr=False)
    note: str | None = None

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base tensors that the adapter changes."""
        return tuple(n.removesuffix(A_SUFFIX) for n in self.tensors if n.endswith(A_SUFFIX))

    def save(self, path: str | Path) -> None:
        """Copy the file, whole or not at all.

        Raises:
            InputError, ResourceError: It cannot be written there.
        """
        copy_file(self.path, Path(path))

    def array(self, name: str) -> FloatArray:
        """Read a matrix as float32: lora_a (R, C_in) or lora_b (C_out, R)."""
        tensor = self.tensors[name]
        return dequantize(tensor).reshape(-1, tensor.shape[0])

    def arrays(self) -> dict[str, FloatArray]:
        """Read all matrices."""
        return {name: self.array(name) for name in self.tensors}


def matrix_source(name: str, shape: tuple[int, int], get: Callable[[], FloatArray]) -> TensorSource:
    """Return a float32 matrix (rows, columns) for the GGUF writer, fetched when its turn comes.

    Writing raises NumericError where a value is not finite.
    """

    def chunks() -> list[memoryview]:
        import numpy as np

        array = np.ascontiguousarray(get(), dtype="<f4")
        if not np.isfinite(array).all():
            raise NumericError(f"{name} holds a value that is not finite")
        return [array.data.cast("B")]

    return TensorSource(name, GGMLType.F32, shape[::-1], chunks)


def write_adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    get: Callable[[str], FloatArray],
    meta: AdapterMeta,
    inputs: Sequence[Path] = (),
) -> None:
    """Write an adapter whole or not at all; `get` gives each matrix of `shapes` by name.

    `inputs` are files that are read meanwhile; the adapter must be none of them.

    Raises:
        InputError: the path cannot be used.
        ResourceError: it cannot be written; an older file at `path` is untouched.
    """
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.architecture": meta.architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(meta.alpha),
        "ggft.version": __version__,
        "ggft.rank": meta.rank,
    }
    optional = {
        "general.base_model.0.name": meta.base_name,
        "ggft.base_sha256": meta.base_sha256,
        "ggft.template": meta.template,
        "ggft.template_sha256": meta.template_sha256,
        "ggft.template_source": meta.template_source,
        "ggft.template_arguments": meta.template_arguments,
        "ggft.base_norms_sha256": meta.base_norms_sha256,
        "ggft.vocabulary_sha256": meta.vocabulary_sha256,
        "ggft.dropout": meta.dropout,
    }
    if meta.base_name is not None:
        metadata["general.base_model.count"] = 1
    for key, value in optional.items():
        if value is not None:
            metadata[key] = value
    sources = [
        matrix_source(name, shape, functools.partial(get, name)) for name, shape in shapes.items()
    ]
    write_gguf(path, metadata, sources, inputs=inputs)


def read_adapter(
    path: str | Path, base: GGUFFile | None = None, *, check_hash: bool = True
) -> Adapter:
    """Read an adapter and check it, against its base model if that is given.

    Another quantization of the weights that it was trained on is accepted, with a `note`;
    `check_hash=False` accepts any base with the right shapes.

    Raises:
        InputError: not an adapter, no usable alpha or rank, matrices that do not fit each other or
            the base, values that are not finite, or trained on another base.
    """
    file = read_gguf(path)
    _check_kind(file)
    ranks = _check_pairs(file, base)
    alpha = _alpha(file, max(ranks))
    note = None if base is None else check_base(file, base, check_hash=check_hash)
    _check_finite(file)
    rank = file.get("ggft.rank", max(ranks))
    if not isinstance(rank, int) or rank < 1:
        raise InputError("ggft.rank is not a rank", path=file.path, found=repr(rank))
    dropout = file.get("ggft.dropout")
    meta = AdapterMeta(
        architecture=file.architecture,
        rank=rank,
        alpha=alpha,
        dropout=float(dropout) if isinstance(dropout, int | float) else None,
        base_sha256=file.text("ggft.base_sha256"),
        base_name=file.text("general.base_model.0.name"),
        template=file.text("ggft.template"),
        template_sha256=file.text("ggft.template_sha256"),
        template_source=file.text("ggft.template_source"),
        template_arguments=file.text("ggft.template_arguments"),
        base_norms_sha256=file.text("ggft.base_norms_sha256"),
        vocabulary_sha256=file.text("ggft.vocabulary_sha256"),
    )
    return Adapter(path=file.path, meta=meta, tensors=dict(file.tensors), note=note)


def _check_kind(file: GGUFFile) -> None:
    kind, form = file.get("general.type"), file.get("adapter.type")
    if kind != "adapter" or form != "lora":
        raise InputError(
            "not a LoRA adapter",
            path=file.path,
            found=f"general.type {kind!r}, adapter.type {form!r}",
            expected="'adapter' and 'lora'",
            hint="a model goes to --model, an adapter to --adapter",
        )


def _alpha(file: GGUFFile, rank: int) -> float:
    """Return alpha, which llama.cpp reads as FLOAT32 only and takes 0 or nothing for factor 1."""
    key = "adapter.lora.alpha"
    alpha, offset = file.get(key), file.value_offsets.get(key)
    if alpha is None:
        raise InputError(
            f"{key} is missing, and llama.cpp would run the adapter at factor 1",
            path=file.path,
            expected=f"alpha as in training; factor 1 is {rank:.1f}, the rank",
            hint="convert it again from its PEFT folder: ggft convert FOLDER NEW.gguf --base"
            " MODEL.gguf writes alpha",
        )
    if file.types[key] is not ValueType.FLOAT32 or not isinstance(alpha, float):
        raise InputError(
            f"{key} has the wrong type, which makes llama.cpp abort",
            path=file.path,
            offset=offset,
            found=file.types[key].name,
            expected="FLOAT32",
            hint="write the adapter again with the tool that it is from",
        )
    if alpha == 0:
        raise InputError(
            f"{key} is 0, and llama.cpp would run the adapter at factor 1",
            path=file.path,
            offset=offset,
            expected="alpha as in training",
            hint=f"if factor 1 is right, write the rank into it: gguf-set-metadata --force"
            f" {shlex.quote(str(file.path))} {key} {rank}",
        )
    if not math.isfinite(alpha) or alpha < 0:
        raise InputError(
            f"{key} is not usable", path=file.path, offset=offset, found=alpha,
            expected="a finite number above 0",
        )  # fmt: skip
    return alpha


def _check_pairs(file: GGUFFile, base: GGUFFile | None) -> list[int]:
    """Check that matrices come in pairs that fit each other and the base; return the ranks."""
    ranks = []
    for name, tensor in file.tensors.items():
        stem, dot, suffix = name.rpartition(".")
        if suffix not in ("lora_a", "lora_b") or not dot:
            raise _bad(
                tensor, "is not part of a LoRA pair", name, "names ending in .lora_a, .lora_b"
            )
        other = stem + (B_SUFFIX if suffix == "lora_a" else A_SUFFIX)
        if other not in file.tensors:
            raise _bad(tensor, "has no counterpart", "only this one", f"{other} beside it")
        shape = _matrix_shape(tensor)
        if suffix == "lora_b":
            continue
        rank, b_shape = shape[1], _matrix_shape(file.tensors[other])
        if rank < 1 or b_shape[0] != rank:
            raise _bad(
                tensor,
                "has another rank than its counterpart",
                f"{rank} and {b_shape[0]}",
                "one rank",
            )
        ranks.append(rank)
        if base is None:
            continue
        target = base.tensors.get(stem)
        if target is None:
            raise _bad(tensor, "is for a tensor that the base model lacks", stem, "a base tensor")
        wanted = tuple(target.shape[:2])
        if (shape[0], b_shape[1]) != wanted:
            raise _bad(
                tensor, "does not fit the base tensor", f"{(shape[0], b_shape[1])}", f"{wanted}"
            )
    if not ranks:
        raise InputError("the adapter holds no matrices", path=file.path)
    return ranks


def _matrix_shape(tensor: TensorInfo) -> tuple[int, int]:
    """Return ne[0], ne[1] of a matrix."""
    shape = (*tensor.shape, 1, 1)
    if len(tensor.shape) > 4 or any(n != 1 for n in shape[2:]) or 0 in shape:
        raise _bad(tensor, "is not a matrix", f"{tuple(tensor.shape)}", "two dimensions above 0")
    return shape[0], shape[1]


def _check_finite(file: GGUFFile) -> None:
    import numpy as np

    for tensor in file.tensors.values():
        values = dequantize(tensor).reshape(-1, tensor.shape[0])
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            found = f"{values[row, column]} at row {row}, column {column}"
            raise _bad(tensor, "holds a value that is not finite", found, "finite numbers")


def _bad(tensor: TensorInfo, what: str, found: str, expected: str) -> InputError:
    return InputError(
        f"adapter tensor `{tensor.name}` {what}",
        path=tensor.path,
        offset=tensor.header_offset,
        found=found,
        expected=expected,
    )
