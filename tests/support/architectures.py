"""Tiny random models of every architecture of the installed llama.cpp, made by llama.cpp itself.

`llama_model_init_from_user` asks for each tensor that an architecture wants, given the metadata;
what it is given here is recorded, and written as a GGUF of any tensor type. So a new architecture
needs metadata and nothing else. Source of the metadata: the keys that llama.cpp's loaders read
(src/models/), with the sizes that tests need.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from tests.support.blocks import TYPES, GgufInit, ggml_base, quantize
from tests.support.models import Tensor, gguf_head, vocabulary, write_gguf

DENSE = (
    "llama", "deci", "falcon", "gpt2", "gptneox", "mpt", "baichuan", "starcoder", "refact",
    "bloom", "stablelm", "qwen", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "phi2", "phi3",
    "plamo", "plamo3", "codeshell", "orion", "internlm2", "minicpm", "minicpm3", "gemma",
    "gemma2", "gemma3", "starcoder2", "xverse", "command-r", "cohere2", "olmo", "olmo2",
    "muse-glimmer", "openelm", "chatglm", "glm4", "bitnet", "jais", "jais2", "nemotron",
    "exaone", "exaone4", "granite", "granite_swa", "arcee", "hunyuan-dense", "hunyuan_vl",
    "smollm3", "seed_oss", "apertus", "cogvlm", "pangu-embedded", "mistral3", "maincoder",
    "talkie", "nanbeige", "ernie4_5", "spark2_5", "paddleocr",
)  # fmt: skip
EXPERTS = (
    "llama4", "grok", "qwen2moe", "qwen3moe", "qwen3vlmoe", "phimoe", "dbrx", "olmoe",
    "arctic", "deepseek", "deepseek2", "glm4moe", "exaone-moe", "granitemoe", "bailingmoe",
    "bailingmoe2", "dots1", "afmoe", "laguna", "ernie4_5-moe", "hunyuan-moe", "hy_v3",
    "gpt-oss", "smallthinker", "grovemoe", "minimax-m2", "mimo2", "step35", "mistral4",
    "mellum", "cohere2moe", "maple",
)  # fmt: skip
RECURRENT = (
    "qwen3next", "qwen35", "qwen35moe", "plamo2", "gemma3n", "mamba", "mamba2", "jamba",
    "falcon-h1", "nemotron_h", "nemotron_h_moe", "granitehybrid", "lfm2", "lfm2moe",
    "kimi-linear",
)  # fmt: skip
ARCHITECTURES = (*DENSE, *EXPERTS, *RECURRENT)
# See every token of a text at once: nothing to predict from what came before.
NOT_CAUSAL = ("dream", "llada", "llama-embed", "gemma-embedding", "eurobert")
# Of these no tiny model is made: encoders and parts of other models, and what wants more metadata.
UNTRIED = (
    "arwkv7", "bailingmoe3", "bert", "chameleon", "clip", "deepseek2-ocr", "deepseek32",
    "deepseek4", "dflash", "dots3note", "eagle3", "gemma4", "gemma4-assistant", "glm-dsa",
    "glm5-next", "gptj", "graniteswitch", "hrm_text", "hy_v4", "jina-bert-v2", "jina-bert-v3",
    "kimi-k3", "llada-moe", "minimax-01", "minimax-m3", "modern-bert", "neo-bert", "nomic-bert",
    "nomic-bert-moe", "plm", "pockettts", "qwen3tts", "qwen4exp", "rnd1", "rwkv6", "rwkv6qwen2",
    "rwkv7", "t5", "t5encoder", "wavtokenizer-dec",
)  # fmt: skip

# Their loaders or graphs want as many K/V heads as heads.
_NO_GROUPS = ("minicpm3", "gemma3n", "olmoe", "dots1")
_MLA = ("deepseek2", "mistral4", "kimi-linear")
_PER_LAYER_HEADS = (
    "plamo2", "jamba", "nemotron_h", "nemotron_h_moe", "granitehybrid", "lfm2", "lfm2moe",
    "kimi-linear",
)  # fmt: skip
_PATTERN_PER_LAYER = (
    "cohere2moe", "mimo2", "step35", "spark2_5", "muse-glimmer", "granite_swa", "maple",
)  # fmt: skip
_WITH_EXPERTS = (
    *EXPERTS, "ernie4_5", "paddleocr", "qwen3next", "qwen35moe", "lfm2moe", "kimi-linear",
)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """Sizes of a model to make.

    Attributes:
        arch: The architecture, as llama.cpp calls it.
        hard: Grouped K/V heads, three blocks, a window of 8 and YaRN, where the architecture can:
            with equal heads, two blocks and a long window many faults do not show.
        types: Type of the matrices: one, or by the last part of a tensor's name (`*` for the rest).
        seed: Of the weights.
        extra: Metadata that replaces what is made here; None removes a key.
    """

    arch: str
    hard: bool = False
    types: str | Mapping[str, str] = "F32"
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def metadata(tiny: Tiny) -> dict[str, Any]:
    """Return the metadata of a tiny model; keys that its architecture does not read do no harm."""
    arch, vocab = tiny.arch, vocabulary("bpe")
    n_vocab = len(vocab["tokenizer.ggml.tokens"])
    n_layer, n_embd, n_head, n_ff = _sizes(arch, tiny.hard)
    n_head_kv = n_head // 2 if tiny.hard and arch not in _NO_GROUPS else n_head
    head = n_embd // n_head
    heads: Any = n_head
    heads_kv: Any = n_head_kv
    if arch in _PER_LAYER_HEADS:
        heads = [0 if i == 1 else n_head for i in range(n_layer)]
        heads_kv = [0 if i == 1 else n_head_kv for i in range(n_layer)]
    ff: Any = n_ff
    if arch.startswith("nemotron_h"):
        ff = [0 if i <= 1 else n_ff for i in range(n_layer)]
    pattern: Any = 2
    if arch in _PATTERN_PER_LAYER:
        pattern = [i % 2 for i in range(n_layer)]
    own: dict[str, Any] = {
        "vocab_size": n_vocab, "context_length": 256, "embedding_length": n_embd,
        "features_length": n_embd, "block_count": n_layer, "leading_dense_block_count": 1,
        "feed_forward_length": ff, "use_parallel_residual": False, "logit_scale": 1.0,
        "full_attention_interval": 2, "residual_scale": 0.9, "attention.head_count": heads,
        "attention.head_count_kv": heads_kv, "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0, "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.q_lora_rank": 64,
        "attention.kv_lora_rank": 64, "attention.sliding_window": 8 if tiny.hard else 32,
        "attention.sliding_window_pattern": pattern, "rope.dimension_sections": [head // 4] * 4,
        "ssm.inner_size": 128 * n_head if arch.startswith("qwen3") else 2 * n_embd,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128, "ssm.time_step_rank": n_head,
        "ssm.group_count": 0 if arch == "plamo2" else 2, "kda.head_dim": 128,
        "shortconv.l_cache": 3, "swiglu_clamp_exp": 7.0,
    }  # fmt: skip
    if arch in _MLA:
        own |= {
            "attention.key_length": 96, "attention.value_length": 64, "rope.dimension_count": 32,
            "attention.key_length_mla": 96, "attention.value_length_mla": 64,
        }  # fmt: skip
    if arch in _WITH_EXPERTS:
        many = tiny.hard
        own |= {
            "expert_feed_forward_length": n_ff, "expert_shared_feed_forward_length": n_ff // 2,
            "expert_count": 8 if many else 2, "expert_used_count": 2, "expert_shared_count": 1,
            "expert_gating_func": 2, "expert_group_scale": 1.0, "experts_per_group": 1,
            "interleave_moe_layer_step": 2, "expert_latent_length": n_ff,
        }  # fmt: skip
    if tiny.hard:
        own |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        }  # fmt: skip
    xielu = {"xielu.alpha_n": 1.0, "xielu.alpha_p": 1.0, "xielu.beta": 1.0, "xielu.eps": 1e-7}
    made = {
        "general.architecture": arch, "general.name": "random", "general.alignment": 32,
        "general.quantization_version": 2, **{f"{arch}.{key}": v for key, v in own.items()},
        **xielu, **vocab, **tiny.extra,
    }  # fmt: skip
    return {key: value for key, value in made.items() if value is not None}


def _sizes(arch: str, hard: bool) -> tuple[int, int, int, int]:
    """Return blocks, width, heads and feed-forward width."""
    n_layer = {"llama4": 4, "gemma3n": 22, "nemotron_h": 3, "nemotron_h_moe": 3}.get(
        arch, 3 if hard else 2
    )
    if arch == "gemma3n":
        return n_layer, 64, 1, 96
    if arch in _MLA:
        return n_layer, 128, 2 if hard else 1, 192
    if arch in ("step35", "laguna"):
        return n_layer, 160, 2, 384
    if arch in ("qwen3", "muse-glimmer", "afmoe"):
        return n_layer, 256, 4, 384
    return n_layer, 256, 4 if hard else 2, 384


class _GgmlTensor(ctypes.Structure):
    """The head of `ggml_tensor`, as far as it is read here. Source: ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
    )


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return random values under which activations stay O(1); shape in NumPy order."""
    values = rng.normal(size=shape)
    if "ssm_a" in name:  # a state that decays
        return -np.abs(values)
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.2 * values
    if len(shape) == 1 or name.endswith(".bias"):
        return 0.2 * values
    if "token_embd" in name:
        return 0.5 * values
    values /= np.sqrt(shape[-1])
    return values


def tensors(tiny: Tiny, scratch: Path) -> Iterator[Tensor]:
    """Yield what llama.cpp asks for, filled with random values of the wanted type."""
    path = scratch / f"{tiny.arch}.metadata.gguf"
    path.write_bytes(gguf_head(metadata(tiny), []))
    wanted: list[tuple[str, int, tuple[int, ...]]] = []
    ggml = ggml_base()

    def record(tensor: int, _: object) -> None:
        head = _GgmlTensor.from_address(tensor)
        ne = list(head.ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        wanted.append((ggml.ggml_get_name(tensor).decode(), head.type, tuple(ne[::-1])))
        zeros = bytes(ggml.ggml_nbytes(tensor))
        ggml.ggml_backend_tensor_set(tensor, zeros, 0, len(zeros))

    context = ggml.gguf_init_from_file(str(path).encode(), GgufInit(True, None))
    assert context, "llama.cpp reads its own metadata"
    try:
        callback = llama_cpp.llama_model_set_tensor_data_t(record)
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = llama_cpp.llama_model_init_from_user(context, callback, None, parameters)
        assert model, f"llama.cpp cannot make a tiny {tiny.arch}"
        llama_cpp.llama_model_free(model)
    finally:
        ggml.gguf_free(context)
        path.unlink()
    for name, number, shape in dict.fromkeys(wanted):
        rng = np.random.default_rng([tiny.seed, zlib.crc32(name.encode())])
        values = _values(rng, name, shape).astype(np.float32)
        given = next(key for key, kind in TYPES.items() if kind.number == number)
        type_name = _type_of(tiny, name, shape) if given == "F32" else given
        yield Tensor(name, type_name, shape, quantize(values.reshape(-1, shape[-1]), type_name))


def _type_of(tiny: Tiny, name: str, shape: tuple[int, ...]) -> str:
    """Return the type in which a tensor is stored: F32 for vectors and what does not divide."""
    if len(shape) < 2 or not name.endswith(".weight") or "norm" in name:
        return "F32"
    if any(part in name for part in ("ssm_conv", "shortconv.conv", "ssm_a", "pos_embd", "types")):
        return "F32"
    types = tiny.types
    if not isinstance(types, str):
        types = types.get(name.removesuffix(".weight").split(".")[-1], types.get("*", "F32"))
    return types if shape[-1] % TYPES[types].block == 0 else "F32"


def write_tiny(path: Path, tiny: Tiny) -> Path:
    """Write a tiny model; return its path."""
    write_gguf(path, metadata(tiny), list(tensors(tiny, path.parent)))
    return path
