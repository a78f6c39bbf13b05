"""Token ids of words met before, so that large data is not tokenized word for word anew.

Text is cut where no token of the vocabulary reaches over: before a space, or after a line break,
with a visible ASCII character on both sides. Neither side's ids then depend on the other: merges
stay within tokens, and none of the patterns by which llama.cpp cuts text first looks over there.
The new words of many texts go to the tokenizer as one text, for a call costs as much as a hundred
words; the ids are told apart by the bytes that they stand for.
"""

from __future__ import annotations

import re
import string
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from .encoding import Tokenizer

MAX_WORDS = 1 << 16  # about 16 MB
MAX_WORD_CHARS = 32
MAX_JOINED_CHARS = 1 << 16
# Texts tokenized without the cache before it is made: it costs a look at the whole vocabulary.
N_DIRECT = 256
_LETTERS = frozenset(string.ascii_letters)
_EDGES = _LETTERS.union(string.digits, string.punctuation)  # of what text is cut between
_MODELS = ("gpt2", "llama")  # vocabularies whose tokens are made by merges
_USER_DEFINED = 4  # token type: found in text before all else, and may swallow blanks


@dataclass(frozen=True)
class Cuts:
    """Where text is cut into words.

    A word is written without the space before it. One at the start of a text or a line begins with
    a line break instead, and a space within a word, where text cannot be cut, is a NUL. Where the
    tokenizer puts a space before a text, the first word is written like any other.

    Attributes:
        before: Characters that a space may follow where text is cut.
        after: Characters that may follow that space.
        line_start: Characters that may follow a line break where text is cut.
        space_prefix: Whether the tokenizer puts a space before a text.
    """

    before: frozenset[str]
    after: frozenset[str]
    line_start: frozenset[str]
    space_prefix: bool

    @cached_property
    def _no_cut(self) -> re.Pattern[str]:
        """Spaces that text is not cut at."""
        return re.compile(f" (?:(?!{_one_of(self.after)})|(?<!{_one_of(self.before)} ))")

    @cached_property
    def _line_break(self) -> re.Pattern[str]:
        """Line breaks that text is cut after."""
        return re.compile(f"\n(?={_one_of(self.line_start)})(?<={_one_of(self.before)}\n)")

    def words(self, text: str) -> list[str]:
        """Cut a text, which has no NUL, into words."""
        text = self._no_cut.sub("\0", text)
        if self.space_prefix:
            return text.split(" ")
        if self.line_start:
            text = self._line_break.sub("\n \n", text)
        return ("\n" + text).split(" ")

    def text(self, word: str) -> str:
        """Return a word as it stands in a text, with the space before it if there is one."""
        plain = word.replace("\0", " ")
        return plain[1:] if plain[:1] == "\n" and not self.space_prefix else " " + plain

    def can_join(self, word: str) -> bool:
        """Return whether a word may stand between others."""
        starts = self.after
        if word[:1] == "\n" and not self.space_prefix:
            word, starts = word[1:], self.line_start
        ends = word[:-1] if word[-1:] == "\n" and self.line_start else word
        return word[:1] in starts and ends[-1:] in self.before

    def join(self, words: Sequence[str]) -> list[tuple[str, str | None]]:
        """Return the pieces of a text that is cut into these words, each with its word.

        Where two words cannot stand side by side, a piece without a word is between them.
        """
        pieces: list[tuple[str, str | None]] = []
        for word in words:
            piece = self.text(word)
            if pieces:
                after_break, spaced = pieces[-1][0][-1] == "\n", piece[0] == " "
                if after_break and spaced:
                    pieces.append(("a", None))
                elif not (after_break or spaced):
                    pieces.append((" a\n", None))
            pieces.append((piece, word))
        return pieces


def find_cuts(metadata: Mapping[str, object], *, space_prefix: bool) -> Cuts | None:
    """Return where texts can be cut for a model's vocabulary; None if nowhere.

    Args:
        metadata: The model's key-value pairs.
        space_prefix: Whether the tokenizer puts a space before a text.
    """
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if (
        metadata.get("tokenizer.ggml.model") not in _MODELS
        or not isinstance(tokens, Sequence)
        or not isinstance(types, Sequence)
    ):
        return None
    vocabulary = "\0".join(tokens)
    added = [t for t, kind in zip(tokens, types, strict=False) if t and kind == _USER_DEFINED]
    if space_prefix and any(t[0] == " " != t[1:2] for t in added):
        return None
    first, last = {t[0] for t in added}, {t[-1] for t in added}
    # Space and line break as vocabularies have them: byte-level, SentencePiece's, and plain.
    before = _EDGES - set(re.findall("(.)[\u0120\u2581 ]", vocabulary)) - last
    after = _EDGES - first
    line_start = _EDGES - set(re.findall("[\u010a\n](.)", vocabulary)) - first
    if not (before >= _LETTERS and after >= _LETTERS):
        return None
    if space_prefix or "\n" in last or not line_start >= _LETTERS:
        line_start = frozenset()
    return Cuts(before, after, line_start, space_prefix)


