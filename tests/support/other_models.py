"""Random tiny models of architectures that only llama.cpp's own graph covers.

Each entry brings what the trained path of some family has besides the Llama decoder's: windows and
post-norms, fused matrices, factors of the residual stream, LayerNorm with biases and an ungated
GELU, soft-capped attention and logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.blocks import quantize
from tests.support.models import Tensor, vocabulary, write_gguf

N_LAYER, C, H, K, D, F, N_CTX, WINDOW = 3, 64, 4, 2, 16, 96, 512, 8
Q, KV = H * D, K * D

Shapes = dict[str, tuple[int, ...]]

_GATED: Shapes = {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
_QKV: Shapes = {"attn_q": (Q, C), "attn_k": (KV, C), "attn_v": (KV, C), "attn_output": (C, Q)}
_NORMS: Shapes = {"attn_norm": (C,), "ffn_norm": (C,)}
_POST: Shapes = {"post_attention_norm": (C,), "post_ffw_norm": (C,)}


@dataclass(frozen=True)
class Other:
    """What a model consists of.

    Attributes:
        block: Shape of each weight of a block, NumPy order.
        keys: Metadata of the architecture, without its prefix.
        tied: There is no output matrix.
        biases: Tensors of a block, and outside, that have a bias.
        outside: Weights outside the blocks, besides embedding, norm and output.
    """

    block: Shapes
    keys: dict[str, Any]
    tied: bool = False
    biases: tuple[str, ...] = ()
    outside: Callable[[int], Shapes] = lambda _: {}


_RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
_LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
_WINDOWED = {"attention.sliding_window": WINDOW}

OTHERS = {
    "gemma2": Other(
        {**_NORMS, **_QKV, **_GATED, **_POST},
        {**_RMS, **_WINDOWED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
        tied=True,
    ),
    "gemma3": Other(
        {**_NORMS, **_QKV, **_GATED, **_POST, "attn_q_norm": (D,), "attn_k_norm": (D,)},
        {**_RMS, **_WINDOWED},
        tied=True,
    ),
    "phi3": Other(
        {
            **_NORMS,
            "attn_qkv": (Q + 2 * KV, C),
            "attn_output": (C, Q),
            "ffn_up": (2 * F, C),
            "ffn_down": (C, F),
        },
        {**_RMS, "rope.scaling.original_context_length": N_CTX},
    ),
    "granite": Other(
        {**_NORMS, **_QKV, **_GATED},
        {
            **_RMS,
            "embedding_scale": 3.0,
            "residual_scale": 0.5,
            "logit_scale": 2.0,
            "attention.scale": 0.2,
        },
    ),
    "gpt2": Other(
        {
            **_NORMS,
            "attn_qkv": (3 * Q, C),
            "attn_output": (C, Q),
            "ffn_up": (F, C),
            "ffn_down": (C, F),
        },
        {**_LAYER_NORM, "attention.head_count_kv": H},
        biases=(
            "attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down",
            "output_norm",
        ),
        outside=lambda n_ctx: {"position_embd": (n_ctx, C)},
    ),
}  # fmt: skip


def write_other(path: Path, arch: str, type_name: str = "F32", seed: int = 0) -> int:
    """Write a model with matrices of blocks of `type_name`; return its vocabulary's size."""
    other, rng = OTHERS[arch], np.random.default_rng(seed)
    vocab = vocabulary("bpe")
    n_vocab = len(vocab["tokenizer.ggml.tokens"])
    keys = {
        "block_count": N_LAYER, "context_length": N_CTX, "embedding_length": C,
        "feed_forward_length": F, "attention.head_count": H, "attention.head_count_kv": K,
        "attention.key_length": D, "attention.value_length": D, "rope.dimension_count": D,
        **other.keys,
    }  # fmt: skip
    metadata = {"general.architecture": arch, "general.name": "random", "general.alignment": 32}
    metadata |= {f"{arch}.{key}": value for key, value in keys.items()} | vocab
    shapes: Shapes = {"token_embd": (n_vocab, C), "output_norm": (C,), **other.outside(N_CTX)}
    if not other.tied:
        shapes["output"] = (n_vocab, C)
    for i in range(N_LAYER):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in other.block.items()}
    tensors = []
    for name, shape in shapes.items():
        if len(shape) == 1:
            values, kind = 1 + 0.2 * rng.normal(size=shape), "F32"
        else:
            values = rng.normal(size=shape) / math.sqrt(shape[1])
            kind = type_name if name.startswith("blk.") else "F32"
        tensors.append(Tensor(f"{name}.weight", kind, shape, quantize(np.atleast_2d(values), kind)))
        if name.rpartition(".")[2] in other.biases:
            bias = 0.3 * rng.normal(size=shape[:1])
            data = quantize(np.atleast_2d(bias), "F32")
            tensors.append(Tensor(f"{name}.bias", "F32", shape[:1], data))
    write_gguf(path, metadata, tensors)
    return n_vocab
