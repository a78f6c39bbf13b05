"""Checks a model's hyper-parameters and vocabulary against its tensors.

`check_model` answers one question: can ggft train this file, and with which numbers? What it
accepts, the engine and llama.cpp can load without an assertion.

Source: the loading code of the pinned llama.cpp (llama-model.cpp, models/llama.cpp, llama-vocab).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ggft.gguf.architectures import ARCHITECTURES, ArchitectureTraits
from ggft.gguf.linears import TARGETS, matrices_of_blocks
from ggft.gguf.types import NOT_WEIGHT_TYPES, GGMLType, GGUFFile, TensorInfo, ValueType
from ggft.gguf.vocabulary import check_special_ids, check_vocabulary
from ggft.system.errors import InputError

MAX_LAYERS = 512
MAX_INT32 = (1 << 31) - 1


# Marks of model features inside a supported architecture that change the computation.
_UNSUPPORTED_TENSORS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"_exps\.|_shexp\.|ffn_gate_inp"), "mixture-of-experts models"),
    (re.compile(r"_norm\.bias$"), "biases in the norms"),
    (re.compile(r"rope_factors_(long|short)"), "LongRoPE"),
    (re.compile(r"\.(scale|input_scale)$"), "per-tensor scales"),
    (re.compile(r"attn_qkv"), "a fused q/k/v matrix"),
    (re.compile(r"lora_[ab]$"), "an adapter inside the model file"),
)
_ROPE_SCALINGS = ("none", "linear", "yarn")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is to be known of a model before the engine opens it, in llama.cpp's words.

    Attributes:
        n_ctx: Context length in training, tokens.
        linears: Names of the matrices of a block, as in `blk.0.attn_q.weight`.
        tied_output: The output matrix is the token embedding.
        special_ids: Ids of the named special tokens that the file gives (bos, eos, eot, …).
    """

    architecture: str
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx: int
    linears: tuple[str, ...]
    tied_output: bool
    tokenizer: str
    special_ids: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DecoderInfo(ModelInfo):
    """Hyper-parameters of a model of `ARCHITECTURES`, whose decoder is written by hand.

    Attributes:
        n_embd_head: Size of an attention head.
        rope_scaling: "none", "linear" or "yarn".
        rope_factor: Scaling factor; 1 for none.
        n_ctx_orig: Context before yarn, tokens.
        has_rope_freqs: Frequency factors as a tensor (Llama 3.1 and later).
    """

    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_ff: int
    norm_eps: float
    rope_kind: str
    rope_base: float
    rope_scaling: str
    rope_factor: float
    n_ctx_orig: int
    has_rope_freqs: bool


def as_decoder(info: ModelInfo, what: str) -> DecoderInfo:
    """Return hyper-parameters that only hand-written decoders have.

    Raises:
        InputError: The model has another architecture; names `what` needs them.
    """
    if not isinstance(info, DecoderInfo):
        raise InputError(
            f"{what} knows a few architectures only", found=info.architecture,
            expected=", ".join(ARCHITECTURES),
        )  # fmt: skip
    return info


def check_decoder(file: GGUFFile, what: str = "this") -> DecoderInfo:
    """Check a model of `ARCHITECTURES`; raises as `check_model` and `as_decoder`."""
    return as_decoder(check_model(file), what)


