"""Rebuilds a SentencePiece vocabulary from an old GGML file, or takes it from a tokenizer folder.

An old file stores the text that a token prints, and at best a score. Today's needs SentencePiece's
own spelling (▁ for a space, <0x0A> for a byte), a score and a type for each. What is inferred is
said in `notes`.

Source: sentencepiece_model.proto of SentencePiece; the token types of gguf.h's companion gguf-py.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggft.gguf.types import Value
from ggft.legacy.parse import LegacyToken
from ggft.legacy.reader import LegacyFile
from ggft.system.errors import InputError
from ggft.system.files import require_regular_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
FIRST_BYTE_ID = 3
FIRST_PIECE_ID = FIRST_BYTE_ID + 256
ADDED_SCORE = -1000.0
LLAMA_VOCAB = 32000
MAX_TOKENIZER_BYTES = 256 << 20

_SPECIAL = re.compile(r"<\|.*\|>|\[[A-Z_]+\]|</?[A-Za-z_]+>")


@dataclass
class SpmVocabulary:
    """A SentencePiece vocabulary as GGUF stores it.

    Attributes:
        special_ids: Ids by the name in the keys (bos, eos, unknown, padding).
        extra: Further metadata, such as a chat template.
        notes: What was inferred.
    """

    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    special_ids: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, text: str, score: float, token_type: int) -> None:
        """Append a token."""
        self.tokens.append(text)
        self.scores.append(score)
        self.types.append(token_type)

    def metadata(self) -> dict[str, Value]:
        """Return the keys of a GGUF file."""
        keys: dict[str, Value] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.scores": self.scores,
            "tokenizer.ggml.token_type": self.types,
        }
        for name, index in self.special_ids.items():
            keys[f"tokenizer.ggml.{name}_token_id"] = index
        keys["tokenizer.ggml.add_bos_token"] = True
        keys["tokenizer.ggml.add_eos_token"] = False
        return keys | self.extra


def rebuild_vocabulary(file: LegacyFile) -> SpmVocabulary:
    """Rebuild the vocabulary that an old file stores.

    Raises:
        InputError: It is not a llama vocabulary.
    """
    vocabulary = SpmVocabulary(special_ids={"bos": 1, "eos": 2, "unknown": 0})
    stored = file.tokens
    n_bytes = sum(
        token.text == bytes([i]) for i, token in enumerate(stored[FIRST_BYTE_ID:FIRST_PIECE_ID])
    )
    if n_bytes != 256:
        raise InputError(
            "the vocabulary is not a llama's",
            path=file.paths[0],
            found=f"{n_bytes} of 256 single bytes at ids 3 to 258",
            expected="SentencePiece with byte tokens",
            hint="give the model's tokenizer with --vocab-dir",
        )
    first_added = _first_added(stored)
    for i, token in enumerate(stored):
        score = token.score
        added = i >= first_added
        if score is None:
            score = ADDED_SCORE if added else float(min(0, FIRST_PIECE_ID - i))
        if i < FIRST_BYTE_ID:
            name = ("<unk>", "<s>", "</s>")[i]
            vocabulary.add(name, score, UNKNOWN if i == 0 else CONTROL)
        elif i < FIRST_PIECE_ID:
            vocabulary.add(f"<0x{i - FIRST_BYTE_ID:02X}>", score, BYTE)
        else:
            text = token.text.decode("utf-8", "surrogateescape")
            if added:
                vocabulary.add(text, score, CONTROL if _SPECIAL.fullmatch(text) else USER_DEFINED)
            else:
                vocabulary.add(text.replace(" ", "▁"), score, NORMAL)
    if stored[0].score is None:
        vocabulary.notes.append("scores: minus the rank, as in llama's tokenizer (none stored)")
    if first_added < len(stored):
        vocabulary.notes.append(f"{len(stored) - first_added} added tokens, from id {first_added}")
    _fill(vocabulary, file.hparams.n_vocab)
    _mark_duplicates(vocabulary)
    _find_padding(vocabulary)
    return vocabulary


def _first_added(stored: Sequence[LegacyToken]) -> int:
    """Return the id from which on tokens were added to the original vocabulary."""
    if stored[0].score is None:
        return min(LLAMA_VOCAB, len(stored))
    first = len(stored)
    while first > FIRST_PIECE_ID and stored[first - 1].score == ADDED_SCORE:
        first -= 1
    # In llama's own vocabulary the score is minus the rank, and one token's rank is 1000.
    return first + 1 if FIRST_PIECE_ID - first == ADDED_SCORE else first


def _fill(vocabulary: SpmVocabulary, n_vocab: int) -> None:
    """Add tokens that the model has rows for but the file does not name."""
    missing = n_vocab - len(vocabulary.tokens)
    for _ in range(missing):
        i = len(vocabulary.tokens)
        # GPT4All's models, the known case, have one row for the padding token they added.
        text = "[PAD]" if i == LLAMA_VOCAB and missing == 1 else f"<unnamed_{i}>"
        vocabulary.add(text, ADDED_SCORE, CONTROL)
        vocabulary.notes.append(f"token {i} is not stored in the file; named {text}")


def _mark_duplicates(vocabulary: SpmVocabulary) -> None:
    """Rename texts that stand twice, up to a NUL, or are empty: llama.cpp stops at them."""
    seen: set[str] = set()
    for i, text in enumerate(vocabulary.tokens):
        shown = text.partition("\0")[0]
        if not shown or shown in seen:
            shown = f"<duplicate_{i}>"
            vocabulary.tokens[i] = shown
            vocabulary.types[i] = UNUSED
            vocabulary.notes.append(f"token {i} repeats {text!a}; named {shown}")
        seen.add(shown)


def _find_padding(vocabulary: SpmVocabulary) -> None:
    """Name the padding token where one was added."""
    for text in ("[PAD]", "<pad>", "<|pad|>"):
        if text in vocabulary.tokens:
            vocabulary.special_ids.setdefault("padding", vocabulary.tokens.index(text))


def load_vocabulary(folder: str | Path, n_vocab: int) -> SpmVocabulary:
    """Take the vocabulary from a Hugging Face tokenizer folder (or a tokenizer.model itself).

    Reads tokenizer.model, else a SentencePiece-like tokenizer.json; added_tokens.json and
    tokenizer_config.json beside it.

    Args:
        folder: The folder or file.
        n_vocab: How many tokens the model has rows for.

    Raises:
        InputError: No usable tokenizer, or one of another size.
    """
    folder = Path(folder)
    model = folder
    if folder.is_dir():
        model = folder / "tokenizer.model"
        if not model.exists():
            model = folder / "tokenizer.json"
        if not model.exists():
            raise InputError(
                "no tokenizer in the folder", path=folder, expected="tokenizer.model or .json"
            )
    size = require_regular_file(model)
    if size > MAX_TOKENIZER_BYTES:
        raise InputError("the tokenizer is too large", path=model, found=f"{size} bytes")
    is_json = model.suffix == ".json"
    vocabulary = _from_tokenizer_json(model) if is_json else _from_sentencepiece(model)
    if len(vocabulary.tokens) < n_vocab:
        _add_from_json(vocabulary, model.with_name("added_tokens.json"))
    _use_config(vocabulary, model.with_name("tokenizer_config.json"))
    if len(vocabulary.tokens) > n_vocab:
        raise InputError(
            "the tokenizer does not fit the model",
            path=model,
            found=f"{len(vocabulary.tokens)} tokens",
            expected=f"at most {n_vocab}",
        )
    _fill(vocabulary, n_vocab)
    _mark_duplicates(vocabulary)
    _find_padding(vocabulary)
    vocabulary.notes.append(f"vocabulary from {model.name}")
    return vocabulary


def _from_sentencepiece(path: Path) -> SpmVocabulary:
    """Read the pieces of a SentencePiece model: field 1 of ModelProto, repeated."""
    data = path.read_bytes()
    vocabulary = SpmVocabulary()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece, score, kind = "", 0.0, NORMAL
                for inner, content in _fields(value):
                    if inner == 1 and isinstance(content, bytes):
                        piece = content.decode("utf-8", "surrogateescape")
                    elif inner == 2 and isinstance(content, bytes):
                        (score,) = struct.unpack("<f", content)
                    elif inner == 3 and isinstance(content, int):
                        kind = content
                vocabulary.add(piece, score, kind)
    except (IndexError, struct.error, ValueError):
        raise InputError(
            "not a SentencePiece model", path=path, expected="tokenizer.model as published"
        ) from None
    if not vocabulary.tokens:
        raise InputError("not a SentencePiece model", path=path, found="no pieces")
    if UNKNOWN in vocabulary.types:
        vocabulary.special_ids["unknown"] = vocabulary.types.index(UNKNOWN)
    for name, text in (("bos", "<s>"), ("eos", "</s>")):
        if text in vocabulary.tokens:
            vocabulary.special_ids[name] = vocabulary.tokens.index(text)
    return vocabulary


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of the fields of a protocol buffer message."""
    pos = 0
    while pos < len(data):
        tag, pos = _varint(data, pos)
        wire = tag & 7
        if wire == 0:
            value, pos = _varint(data, pos)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, pos = _varint(data, pos)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("unknown wire type")
        if pos + length > len(data):
            raise IndexError("field past the end")
        yield tag >> 3, data[pos : pos + length]
        pos += length


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
        shift += 7
        if shift > 63:
            raise ValueError("number too long")


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read JSON: {error}", path=path) from None
    if not isinstance(content, dict):
        raise InputError("not a JSON object", path=path)
    return content


