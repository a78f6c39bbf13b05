"""Says what a file is by its first bytes, so that a refusal can name what was found instead."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ggft.system.files import _HINT_PEFT

HEAD_BYTES = 512

GGUF_MAGIC = b"GGUF"
GGML_MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: One word for programs.
        description: For people, with its article.
        hint: What to do about it.
    """

    name: str
    description: str
    hint: str | None = None


_HINT_DOWNLOAD = "the download did not give the model itself; download it again"
_HINT_TORCH = "ggft never unpickles; take a GGUF of this model, or convert it with llama.cpp"


_BY_PREFIX: tuple[tuple[bytes, FileKind], ...] = (
    (GGUF_MAGIC, FileKind("gguf", "a GGUF file")),
    (b"FUGG", FileKind("gguf-reversed", "a GGUF magic written backwards")),
    (b"algg", FileKind("ggla", "an old GGML LoRA adapter (ggla)", "train it again with ggft")),
    (b"nsgg", FileKind("session", "a llama.cpp session file")),
    (
        b"version https://git-lfs",
        FileKind("lfs-pointer", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    ),
    (b"PK\x03\x04", FileKind("zip", "a zip archive, as PyTorch checkpoints are", _HINT_TORCH)),
    (b"\x1f\x8b", FileKind("gzip", "gzip-compressed data", "unpack it first: gunzip")),
    (b"7z\xbc\xaf\x27\x1c", FileKind("7z", "a 7-Zip archive", "unpack it first")),
    (b"\x28\xb5\x2f\xfd", FileKind("zstd", "zstd-compressed data", "unpack it first")),
    (b"%PDF", FileKind("pdf", "a PDF document")),
    (b"\x93NUMPY", FileKind("npy", "a NumPy array")),
    (b"\x7fELF", FileKind("elf", "a program")),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\x8a}\]c(.]")
_HTML = re.compile(rb"\s*(<!doctype html|<html|<\?xml|<head)", re.IGNORECASE)


def identify(head: bytes) -> FileKind:
    """Say what a file is from its first HEAD_BYTES bytes."""
    if not head:
        return FileKind("empty", "an empty file", _HINT_DOWNLOAD)
    if head[:4] in GGML_MAGICS:
        container = GGML_MAGICS[head[:4]]
        return FileKind(
            container, f"an old GGML file ({container})", "convert it first: ggft convert"
        )
    for prefix, kind in _BY_PREFIX:
        if head.startswith(prefix):
            return kind
    if _PICKLE.match(head):
        return FileKind("pickle", "a Python pickle, as PyTorch checkpoints are", _HINT_TORCH)
    if _HTML.match(head):
        return FileKind("html", "an HTML page", _HINT_DOWNLOAD)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return FileKind(
            "safetensors", "a safetensors file", f"take a GGUF of this model; {_HINT_PEFT}"
        )
    if head.lstrip()[:1] in (b"{", b"["):
        return FileKind("json", "JSON text", "a model file is needed here")
    if not any(head):
        return FileKind("zeros", "zero bytes", _HINT_DOWNLOAD)
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return FileKind("text", f"text that starts with {_printable(head[:24])}")
    return FileKind("unknown", f"bytes {head[:4].hex(' ')} ({_printable(head[:4])})")


def _printable(data: bytes) -> str:
    return repr(data.decode("ascii", "backslashreplace").replace("\\\\", "\\"))
