"""GGUF files built byte by byte, so that any single byte of them can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ggft.system.errors import InputError

ALIGNMENT = 32


def refused(path: Path, check: Callable[[Path], Any]) -> InputError:
    """Return the error of `check(path)`; it must name the file and a place or what was found."""
    with pytest.raises(InputError) as caught:
        check(path)
    error = caught.value
    assert error.exit_code == 2
    assert error.path is not None
    assert error.found is not None or error.expected is not None
    assert "\x1b" not in str(error)
    return error


def string(text: str | bytes) -> bytes:
    """Return a length and the bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    """Return a metadata entry."""
    return string(key) + struct.pack("<I", value_type) + payload


def u32(key: str, value: int) -> bytes:
    """Return an UINT32 entry."""
    return kv(key, 4, struct.pack("<I", value))


def f32(key: str, value: float) -> bytes:
    """Return a FLOAT32 entry."""
    return kv(key, 6, struct.pack("<f", value))


def text(key: str, value: str | bytes) -> bytes:
    """Return a STRING entry."""
    return kv(key, 8, string(value))


def strings(key: str, values: list[str]) -> bytes:
    """Return an array of strings."""
    return kv(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(string, values)))


def numbers(key: str, value_type: int, code: str, values: list[float]) -> bytes:
    """Return an array of numbers."""
    head = struct.pack("<IQ", value_type, len(values))
    return kv(key, 9, head + struct.pack(f"<{len(values)}{code}", *values))


def tensor(
    name: str | bytes,
    dims: tuple[int, ...],
    tensor_type: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    """Return a tensor entry."""
    count = len(dims) if n_dims is None else n_dims
    return (
        string(name)
        + struct.pack("<I", count)
        + struct.pack(f"<{len(dims)}q", *dims)
        + struct.pack("<IQ", tensor_type, offset & 0xFFFFFFFFFFFFFFFF)
    )


@dataclass
class RawGGUF:
    """The pieces of a file; counts follow from them unless given."""

    kvs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    n_kv: int | None = None
    n_tensors: int | None = None
    alignment: int = ALIGNMENT

    def header(self) -> bytes:
        """Return everything before the data, unpadded."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(self.kvs) if self.n_kv is None else self.n_kv
        counts = struct.pack("<IQQ", self.version, n_tensors, n_kv)
        return self.magic + counts + b"".join(self.kvs) + b"".join(self.tensors)

    def bytes(self) -> bytes:
        """Return the file."""
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def model(**changes: Any) -> RawGGUF:
    """Return a one-block llama that `check_model` accepts; `changes` replace or drop entries.

    Keys: C n_embd 8, F n_ff 16, 2 heads, 1 key/value head, 6 tokens. A change named like a key
    (dots as `__`) replaces the entry's bytes; None drops it. `tensors` maps names to (dims, type).
    """
    entries: dict[str, bytes | None] = {
        "general.architecture": text("general.architecture", "llama"),
        "llama.block_count": u32("llama.block_count", 1),
        "llama.embedding_length": u32("llama.embedding_length", 8),
        "llama.feed_forward_length": u32("llama.feed_forward_length", 16),
        "llama.context_length": u32("llama.context_length", 64),
        "llama.attention.head_count": u32("llama.attention.head_count", 2),
        "llama.attention.head_count_kv": u32("llama.attention.head_count_kv", 1),
        "llama.attention.layer_norm_rms_epsilon": f32(
            "llama.attention.layer_norm_rms_epsilon", 1e-5
        ),
        "tokenizer.ggml.model": text("tokenizer.ggml.model", "llama"),
        "tokenizer.ggml.tokens": strings(
            "tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<0x0A>", "▁a", "b"]
        ),
        "tokenizer.ggml.scores": numbers("tokenizer.ggml.scores", 6, "f", [0.0] * 6),
        "tokenizer.ggml.token_type": numbers(
            "tokenizer.ggml.token_type", 5, "i", [2, 3, 3, 6, 1, 1]
        ),
        "tokenizer.ggml.eos_token_id": u32("tokenizer.ggml.eos_token_id", 2),
    }
    shapes: dict[str, tuple[tuple[int, ...], int] | None] = {
        "token_embd.weight": ((8, 6), 0),
        "output_norm.weight": ((8,), 0),
        "blk.0.attn_norm.weight": ((8,), 0),
        "blk.0.attn_q.weight": ((8, 8), 0),
        "blk.0.attn_k.weight": ((8, 4), 0),
        "blk.0.attn_v.weight": ((8, 4), 0),
        "blk.0.attn_output.weight": ((8, 8), 0),
        "blk.0.ffn_norm.weight": ((8,), 0),
        "blk.0.ffn_gate.weight": ((8, 16), 0),
        "blk.0.ffn_up.weight": ((8, 16), 0),
        "blk.0.ffn_down.weight": ((16, 8), 0),
    }
    for name, change in changes.items():
        if name == "tensors":
            shapes |= change
        else:
            entries[name.replace("__", ".")] = change
    sizes = {0: 4, 1: 2, 24: 1}
    infos, data = [], b""
    for tensor_name, entry in shapes.items():
        if entry is None:
            continue
        dims, tensor_type = entry
        infos.append(tensor(tensor_name, dims, tensor_type, len(data)))
        n_elements = 1
        for size in dims:
            n_elements *= size
        data += b"\0" * (n_elements * sizes[tensor_type])
        data += bytes(-len(data) % ALIGNMENT)
    return RawGGUF([e for e in entries.values() if e is not None], infos, data)