def _from_tokenizer_json(path: Path) -> SpmVocabulary:
    """Read a tokenizer.json that was converted from SentencePiece: BPE with byte fallback."""
    content = _read_json(path)
    model = content.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if (
        not isinstance(model, dict)
        or not model.get("byte_fallback")
        or not isinstance(pieces, dict)
    ):
        raise InputError(
            "not a SentencePiece tokenizer",
            path=path,
            expected="a BPE model with byte_fallback, as llama's",
            hint="give the folder that has tokenizer.model",
        )
    vocabulary = SpmVocabulary()
    ordered = _in_order(path, pieces)
    for i, text in enumerate(ordered):
        kind = BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL
        vocabulary.add(text, float(min(0, FIRST_PIECE_ID - i)), kind)
    for token in content.get("added_tokens") or ():
        index, text = token.get("id"), token.get("content")
        if not isinstance(index, int) or not isinstance(text, str):
            continue
        kind = CONTROL if token.get("special") else USER_DEFINED
        if index < len(vocabulary.tokens) and vocabulary.tokens[index] == text:
            vocabulary.types[index] = kind
        elif index == len(vocabulary.tokens):
            vocabulary.add(text, ADDED_SCORE, kind)
    unknown = model.get("unk_token")
    for name, token_text in (("unknown", unknown), ("bos", "<s>"), ("eos", "</s>")):
        if token_text in vocabulary.tokens:
            vocabulary.special_ids[name] = vocabulary.tokens.index(token_text)
    if "unknown" in vocabulary.special_ids:
        vocabulary.types[vocabulary.special_ids["unknown"]] = UNKNOWN
    return vocabulary


