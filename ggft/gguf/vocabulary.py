"""Checks a vocabulary for what llama.cpp would stop the process at, or read past the end of.

Source: llama-vocab.cpp of the pinned llama.cpp.
"""

from __future__ import annotations

import re

from ggft.gguf.types import GGUFFile, StringArray, ValueType
from ggft.system.errors import InputError

_TOKENIZERS = ("llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace")
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask")
_TURN_ENDS = ("bos", "eot", "eom")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ESCAPE = re.compile(rb"\\(x..|[^x])", re.DOTALL)
TOKEN_BYTE = 6


def check_vocabulary(file: GGUFFile) -> int:
    """Check the vocabulary; return its size."""
    tokenizer = file.get("tokenizer.ggml.model")
    tokens = file.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray) or not len(tokens):
        raise InputError(
            "the file has no vocabulary",
            path=file.path,
            offset=file.value_offsets.get("tokenizer.ggml.tokens"),
            found="no tokenizer.ggml.tokens",
            expected="a list of tokens",
        )
    if tokenizer not in _TOKENIZERS:
        raise InputError(
            "unknown tokenizer",
            path=file.path,
            offset=file.value_offsets.get("tokenizer.ggml.model"),
            found=ascii(tokenizer)[:40],
            expected=", ".join(_TOKENIZERS[:2]),
        )
    n_vocab = len(tokens)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) > 1 and embedding.shape[1] != n_vocab:
        raise InputError(
            "the vocabulary does not fit the token embedding",
            path=file.path,
            offset=file.value_offsets["tokenizer.ggml.tokens"],
            found=f"{n_vocab} tokens",
            expected=f"{embedding.shape[1]}, the rows of token_embd.weight",
        )
    _check_list(file, "scores", (ValueType.FLOAT32, ValueType.INT32), n_vocab)
    _check_list(file, "token_type", (ValueType.INT32,), n_vocab)
    if tokenizer == "gpt2":
        _check_list(file, "merges", (ValueType.STRING,), 0, required=True)
    if tokenizer == "rwkv":
        _check_first_bytes(file, tokens)
    _check_byte_tokens(file, tokens)
    duplicate = tokens.first_duplicate()
    if duplicate is not None:
        # llama.cpp stops the whole process at this.
        raise InputError(
            "two tokens have the same text",
            path=file.path,
            offset=file.value_offsets["tokenizer.ggml.tokens"],
            found=f"tokens {duplicate[0]} and {duplicate[1]}, {ascii(tokens[duplicate[1]])[:40]}",
            expected="different texts",
        )
    return n_vocab


def _check_list(
    file: GGUFFile,
    name: str,
    types: tuple[ValueType, ...],
    least: int,
    *,
    required: bool = False,
) -> None:
    """Check the element type and the length of a list that goes with the tokens."""
    key = f"tokenizer.ggml.{name}"
    value = file.get(key)
    if value is None and not required:
        return
    if value is None or isinstance(value, (str, int, float)):
        found = "nothing" if value is None else "a single value"
    elif file.types[key] not in types:
        found = f"a list of {file.types[key].name}"
    elif len(value) < least:
        found = f"{len(value)} elements"
    else:
        return
    raise InputError(
        f"{key} does not fit the vocabulary",
        path=file.path,
        offset=file.value_offsets.get(key),
        found=found,
        expected=f"a list of {' or '.join(t.name for t in types)}, at least {least} long",
    )


def _check_first_bytes(file: GGUFFile, tokens: StringArray) -> None:
    """Check that each token begins with a token of one byte.

    Without it llama.cpp, at a text that begins as the token and goes on otherwise, never ends.
    """
    texts = [_ESCAPE.sub(_unescaped, text.encode("utf-8", "surrogateescape")) for text in tokens]
    single = {text for text in texts if len(text) == 1}
    for i, text in enumerate(texts):
        if text and text[:1] not in single:
            raise InputError(
                "a token begins with a byte that is no token, so this is no rwkv tokenizer",
                path=file.path,
                offset=file.value_offsets["tokenizer.ggml.tokens"],
                found=f"token {i}, {ascii(tokens[i])[:40]}",
                expected=f"a token {text[:1]!r}",
            )


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """Return the bytes that an escape in a token stands for, as llama.cpp reads them."""
    name = escape[1]
    if len(name) == 3:
        high, low = (c - 87 if 97 <= c < 128 else c - 48 for c in name[1:])
        return bytes([(high * 16 + low) & 255])
    return {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(name, name)


def _check_byte_tokens(file: GGUFFile, tokens: StringArray) -> None:
    """Check that every token marked as a byte names one, as llama.cpp parses it unchecked."""
    types = file.get("tokenizer.ggml.token_type")
    if types is None or isinstance(types, (str, int, float)):
        return
    for i in range(len(tokens)):
        if types[i] == TOKEN_BYTE and not _BYTE_TOKEN.fullmatch(tokens[i]):
            raise InputError(
                f"token {i} is marked as a byte but names none",
                path=file.path,
                offset=file.value_offsets["tokenizer.ggml.tokens"],
                found=ascii(tokens[i])[:40],
                expected="<0x00> to <0xFF>",
            )


def check_special_ids(file: GGUFFile, n_vocab: int) -> dict[str, int]:
    """Check that the ids of special tokens lie within the vocabulary."""
    ids = {}
    for name in _SPECIAL_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = file.get(key)
        if value is None:
            continue
        right_type = file.types[key] is ValueType.UINT32
        if right_type and isinstance(value, int) and 0 <= value < n_vocab:
            ids[name] = value
        # Real files have padding ids beyond the vocabulary, and -1 for "none": llama.cpp ignores
        # them, and nothing is trained on them. A wrong end token would spoil every example.
        elif not right_type or name == "eos" or (name in _TURN_ENDS and value != 0xFFFFFFFF):
            raise InputError(
                f"{key} is outside the vocabulary" if right_type else f"{key} has the wrong type",
                path=file.path,
                offset=file.value_offsets[key],
                found=ascii(value)[:40] if right_type else file.types[key].name,
                expected=f"0 to {n_vocab - 1}" if right_type else "UINT32",
            )
    return ids