def check_model(file: GGUFFile) -> ModelInfo:
    """Check that a file is a model that ggft can train; return its hyper-parameters.

    Raises:
        InputError: It is not, or contradicts itself; names the key or tensor, its offset, what
            was found and what was expected.
    """
    keys = _Keys(file, file.architecture)
    _check_kind(file)
    traits = ARCHITECTURES.get(file.architecture)
    if traits is None:
        return _check_traced(file, keys)
    n_layer = keys.whole("block_count", low=1, high=MAX_LAYERS)
    n_embd = keys.whole("embedding_length")
    n_ff = keys.whole("feed_forward_length")
    n_head = keys.whole("attention.head_count")
    n_head_kv = keys.whole("attention.head_count_kv", default=n_head)
    n_embd_head = _check_heads(keys, n_embd, n_head, n_head_kv)
    scaling, factor = _check_rope_scaling(keys)
    n_ctx = keys.whole("context_length")
    sizes = {
        "C": n_embd,
        "F": n_ff,
        "Q": n_head * n_embd_head,
        "K": n_head_kv * n_embd_head,
        "D": n_embd_head // 2,
        "H": n_embd_head,
        "V": check_vocabulary(file),
    }
    if keys.whole("vocab_size", default=sizes["V"]) != sizes["V"]:
        raise keys.fail("vocab_size", f"the {sizes['V']} tokens of tokenizer.ggml.tokens")
    _check_tensors(file, traits, n_layer, sizes)
    return DecoderInfo(
        architecture=file.architecture,
        linears=TARGETS,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=n_embd_head,
        n_ff=n_ff,
        n_vocab=sizes["V"],
        n_ctx=n_ctx,
        norm_eps=keys.real("attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        rope_kind=traits.rope,
        rope_base=keys.real("rope.freq_base", default=10000.0, low=1.0, high=1e12),
        rope_scaling=scaling,
        rope_factor=factor,
        n_ctx_orig=keys.whole("rope.scaling.original_context_length", default=n_ctx),
        has_rope_freqs="rope_freqs.weight" in file.tensors,
        tied_output="output.weight" not in file.tensors,
        tokenizer=str(file.get("tokenizer.ggml.model")),
        special_ids=check_special_ids(file, sizes["V"]),
    )


def _check_traced(file: GGUFFile, keys: _Keys) -> ModelInfo:
    """Check what any model has; the rest is llama.cpp's to check, which builds its graph."""
    n_layer = keys.whole("block_count", low=1, high=MAX_LAYERS)
    n_vocab = check_vocabulary(file)
    return ModelInfo(
        architecture=file.architecture,
        n_layer=n_layer,
        n_embd=keys.whole("embedding_length"),
        n_vocab=n_vocab,
        n_ctx=keys.whole("context_length"),
        linears=matrices_of_blocks(file.tensors.values()),
        tied_output="output.weight" not in file.tensors,
        tokenizer=str(file.get("tokenizer.ggml.model")),
        special_ids=check_special_ids(file, n_vocab),
    )


class _Keys:
    """Typed access to the keys of one architecture, with errors that name the offset."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix

    def fail(self, key: str, expected: str, message: str | None = None) -> InputError:
        """Return the error for a key that is missing or out of range."""
        full = f"{self.prefix}.{key}"
        value = self.file.get(full)
        return InputError(
            message or f"{full} is {'missing' if value is None else 'wrong'}",
            path=self.file.path,
            offset=self.file.value_offsets.get(full),
            found=None if value is None else ascii(value)[:80],
            expected=expected,
        )

    def whole(
        self, key: str, *, default: int | None = None, low: int = 1, high: int = MAX_INT32
    ) -> int:
        """Return a whole number; a per-layer array counts when all its elements are equal."""
        value = self.file.get(f"{self.prefix}.{key}")
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float, str)) and value is not None and len(value):
            if any(x != value[0] for x in value):
                raise self.fail(
                    key, "the same in every block", f"{self.prefix}.{key} differs by block"
                )
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"a whole number from {low} to {high}")
        self.require_type(key, ValueType.UINT32)
        return value

    def real(
        self, key: str, *, default: float | None = None, low: float = 0.0, high: float = 1e9
    ) -> float:
        """Return a number."""
        value = self.file.get(f"{self.prefix}.{key}")
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        if not low <= value <= high:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        self.require_type(key, ValueType.FLOAT32)
        return float(value)

    def require_type(self, key: str, wanted: ValueType) -> None:
        """Refuse a single value of another type, as llama.cpp does; lists may also be INT32."""
        full = f"{self.prefix}.{key}"
        single = isinstance(self.file.metadata[full], (int, float))
        if self.file.types[full] is not wanted and (
            single or self.file.types[full] is not ValueType.INT32
        ):
            raise InputError(
                f"{full} has the wrong type",
                path=self.file.path,
                offset=self.file.value_offsets[full],
                found=self.file.types[full].name,
                expected=wanted.name,
            )


def _check_kind(file: GGUFFile) -> None:
    """Refuse what is not a model."""
    kind = file.get("general.type", "model")
    if kind != "model":
        raise InputError(
            "not a model",
            path=file.path,
            offset=file.value_offsets["general.type"],
            found=f"general.type {ascii(kind)[:40]}",
            expected="a model",
            hint="an adapter goes to --adapter, beside its base model"
            if kind == "adapter"
            else None,
        )
    if not file.architecture:
        raise InputError("unsupported architecture", path=file.path, found="none")
    if not file.tensors:
        raise InputError(
            "a vocabulary without a model",
            path=file.path,
            found="no tensors",
            expected="the model's weights",
        )


def _check_heads(keys: _Keys, n_embd: int, n_head: int, n_head_kv: int) -> int:
    """Check the attention sizes; return the size of a head."""
    if n_head % n_head_kv:
        raise keys.fail("attention.head_count_kv", f"a divisor of {n_head} heads")
    if f"{keys.prefix}.attention.key_length" not in keys.file.metadata and n_embd % n_head:
        raise keys.fail("attention.head_count", f"a divisor of embedding_length {n_embd}")
    n_embd_head = keys.whole("attention.key_length", default=max(1, n_embd // n_head))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(key, default=n_embd_head) != n_embd_head:
            raise keys.fail(key, f"the head size, {n_embd_head}")
    if n_embd_head % 2:
        raise keys.fail("attention.head_count", "an even head size")
    return n_embd_head


def _check_rope_scaling(keys: _Keys) -> tuple[str, float]:
    """Check how positions are scaled; return the kind and the factor."""
    kind = keys.file.get(f"{keys.prefix}.rope.scaling.type")
    factor = keys.real("rope.scaling.factor", default=0.0, low=0.0, high=1e6)
    if not factor:
        factor = keys.real("rope.scale_linear", default=0.0, low=0.0, high=1e6)
    if kind is None:
        kind = "linear"
    if kind not in _ROPE_SCALINGS:
        raise keys.fail("rope.scaling.type", ", ".join(_ROPE_SCALINGS))
    if kind == "none" or not factor:
        return "none", 1.0
    return str(kind), factor


def _check_tensors(
    file: GGUFFile, traits: ArchitectureTraits, n_layer: int, sizes: Mapping[str, int]
) -> None:
    """Check that exactly the model's tensors are there, with their shapes."""
    required = dict(traits.model)
    optional = dict(traits.model_optional)
    for i in range(n_layer):
        required.update({f"blk.{i}.{name}": shape for name, shape in traits.block.items()})
        optional.update({f"blk.{i}.{name}": shape for name, shape in traits.block_optional.items()})
    for name, tensor in file.tensors.items():
        letters = required.get(name) or optional.get(name)
        if letters is None:
            raise _unexpected(file, tensor, n_layer)
        _check_tensor(tensor, tuple(sizes[letter] for letter in letters))
    for name, letters in required.items():
        if name not in file.tensors:
            shape = tuple(sizes[letter] for letter in letters)
            raise InputError(
                f"tensor {name} is missing",
                path=file.path,
                expected=f"shape {shape}",
                hint=f"{file.architecture}.block_count is {n_layer}",
            )


def _check_tensor(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    """Check one tensor's shape and type."""
    if tensor.shape != shape:
        raise InputError(
            f"wrong shape of {tensor.name}",
            path=tensor.path,
            offset=tensor.header_offset,
            found=tensor.shape,
            expected=shape,
        )
    wrong = tensor.type in NOT_WEIGHT_TYPES or (len(shape) == 1 and tensor.type != GGMLType.F32)
    if wrong:
        raise InputError(
            f"wrong type of {tensor.name}",
            path=tensor.path,
            offset=tensor.header_offset,
            found=tensor.type.name,
            expected="F32" if len(shape) == 1 else "F32, F16, BF16 or a quantized type",
        )


def _unexpected(file: GGUFFile, tensor: TensorInfo, n_layer: int) -> InputError:
    """Return the error for a tensor that the model should not have."""
    reason = next((why for mark, why in _UNSUPPORTED_TENSORS if mark.search(tensor.name)), None)
    if reason is not None:
        message = f"ggft cannot train {reason} yet"
        expected = None
    elif re.match(r"blk\.\d+\.", tensor.name):
        message = "a tensor that contradicts the hyper-parameters"
        expected = f"blocks 0 to {n_layer - 1} of {file.architecture}"
    else:
        message = "a tensor that the architecture does not have"
        expected = f"the tensors of {file.architecture}"
    return InputError(
        message,
        path=tensor.path,
        offset=tensor.header_offset,
        found=f"tensor {tensor.name!a}",
        expected=expected,
    )