def _in_order(path: Path, ids: dict[str, Any]) -> Sequence[str]:
    """Return the texts of a text → id mapping by id, which must leave no gap."""
    ordered = sorted(ids, key=lambda text: ids[text] if isinstance(ids[text], int) else -1)
    if [ids[text] for text in ordered] != list(range(len(ordered))):
        raise InputError("token ids leave gaps", path=path, expected="0, 1, 2 …")
    return ordered


def _add_from_json(vocabulary: SpmVocabulary, path: Path) -> None:
    """Add the tokens of added_tokens.json that follow the vocabulary."""
    if not path.exists():
        return
    content = _read_json(path)
    ids = {text: i for text, i in content.items() if isinstance(i, int)}
    for text in sorted(ids, key=lambda text: ids[text]):
        if ids[text] == len(vocabulary.tokens):
            kind = CONTROL if _SPECIAL.fullmatch(text) else USER_DEFINED
            vocabulary.add(text, ADDED_SCORE, kind)


def _use_config(vocabulary: SpmVocabulary, path: Path) -> None:
    """Take special tokens and the chat template from tokenizer_config.json."""
    if not path.exists():
        return
    config = _read_json(path)
    for name, key in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ):
        token = config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in vocabulary.tokens:
            vocabulary.special_ids[name] = vocabulary.tokens.index(text)
    template = config.get("chat_template")
    if isinstance(template, str):
        vocabulary.extra["tokenizer.chat_template"] = template
