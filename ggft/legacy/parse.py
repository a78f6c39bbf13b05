"""Parses one file of an old llama GGML model: hyper-parameters, vocabulary, tensor map.

Every number is checked against the end of the file; what the tensors mean together is checked by
`legacy`.

Source: llama.cpp of March to August 2023, as shipped by llama-cpp-python 0.1.1 to 0.1.78.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ggft.gguf.cursor import Cursor
from ggft.gguf.kinds import GGML_MAGICS, HEAD_BYTES, identify
from ggft.legacy.blocks import Q4_1_PLANAR, BlockLayout, block_layout
from ggft.system.errors import InputError
from ggft.system.files import require_regular_file

ALIGNMENT = 32
MAX_LAYERS = 512
MAX_TOKEN_BYTES = 65536
MAX_NAME_BYTES = 128
MAX_FTYPE = 18
# A llama has 9 in each block, 3 outside; some files also repeat the position frequencies.
MAX_TENSORS_PER_LAYER = 12

HINT_FAMILY = (
    "GPT-J, GPT-NeoX, MPT, Falcon, Whisper and others used the same magic; only llama files "
    "can be converted"
)

_VERSIONS: Mapping[str, tuple[int, ...]] = {"ggmf": (1,), "ggjt": (1, 2, 3)}
_HPARAM_NAMES = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype")
_EMBEDDING = b"tok_embeddings.weight"
# n_dims, name length, type and two dimensions come before a matrix's name.
_MATRIX_HEADER_BYTES = 20
_PROBE_BYTES = 24 << 15


@dataclass(frozen=True)
class LegacyHparams:
    """The seven numbers of the header."""

    n_vocab: int
    n_embd: int
    n_mult: int
    n_head: int
    n_layer: int
    n_rot: int
    ftype: int


@dataclass(frozen=True)
class LegacyToken:
    """A vocabulary entry; `score` is None in the `ggml` container."""

    text: bytes
    score: float | None


@dataclass(frozen=True)
class LegacyTensor:
    """One tensor of one part.

    Attributes:
        shape: In ggml's order.
        offset: Absolute position of the data in `path`, bytes.
        header_offset: Where `path` describes it, bytes.
    """

    name: str
    layout: BlockLayout
    shape: tuple[int, ...]
    path: Path
    offset: int
    header_offset: int

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return self.shape[0] // self.layout.block_size * self.layout.block_bytes

    @property
    def n_rows(self) -> int:
        """Return the number of rows."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def n_bytes(self) -> int:
        """Return the size of the data."""
        return self.row_bytes * self.n_rows


@dataclass(frozen=True)
class LegacyPart:
    """One parsed file; the fields are those of the whole model.

    Attributes:
        tokens_offset: Where the vocabulary starts, bytes.
    """

    path: Path
    container: str
    version: int
    hparams: LegacyHparams
    tokens: tuple[LegacyToken, ...]
    tensors: dict[str, LegacyTensor]
    block_64: bool
    tokens_offset: int