def _one_of(chars: frozenset[str]) -> str:
    return f"[{re.escape(''.join(sorted(chars)))}]"


class WordCache:
    """A tokenizer for plain text: the same ids, sooner for words met before.

    Several threads may use it.

    Args:
        tokenizer: The tokenizer.
        metadata: The model's key-value pairs; without a vocabulary in them nothing is cached.
        space_prefix: Whether the tokenizer puts a space before a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, metadata: Mapping[str, object], *, space_prefix: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._metadata = metadata
        self._space_prefix = space_prefix
        self._n_direct = N_DIRECT
        self._cuts: Cuts | None = None
        self._known: dict[str, bytes] = {}  # 32-bit ids: one small object for each word
        self._n_bytes: dict[int, int] = {}

    def encode_all(self, texts: Sequence[str]) -> list[array[int]]:
        """Return the token ids of texts without BOS; nothing in them is a special token.

        Raises:
            InputError: A text is not valid Unicode.
        """
        if self._n_direct > 0:
            self._n_direct -= len(texts)
            if self._n_direct <= 0:
                self._cuts = find_cuts(self._metadata, space_prefix=self._space_prefix)
        cuts, known = self._cuts, self._known
        if cuts is None or any("\0" in text for text in texts):
            return [array("i", self._direct(text)) for text in texts]
        split = [cuts.words(text) for text in texts]
        missing = set(chain.from_iterable(split)).difference(known)
        new = self._learn(cuts, sorted(missing))
        results: list[array[int]] = []
        for words in split:
            ids = list(map(known.get, words))
            if None in ids:
                ids = [new[w] if i is None else i for w, i in zip(words, ids, strict=True)]
            results.append(array("i", b"".join(ids)))  # type: ignore[arg-type]
        return results

    def _direct(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)

    def _learn(self, cuts: Cuts, words: list[str]) -> dict[str, bytes]:
        """Return the 32-bit ids of new words, and keep those of short ones."""
        joined: list[str] = []
        ids: dict[str, list[int]] = {}
        for word in words:
            if cuts.can_join(word):
                joined.append(word)
            else:
                ids[word] = self._direct(cuts.text(word)[cuts.space_prefix :])
        ids.update(self._together(cuts, joined))
        new = {word: array("i", i).tobytes() for word, i in ids.items()}
        if len(self._known) < MAX_WORDS:
            self._known.update((w, i) for w, i in new.items() if len(w) <= MAX_WORD_CHARS)
        return new

    def _together(self, cuts: Cuts, words: list[str]) -> dict[str, list[int]]:
        """Tokenize words as one text; by halves where it is too long or its ids do not say."""
        pieces = cuts.join(words)
        text = "".join(piece for piece, _ in pieces)[cuts.space_prefix :]
        if len(words) <= 1:
            return {word: self._direct(text) for word in words}
        if len(text) <= MAX_JOINED_CHARS:
            divided = self._divide(self._direct(text), pieces)
            if divided is not None:
                return divided
        half = len(words) // 2
        return {**self._together(cuts, words[:half]), **self._together(cuts, words[half:])}

    def _divide(
        self, ids: list[int], pieces: list[tuple[str, str | None]]
    ) -> dict[str, list[int]] | None:
        """Divide a text's ids among its words; None where they stand for other bytes."""
        n_bytes = self._n_bytes
        n_bytes.update((i, len(self._tokenizer.decode([i]))) for i in set(ids).difference(n_bytes))
        sizes = [n_bytes[i] for i in ids]
        result: dict[str, list[int]] = {}
        at = 0
        for piece, word in pieces:
            start, left = at, len(piece.encode())
            while left > 0 and at < len(ids):
                left -= sizes[at]
                at += 1
            if left:
                return None
            if word is not None:
                result[word] = ids[start:at]
        return result if at == len(ids) and 0 not in sizes else None
