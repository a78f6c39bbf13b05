"""Reads old llama GGML models: `ggml`, `ggmf` v1, `ggjt` v1 to v3, in one file or several parts.

Gives hyper-parameters, vocabulary and the tensors of the whole model, its shapes checked against
the hyper-parameters. What the file leaves out is decided by `convert`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ggft.legacy.blocks import BlockLayout
from ggft.legacy.parse import (
    HINT_FAMILY,
    LegacyHparams,
    LegacyPart,
    LegacyTensor,
    LegacyToken,
    read_part,
)
from ggft.system.errors import InputError

# Meta's tensor names, → llama.cpp's, and the shape in letters: C n_embd, F n_ff, K the rows of wk,
# V n_vocab, in ggml's order.
_MODEL_TENSORS = {
    "tok_embeddings.weight": ("token_embd.weight", "CV"),
    "norm.weight": ("output_norm.weight", "C"),
    "output.weight": ("output.weight", "CV"),
}
_BLOCK_TENSORS = {
    "attention_norm.weight": ("attn_norm.weight", "C"),
    "attention.wq.weight": ("attn_q.weight", "CC"),
    "attention.wk.weight": ("attn_k.weight", "CK"),
    "attention.wv.weight": ("attn_v.weight", "CK"),
    "attention.wo.weight": ("attn_output.weight", "CC"),
    "ffn_norm.weight": ("ffn_norm.weight", "C"),
    "feed_forward.w1.weight": ("ffn_gate.weight", "CF"),
    "feed_forward.w2.weight": ("ffn_down.weight", "FC"),
    "feed_forward.w3.weight": ("ffn_up.weight", "CF"),
}
# Position frequencies that some early converters copied; they follow from the head size.
_IGNORED = re.compile(r"rope\.freqs$|inner_attention\.rope\.freqs$")
# Matrices whose columns, not rows, are spread over the parts of a model.
_SPLIT_BY_COLUMNS = re.compile(r"tok_embeddings|attention\.wo|feed_forward\.w2")


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor of the whole model.

    Attributes:
        name: llama.cpp's name.
        shape: Of the whole tensor, in ggml's order.
        parts: Its pieces, one per file.
        by_columns: The pieces lie side by side in each row, else one after another.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[LegacyTensor, ...]
    by_columns: bool

    @property
    def layout(self) -> BlockLayout:
        """Return the layout of its blocks."""
        return self.parts[0].layout


@dataclass(frozen=True)
class LegacyFile:
    """A parsed and checked model.

    Attributes:
        container: "ggml", "ggmf" or "ggjt".
        version: 0 for `ggml`.
        tokens: The stored vocabulary; may be one shorter than n_vocab (GPT4All's files).
        tensors: In the order of the first part.
        block_64: K-quants have 64-element blocks.
        n_head_kv: From the rows of wk.
        n_ff: From the rows of w1.
    """

    paths: tuple[Path, ...]
    container: str
    version: int
    hparams: LegacyHparams
    tokens: tuple[LegacyToken, ...]
    tensors: tuple[JoinedTensor, ...]
    block_64: bool
    n_head_kv: int
    n_ff: int

    @property
    def file_bytes(self) -> int:
        """Return the size of all parts."""
        return sum(path.stat().st_size for path in self.paths)


def read_legacy(path: str | Path) -> LegacyFile:
    """Read and check an old GGML model, with all of its parts; any part may be given.

    Raises:
        InputError: The file cannot be used; says where, what was found and what was expected.
    """
    path = Path(path)
    if re.fullmatch(r"\.\d+", path.suffix) and path.with_suffix("").exists():
        path = path.with_suffix("")
    first = read_part(path)
    embedding = first.tensors.get("tok_embeddings.weight")
    if embedding is None:
        raise InputError(
            "tensor tok_embeddings.weight is missing",
            path=path,
            found=f"{len(first.tensors)} other tensors",
            expected="a llama's tensors",
            hint=HINT_FAMILY,
        )
    n_embd = first.hparams.n_embd
    if not embedding.shape[0] or n_embd % embedding.shape[0]:
        raise InputError(
            "wrong shape of tok_embeddings.weight",
            path=path,
            offset=embedding.header_offset,
            found=embedding.shape,
            expected=f"rows of n_embd = {n_embd}, or a fraction for a model in parts",
        )
    parts = [first]
    for i in range(1, n_embd // embedding.shape[0]):
        parts.append(_read_other_part(first, i, n_embd // embedding.shape[0]))
    return _join(parts)


def _read_other_part(first: LegacyPart, index: int, count: int) -> LegacyPart:
    """Read part `index` and compare it with the first."""
    path = first.path.with_name(f"{first.path.name}.{index}")
    if not path.exists():
        raise InputError(
            f"part {index + 1} of {count} is missing",
            path=path,
            found="no such file",
            expected=path.name,
            hint=f"a model in {count} parts needs all of them in one folder",
        )
    part = read_part(path)
    for what in ("container", "version", "hparams", "tokens", "block_64"):
        if getattr(part, what) != getattr(first, what):
            raise InputError(
                f"the parts differ in their {what}",
                path=path,
                offset=0,
                found="another" if what == "tokens" else ascii(getattr(part, what)),
                expected="the first part's" if what == "tokens" else ascii(getattr(first, what)),
            )
    if list(part.tensors) != list(first.tensors):
        raise InputError(
            "the parts hold different tensors", path=path, found=f"{len(part.tensors)} tensors"
        )
    return part


def _join(parts: list[LegacyPart]) -> LegacyFile:
    """Join the tensors of all parts and check them against the hyper-parameters."""
    first = parts[0]
    hparams = first.hparams
    expected = _expected_tensors(hparams.n_layer)
    joined = _join_tensors(parts, expected)
    n_kv = joined["layers.0.attention.wk.weight"].shape[-1]
    n_ff = joined["layers.0.feed_forward.w1.weight"].shape[-1]
    n_vocab = joined["tok_embeddings.weight"].shape[-1]
    sizes = {"C": hparams.n_embd, "F": n_ff, "K": n_kv, "V": n_vocab}
    for name, whole in joined.items():
        _check_shape(whole, name, tuple(sizes[letter] for letter in expected[name][1]))
    n_head_kv, rest = divmod(n_kv, hparams.n_rot)
    if rest or not n_head_kv or hparams.n_head % n_head_kv:
        raise InputError(
            "the rows of attention.wk do not fit the attention heads",
            path=first.path,
            offset=joined["layers.0.attention.wk.weight"].parts[0].header_offset,
            found=f"{n_kv} rows",
            expected=f"a divisor of {hparams.n_head} times {hparams.n_rot}",
        )
    if not len(first.tokens) <= n_vocab <= hparams.n_vocab:
        raise InputError(
            "the vocabulary does not fit the token embedding",
            path=first.path,
            offset=first.tokens_offset,
            found=f"{len(first.tokens)} tokens",
            expected=f"{n_vocab}, the rows of tok_embeddings.weight",
        )
    return LegacyFile(
        paths=tuple(part.path for part in parts),
        container=first.container,
        version=first.version,
        hparams=replace(hparams, n_vocab=n_vocab),
        tokens=first.tokens,
        tensors=tuple(joined.values()),
        block_64=first.block_64 and any(t.layout.is_block_64 for t in first.tensors.values()),
        n_head_kv=n_head_kv,
        n_ff=n_ff,
    )


def _expected_tensors(n_layer: int) -> dict[str, tuple[str, str]]:
    """Return the new name and the letters of the shape of every tensor that there must be."""
    expected = dict(_MODEL_TENSORS)
    for i in range(n_layer):
        for name, (new_name, letters) in _BLOCK_TENSORS.items():
            expected[f"layers.{i}.{name}"] = (f"blk.{i}.{new_name}", letters)
    return expected


def _join_tensors(
    parts: list[LegacyPart], expected: dict[str, tuple[str, str]]
) -> dict[str, JoinedTensor]:
    """Join the pieces of all tensors; no more and no fewer than expected."""
    first = parts[0]
    n_layer = first.hparams.n_layer
    joined: dict[str, JoinedTensor] = {}
    for name, tensor in first.tensors.items():
        if name in expected:
            pieces = tuple(part.tensors[name] for part in parts)
            joined[name] = _join_pieces(expected[name][0], pieces)
        elif not _IGNORED.search(name):
            raise InputError(
                "a tensor that a llama does not have",
                path=first.path,
                offset=tensor.header_offset,
                found=ascii(name),
                expected=f"the tensors of {n_layer} blocks",
                hint=HINT_FAMILY,
            )
    missing = next((name for name in expected if name not in joined), None)
    if missing is not None:
        raise InputError(
            f"tensor {missing} is missing",
            path=first.path,
            found=f"{len(joined)} tensors",
            expected=f"{len(expected)} for n_layer {n_layer}",
            hint="the file is cut off or damaged; download it again",
        )
    return joined


def _join_pieces(new_name: str, pieces: tuple[LegacyTensor, ...]) -> JoinedTensor:
    """Join the pieces of one tensor: vectors are repeated in every part, matrices spread."""
    first = pieces[0]
    if any(p.shape != first.shape or p.layout is not first.layout for p in pieces):
        raise InputError(
            f"the parts differ in the shape or type of {first.name}",
            path=pieces[-1].path,
            offset=pieces[-1].header_offset,
            found=pieces[-1].shape,
            expected=first.shape,
        )
    if len(first.shape) == 1:
        return JoinedTensor(new_name, first.shape, pieces[:1], by_columns=False)
    by_columns = _SPLIT_BY_COLUMNS.search(first.name) is not None
    columns, rows = first.shape
    shape = (columns * len(pieces), rows) if by_columns else (columns, rows * len(pieces))
    return JoinedTensor(new_name, shape, pieces, by_columns)


def _check_shape(tensor: JoinedTensor, name: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise InputError(
            f"wrong shape of {name}",
            path=tensor.parts[0].path,
            offset=tensor.parts[0].header_offset,
            found=" × ".join(map(str, tensor.shape)),
            expected=" × ".join(map(str, expected)),
        )
