"""Random tiny GGUFs of any supported architecture and tensor type, with a small real vocabulary.

`write_model` returns the path with the float64 weights *as stored* (quantized, then dequantized),
so that `tests.support.reference` and the engine start from the same numbers. The writer is
deliberately not ggft's own: it is the independent side of the file tests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggft.gguf.architectures import ARCHITECTURES
from tests.support.blocks import TYPES, dequantize, quantize, random_blocks
from tests.support.reference import LINEARS, Array, Decoder, Lora, Rope, Shape

ALIGNMENT = 32
UNUSED = 5  # token type of a filler
SLOW_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""Seconds to quantize, so that their blocks are random instead."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:!?", "▁t", "he", "▁the", "in", "er", "▁a", "▁s", "on"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "Ġ a", "Ġ s", "o n", "r e", "Ġ w", "o r", "l d"]


# ---- a GGUF writer --------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor to write; `shape` in NumPy order (rows, columns)."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: bytes


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Any) -> bytes:
    """Return type and payload: bool, int (u32), float (f32), str, or a list of one of these.

    A np.float64 is written as one, bytes as a text that need not be UTF-8.
    """
    if isinstance(value, np.float64):
        return struct.pack("<Id", 12, value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value[0], str | bytes):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
    return struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{code}", *value)


def gguf_head(
    metadata: Mapping[str, Any], infos: Iterable[tuple[str, str, tuple[int, ...], int]]
) -> bytes:
    """Return everything before the data of a GGUF v3. Source: ggml's docs/gguf.md.

    Args:
        metadata: Keys and values.
        infos: Name, type, shape in NumPy order and bytes of each tensor; the data follow in this
            order, each padded to the alignment.
    """
    infos = list(infos)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(metadata))
    head += b"".join(_string(key) + value_bytes(value) for key, value in metadata.items())
    offset = 0
    for name, type_name, shape, n_bytes in infos:
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", TYPES[type_name].number, offset)
        offset += n_bytes + -n_bytes % ALIGNMENT
    return head + bytes(-len(head) % ALIGNMENT)


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[Tensor]) -> None:
    """Write a whole GGUF."""
    tensors = list(tensors)
    infos = [(t.name, t.type_name, t.shape, len(t.data)) for t in tensors]
    with path.open("wb") as file:
        file.write(gguf_head(metadata, infos))
        for t in tensors:
            file.write(t.data + bytes(-len(t.data) % ALIGNMENT))


# ---- the tiny model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What to write.

    Args:
        arch: Architecture, as llama.cpp calls it.
        types: Base type of all matrices, or of some by the short name of a tensor (`attn_q`,
            `token_embd`, `output`; `*` for the rest). None picks sizes for `type_name`.
        head_size: D; None is n_embd / n_head.
        rope_freqs: Add a `rope_freqs.weight` as Llama 3 has.
        rope_scaling: Linear position factor (2 halves the positions); 1 is none.
        bias: Biases on all seven linears.
        qkv_bias: Biases on the first three, as Qwen2 has.
        vocab: "spm" or "bpe".
        chat_template: Jinja text, or None for no template.
    """

    arch: str = "llama"
    types: str | Mapping[str, str] = "F32"
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int | None = None
    n_ff: int = 96
    n_ctx: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: float = 1.0
    rope_freqs: bool = False
    tied: bool = False
    bias: bool = False
    qkv_bias: bool = False
    vocab: str = "bpe"
    chat_template: str | None = None
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def type_of(self, tensor: str) -> str:
        """Return the type of a tensor by its full name (`blk.0.attn_q.weight`)."""
        if isinstance(self.types, str):
            return self.types
        short = tensor.removesuffix(".weight").split(".")[-1]
        return self.types.get(short, self.types.get("*", "F32"))

    @property
    def d(self) -> int:
        """Head size."""
        return self.head_size or self.n_embd // self.n_head


KINDS = {
    "gqa": Spec(),
    "bias": Spec(bias=True),
    "llama 3": Spec(rope_freqs=True, rope_base=500000.0, rope_scaling=2.0),
    "qwen2": Spec(arch="qwen2", qkv_bias=True),
    "qwen3": Spec(arch="qwen3", head_size=32, tied=True),
    "mixed types": Spec(
        types={
            "attn_q": "Q4_0",
            "attn_k": "Q8_0",
            "attn_v": "F16",
            "attn_output": "Q5_1",
            "ffn_gate": "Q4_1",
            "ffn_up": "BF16",
            "ffn_down": "IQ4_NL",
            "token_embd": "Q5_0",
            "output": "Q8_0",
        }
    ),
}
"""What every device's gradients are tested on."""


def spec_for(type_name: str, **changes: Any) -> Spec:
    """Return the smallest Spec whose rows are whole blocks of `type_name`."""
    sizes: dict[str, Any] = {"types": type_name}
    if TYPES[type_name].block > 32:
        sizes |= {"n_embd": 256, "n_ff": 256}
    return Spec(**{**sizes, **changes})


@dataclass(frozen=True)
class Tiny:
    """A written model and its float64 weights."""

    path: Path
    spec: Spec
    shape: Shape
    weights: dict[str, Array]

    def decoder(self, lora: dict[str, Lora] | None = None) -> Decoder:
        """Return the reference decoder of this model."""
        return Decoder(self.shape, self.weights, lora or {})


