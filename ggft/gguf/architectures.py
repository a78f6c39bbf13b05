"""The architectures that ggft can train, as data: which tensors a model consists of.

Source: the loading code of the pinned llama.cpp (src/models/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ggft.gguf.linears import SHAPES


@dataclass(frozen=True)
class ArchitectureTraits:
    """What is particular to an architecture.

    Attributes:
        families: Models that use it, for messages.
        rope: "normal" rotates neighbouring pairs, "neox" halves.
        block: Name → shape of each tensor of a block, in letters: C n_embd, F n_ff, Q n_head times
            head size, K n_head_kv times head size, H head size; in ggml's order.
        model: The same for tensors outside the blocks; V is n_vocab, D half the head size.
        block_optional: Tensors of a block that may be missing.
        model_optional: Tensors outside the blocks that may be missing.
    """

    families: str
    rope: str
    block: Mapping[str, str]
    model: Mapping[str, str]
    block_optional: Mapping[str, str]
    model_optional: Mapping[str, str]


_BLOCK = {
    "attn_norm.weight": "C",
    "ffn_norm.weight": "C",
    **{f"{name}.weight": shape for name, shape in SHAPES.items()},
}
_MODEL = {"token_embd.weight": "CV", "output_norm.weight": "C"}
_QKV_BIASES = {"attn_q.bias": "Q", "attn_k.bias": "K", "attn_v.bias": "K"}

ARCHITECTURES: Mapping[str, ArchitectureTraits] = {
    "llama": ArchitectureTraits(
        families="Llama 1/2/3, Mistral, TinyLlama, SmolLM2",
        rope="normal",
        block=_BLOCK,
        model=_MODEL,
        block_optional={
            **_QKV_BIASES,
            "attn_output.bias": "C",
            "ffn_gate.bias": "F",
            "ffn_up.bias": "F",
            "ffn_down.bias": "C",
        },
        model_optional={"output.weight": "CV", "rope_freqs.weight": "D"},
    ),
    "qwen2": ArchitectureTraits(
        families="Qwen2, Qwen2.5",
        rope="neox",
        block=_BLOCK,
        model=_MODEL,
        block_optional=_QKV_BIASES,
        model_optional={"output.weight": "CV"},
    ),
    "qwen3": ArchitectureTraits(
        families="Qwen3",
        rope="neox",
        block={**_BLOCK, "attn_q_norm.weight": "H", "attn_k_norm.weight": "H"},
        model=_MODEL,
        block_optional=_QKV_BIASES,
        model_optional={"output.weight": "CV"},
    ),
}
SUPPORTED_ARCHITECTURES = tuple(ARCHITECTURES)