def read_part(path: Path) -> LegacyPart:
    """Read one file; K-quants are tried with 256-element blocks first, then with 64."""
    file_bytes = require_regular_file(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot open the file: {error.strerror}", path=path) from None
    read = partial(os.pread, descriptor)
    try:
        try:
            part = _parse(Cursor(path, file_bytes, read, 1 << 16), block_64=False)
            return _with_planar_rows(part, descriptor)
        except InputError as error:
            try:
                part = _parse(Cursor(path, file_bytes, read, 1 << 16), block_64=True)
            except InputError:
                raise error from None
            if not any(tensor.layout.is_block_64 for tensor in part.tensors.values()):
                raise
            return part
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", path=path) from None
    finally:
        os.close(descriptor)


def _with_planar_rows(part: LegacyPart, descriptor: int) -> LegacyPart:
    """Recognise the first layout of Q4_1, which stands under the same magic as the second.

    In interleaved blocks every block starts with its scale, finite, at least 0 and small. In planar
    rows these places hold minima, mostly negative, and then codes, which are no such numbers.
    """
    if part.container != "ggml":
        return part
    matrices = [t for t in part.tensors.values() if t.layout.name == "Q4_1"]
    probes = b"".join(
        os.pread(descriptor, min(t.n_bytes, _PROBE_BYTES), t.offset) for t in matrices[:4]
    )
    firsts = (first for (first,) in struct.iter_unpack("<f20x", probes[: len(probes) // 24 * 24]))
    if all(0 <= first < 1000 for first in firsts):
        return part
    tensors = {
        name: replace(t, layout=Q4_1_PLANAR) if t in matrices else t
        for name, t in part.tensors.items()
    }
    return replace(part, tensors=tensors)


def _parse(cursor: Cursor, *, block_64: bool) -> LegacyPart:
    """Parse one file front to back."""
    container, version = _parse_magic(cursor)
    hparams = _parse_hparams(cursor)
    tokens_offset = cursor.pos
    tokens = _parse_vocabulary(cursor, hparams.n_vocab, has_scores=container != "ggml")
    tensors: dict[str, LegacyTensor] = {}
    while cursor.pos < cursor.file_bytes:
        tensor = _parse_tensor(cursor, container, version, block_64)
        if tensor.name in tensors:
            raise cursor.fail(
                "tensor stands twice",
                offset=tensor.header_offset,
                found=ascii(tensor.name),
                expected="each tensor once",
            )
        tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS_PER_LAYER * (hparams.n_layer + 2):
            raise cursor.fail(
                "more tensors than a llama has",
                offset=tensor.header_offset,
                found=ascii(tensor.name),
                expected=f"those of {hparams.n_layer} blocks",
                hint=HINT_FAMILY,
            )
        cursor.skip_to(tensor.offset + tensor.n_bytes)
    return LegacyPart(
        cursor.path, container, version, hparams, tokens, tensors, block_64, tokens_offset
    )


def _parse_magic(cursor: Cursor) -> tuple[str, int]:
    """Parse magic and version."""
    head = cursor.take(min(HEAD_BYTES, cursor.file_bytes), "the header")
    cursor.pos = 4
    container = GGML_MAGICS.get(head[:4])
    if container is None:
        kind = identify(head)
        raise cursor.fail(
            "not an old GGML file",
            offset=0,
            found=kind.description,
            expected="the magic ggml, ggmf or ggjt",
            hint="it needs no conversion" if kind.name == "gguf" else kind.hint,
        )
    if container == "ggml":
        return container, 0
    version = cursor.u32("the version")
    if version not in _VERSIONS[container]:
        raise cursor.fail(
            f"unknown version of the {container} container",
            offset=4,
            found=version,
            expected=" or ".join(map(str, _VERSIONS[container])),
        )
    return container, version


def _parse_hparams(cursor: Cursor) -> LegacyHparams:
    """Parse the seven numbers and check them against one another."""
    at = cursor.pos
    values = struct.unpack("<7i", cursor.take(28, "the hyper-parameters"))
    hparams = LegacyHparams(*values)
    limits = {
        "n_vocab": (1, 1 << 20),
        "n_embd": (1, 1 << 20),
        "n_mult": (1, 1 << 20),
        "n_head": (1, 1 << 14),
        "n_layer": (1, MAX_LAYERS),
        "n_rot": (1, 1 << 20),
        "ftype": (0, MAX_FTYPE),
    }
    for i, name in enumerate(_HPARAM_NAMES):
        low, high = limits[name]
        if not low <= values[i] <= high:
            raise cursor.fail(
                f"bad {name}",
                offset=at + 4 * i,
                found=values[i],
                expected=f"{low} to {high}",
                hint=HINT_FAMILY,
            )
    if hparams.n_embd % hparams.n_head or hparams.n_rot != hparams.n_embd // hparams.n_head:
        raise cursor.fail(
            "the hyper-parameters are not a llama's",
            offset=at + 4 * 5,
            found=f"n_rot {hparams.n_rot}",
            expected=f"n_embd / n_head = {hparams.n_embd} / {hparams.n_head}",
            hint=HINT_FAMILY,
        )
    return hparams


def _parse_vocabulary(cursor: Cursor, n_vocab: int, *, has_scores: bool) -> tuple[LegacyToken, ...]:
    """Parse the vocabulary records."""
    tokens = []
    least = 8 if has_scores else 4
    left = cursor.file_bytes - cursor.pos
    # One record may be missing, see _starts_tensors.
    if (n_vocab - 1) * least > left:
        raise cursor.fail(
            "the vocabulary exceeds the file",
            found=f"n_vocab {n_vocab}",
            expected=f"≤ {left // least} in the {left} bytes left",
            hint=HINT_FAMILY,
        )
    for i in range(n_vocab):
        if i == n_vocab - 1 and _starts_tensors(cursor):
            break
        at = cursor.pos
        length = cursor.u32(f"the length of token {i}")
        if length > MAX_TOKEN_BYTES:
            raise cursor.fail(
                f"token {i} is too long",
                offset=at,
                found=f"{struct.unpack('<i', struct.pack('<I', length))[0]} bytes",
                expected=f"0 to {MAX_TOKEN_BYTES}",
                hint=HINT_FAMILY,
            )
        text = cursor.take(length, f"token {i}")
        score = None
        if has_scores:
            (score,) = struct.unpack("<f", cursor.take(4, f"the score of token {i}"))
        tokens.append(LegacyToken(text, score))
    return tuple(tokens)


def _starts_tensors(cursor: Cursor) -> bool:
    """Say whether the tensors start here: GPT4All's files count one token more than they store."""
    end = cursor.pos + _MATRIX_HEADER_BYTES + len(_EMBEDDING)
    if end > cursor.file_bytes:
        return False
    at = cursor.pos
    head = cursor.take(end - at, "the first tensor")
    cursor.pos = at
    return head[_MATRIX_HEADER_BYTES:] == _EMBEDDING


def _parse_tensor(cursor: Cursor, container: str, version: int, block_64: bool) -> LegacyTensor:
    """Parse a tensor's header and check that its data lies within the file."""
    at = cursor.pos
    n_dims, name_bytes, type_number = struct.unpack("<3I", cursor.take(12, "a tensor's header"))
    for what, offset, value, high in (
        ("number of dimensions", at, n_dims, 2),
        ("length of a tensor's name", at + 4, name_bytes, MAX_NAME_BYTES),
    ):
        if not 1 <= value <= high:
            raise cursor.fail(f"bad {what}", offset=offset, found=value, expected=f"1 to {high}")
    shape = struct.unpack(f"<{n_dims}i", cursor.take(4 * n_dims, "a tensor's dimensions"))
    raw = cursor.take(name_bytes, "a tensor's name")
    if not re.fullmatch(rb"[\x20-\x7e]+", raw):
        raise cursor.fail(
            "bad tensor name", offset=cursor.pos - name_bytes, found=ascii(raw), expected="text"
        )
    name = raw.decode("ascii")
    layout = block_layout(type_number, container, version, block_64)
    if layout is None:
        raise cursor.fail(
            f"unknown type of tensor {name!a}",
            offset=at + 8,
            found=type_number,
            expected=f"a type of {container} {version or ''}".rstrip(),
        )
    if min(shape) < 1 or shape[0] % layout.block_size:
        raise cursor.fail(
            f"bad dimensions of {name!a}",
            offset=at + 12,
            found=" × ".join(map(str, shape)),
            expected=f"positive, rows of whole {layout.block_size}-element blocks",
        )
    if container == "ggjt":
        padding = cursor.take(-cursor.pos % ALIGNMENT, f"the padding before {name!a}")
        if any(padding):
            raise cursor.fail(
                f"wrong padding before the data of {name!a}",
                offset=cursor.pos - len(padding),
                found=padding.hex(" "),
                expected=f"zeros up to a multiple of {ALIGNMENT}",
            )
    tensor = LegacyTensor(name, layout, shape, cursor.path, cursor.pos, at)
    if tensor.n_bytes > cursor.file_bytes - cursor.pos:
        raise cursor.fail(
            f"tensor {name!a} reaches past the end of the file",
            found=f"{cursor.file_bytes - cursor.pos} bytes left",
            expected=f"{tensor.n_bytes} bytes",
            hint="the file is cut off or damaged; download it again",
        )
    return tensor