def vocabulary(kind: str) -> dict[str, Any]:
    """Return tokenizer metadata: every byte, a few letters and merges, the special tokens."""
    if kind == "spm":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
        }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = [m.replace(" ", "") for m in MERGES]
    tokens = special + [byte_symbol(i) for i in range(256)] + merged
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def byte_symbol(byte: int) -> str:
    """Return GPT-2's printable stand-in of a byte. Source: GPT-2, encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def matrix_shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """Return (C_out, C_in) of the seven linears."""
    q, kv = spec.n_head * spec.d, spec.n_head_kv * spec.d
    c, f = spec.n_embd, spec.n_ff
    return dict(
        zip(LINEARS, [(q, c), (kv, c), (kv, c), (c, q), (f, c), (f, c), (c, f)], strict=True)
    )


def _random_weights(spec: Spec, n_vocab: int) -> dict[str, Array]:
    """Return float32-scale weights whose activations and logits are O(1)."""
    rng = np.random.default_rng(spec.seed)
    weights = {"token_embd.weight": rng.normal(size=(n_vocab, spec.n_embd))}
    norms = ["output_norm"]
    for i in range(spec.n_layer):
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
        if spec.arch == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                weights[f"blk.{i}.{name}.weight"] = 1 + 0.2 * rng.normal(size=spec.d)
        for name, (n_out, n_in) in matrix_shapes(spec).items():
            weights[f"blk.{i}.{name}.weight"] = rng.normal(size=(n_out, n_in)) / math.sqrt(n_in)
            if spec.bias or (spec.qkv_bias and name in LINEARS[:3]):
                weights[f"blk.{i}.{name}.bias"] = 0.3 * rng.normal(size=n_out)
    scale = 1 / math.sqrt(spec.n_embd) if spec.tied else 1.0
    for name in norms:
        # A tied output sees O(1) embeddings: its norm is scaled so that logits stay O(1), too.
        size = scale if name == "output_norm" else 1.0
        weights[f"{name}.weight"] = size * (1 + 0.2 * rng.normal(size=spec.n_embd))
    if not spec.tied:
        shape = (n_vocab, spec.n_embd)
        weights["output.weight"] = rng.normal(size=shape) / math.sqrt(spec.n_embd)
    if spec.rope_freqs:
        weights["rope_freqs.weight"] = rng.uniform(1, 8, size=spec.d // 2)
    return weights


def model_metadata(spec: Spec, n_vocab: int | None = None) -> dict[str, Any]:
    """Return the metadata of a model, its vocabulary filled up to `n_vocab` tokens."""
    vocab = vocabulary(spec.vocab)
    tokens = vocab["tokenizer.ggml.tokens"]
    n_fill = (n_vocab or len(tokens)) - len(tokens)
    fill = {"tokens": [f"[{i}]" for i in range(n_fill)], "scores": [-1e4] * n_fill}
    for key, values in {**fill, "token_type": [UNUSED] * n_fill}.items():
        if f"tokenizer.ggml.{key}" in vocab:
            vocab[f"tokenizer.ggml.{key}"] = vocab[f"tokenizer.ggml.{key}"] + values
    metadata = {
        "general.architecture": spec.arch,
        "general.name": "random",
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
        f"{spec.arch}.block_count": spec.n_layer,
        f"{spec.arch}.context_length": spec.n_ctx,
        f"{spec.arch}.embedding_length": spec.n_embd,
        f"{spec.arch}.feed_forward_length": spec.n_ff,
        f"{spec.arch}.attention.head_count": spec.n_head,
        f"{spec.arch}.attention.head_count_kv": spec.n_head_kv,
        f"{spec.arch}.attention.key_length": spec.d,
        f"{spec.arch}.attention.value_length": spec.d,
        f"{spec.arch}.attention.layer_norm_rms_epsilon": spec.eps,
        f"{spec.arch}.rope.dimension_count": spec.d,
        f"{spec.arch}.rope.freq_base": spec.rope_base,
        f"{spec.arch}.vocab_size": len(tokens) + n_fill,
        **vocab,
    }
    if spec.rope_scaling != 1.0:
        metadata[f"{spec.arch}.rope.scaling.type"] = "linear"
        metadata[f"{spec.arch}.rope.scaling.factor"] = spec.rope_scaling
    if spec.chat_template is not None:
        metadata["tokenizer.chat_template"] = spec.chat_template
    return {**metadata, **spec.extra}


def write_model(path: Path, spec: Spec | None = None) -> Tiny:
    """Write a random model to `path`; return it with the weights as stored."""
    spec = spec or Spec()
    metadata = model_metadata(spec)
    n_vocab = metadata[f"{spec.arch}.vocab_size"]
    tensors: list[Tensor] = []
    stored: dict[str, Array] = {}
    for name, values in _random_weights(spec, n_vocab).items():
        type_name = spec.type_of(name) if values.ndim == 2 else "F32"
        if type_name in SLOW_TYPES:
            rng = np.random.default_rng(len(tensors))
            data = random_blocks(rng, type_name, values.size, float(values.std()))
        else:
            data = quantize(np.atleast_2d(values), type_name)
        tensors.append(Tensor(name, type_name, values.shape, data))
        stored[name] = dequantize(data, type_name, values.shape)
    write_gguf(path, metadata, tensors)
    factors = stored.get("rope_freqs.weight")
    neox = ARCHITECTURES[spec.arch].rope == "neox"
    rope = Rope(spec.d, spec.rope_base, 1 / spec.rope_scaling, factors, neox)
    eps = float(np.float32(spec.eps))
    shape = Shape(spec.n_layer, spec.n_head, spec.n_head_kv, n_vocab, rope, eps)
    return Tiny(path, spec, shape, stored)
