"""The old GGML files of tests/data/legacy, and tiny ones built byte by byte."""

from __future__ import annotations

import functools
import json
import lzma
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "legacy"
MANIFEST: dict[str, Any] = json.loads((DATA / "manifest.json").read_text())
NAMES = tuple(MANIFEST["files"])
MAGICS = {"ggml": b"lmgg", "ggmf": b"fmgg", "ggjt": b"tjgg"}


@functools.cache
def content(file_name: str) -> bytes:
    """Return a packed file's bytes."""
    return lzma.decompress((DATA / f"{file_name}.xz").read_bytes())


def place(folder: Path, name: str) -> Path:
    """Unpack a model, with all its parts, into a folder; return the first file."""
    for packed in DATA.glob(f"{name}.bin*.xz"):
        (folder / packed.stem).write_bytes(content(packed.stem))
    return folder / f"{name}.bin"


def token(text: bytes, score: float | None) -> bytes:
    """Return a vocabulary record."""
    return (
        struct.pack("<I", len(text)) + text + (b"" if score is None else struct.pack("<f", score))
    )


@dataclass
class RawGGML:
    """A one-block llama of F32 tensors: n_embd 8, n_ff 16, 2 heads; each piece can be replaced."""

    container: str = "ggjt"
    version: int = 3
    hparams: dict[str, int] = field(default_factory=dict)
    tokens: list[bytes] | None = None
    scores: list[float] | None = None
    drop: tuple[str, ...] = ()
    extra: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    padding: bytes = b"\0"
    stored_tokens: int | None = None

    def vocabulary(self) -> list[bytes]:
        """Return the texts as old files store them."""
        if self.tokens is not None:
            return self.tokens
        return [" ⁇ ".encode(), b"", b"", *(bytes([i]) for i in range(256)), b" ", b"a", b" a"]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return shape and type of the tensors."""
        n_vocab = self.hparams.get("n_vocab", len(self.vocabulary()))
        shapes: dict[str, tuple[tuple[int, ...], int]] = {
            "tok_embeddings.weight": ((8, n_vocab), 0),
            "norm.weight": ((8,), 0),
            "output.weight": ((8, n_vocab), 0),
            "layers.0.attention_norm.weight": ((8,), 0),
            "layers.0.attention.wq.weight": ((8, 8), 0),
            "layers.0.attention.wk.weight": ((8, 8), 0),
            "layers.0.attention.wv.weight": ((8, 8), 0),
            "layers.0.attention.wo.weight": ((8, 8), 0),
            "layers.0.ffn_norm.weight": ((8,), 0),
            "layers.0.feed_forward.w1.weight": ((8, 16), 0),
            "layers.0.feed_forward.w2.weight": ((16, 8), 0),
            "layers.0.feed_forward.w3.weight": ((8, 16), 0),
        }
        shapes |= self.extra
        return {name: shape for name, shape in shapes.items() if name not in self.drop}

    def bytes(self) -> bytes:
        """Return the file."""
        texts = self.vocabulary()
        hparams = {
            "n_vocab": len(texts), "n_embd": 8, "n_mult": 16, "n_head": 2, "n_layer": 1,
            "n_rot": 4, "ftype": 0, **self.hparams,
        }  # fmt: skip
        out = MAGICS[self.container]
        if self.container != "ggml":
            out += struct.pack("<I", self.version)
        out += struct.pack("<7i", *hparams.values())
        for i, raw in enumerate(texts[: self.stored_tokens]):
            score = float(min(0, 259 - i)) if self.scores is None else self.scores[i]
            out += token(raw, None if self.container == "ggml" else score)
        for name, (dims, number) in self.shapes().items():
            out += struct.pack("<3I", len(dims), len(name), number)
            out += struct.pack(f"<{len(dims)}i", *dims) + name.encode()
            if self.container == "ggjt":
                out += self.padding * (-len(out) % 32)
            n_elements = 1
            for size in dims:
                n_elements *= size
            out += struct.pack("<f", 0.5) * n_elements
        return out
