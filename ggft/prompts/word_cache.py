"""Token ids by word, so that large data tokenizes each distinct word once.

Text is cut where no token of the vocabulary reaches over: before a space, or after a line break,
with a visible character on both sides. Neither side's ids then depend on the other: merges stay
within tokens, and none of the patterns by which llama.cpp cuts text first looks over such a place.
The new words of many texts go to the tokenizer as one text, for a call costs as much as a hundred
words; the ids are told apart by the bytes that they stand for.
"""

from __future__ import annotations

import re
import string
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain

from ggft.prompts.encoding import Tokenizer

MAX_WORDS = 1 << 16  # about 16 MB
MAX_WORD_CHARS = 32
MAX_JOINED_CHARS = 1 << 16
# Texts tokenized without the cache before it is made: it costs a look at the whole vocabulary.
N_DIRECT = 256
_LETTERS = frozenset(string.ascii_letters)
_MODELS = ("gpt2", "llama")  # vocabularies whose tokens are made by merges
# What stands for a blank in vocabularies: byte-level (GPT-2's 33 + DEL) and SentencePiece's.
_BLANK_SYMBOLS = {*map(chr, range(0x100, 0x122)), "\u2581"}
# A word that may stand beside any other, between two that must not touch.
SEPARATOR = "a"
_USER_DEFINED = 4  # token type: found in text before all else, and may swallow blanks


class Cuts:
    r"""Where text is cut into words.

    A word is written without the space before it. One at the start of a text or a line begins with
    a line break instead, and a space within a word, where text cannot be cut, is a NUL. Where the
    tokenizer puts a space before a text, the first word is written like any other.

    Example: "to be\nor  not" is cut into `\nto`, `be\n` and `\nor\0\0not`: there is no cut between
    two spaces, and a line break at the start of a word only marks where it stands.

    Args:
        before: Matches a character that a space may follow where text is cut.
        after: Matches a character that may follow that space.
        line_start: Matches a character that may follow a line break where text is cut; None if
            text is not cut there.
        space_prefix: Whether the tokenizer puts a space before a text.
    """

    def __init__(
        self, before: str, after: str, line_start: str | None, *, space_prefix: bool
    ) -> None:
        self.space_prefix = space_prefix
        self.before = re.compile(before)
        self.after = re.compile(after)
        self.line_start = re.compile(line_start) if line_start else None
        self._no_cut = re.compile(f" (?:(?!{after})|(?<!{before} ))")
        self._line_break = re.compile(f"\n(?={line_start})(?<={before}\n)")

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
            if self.line_start is None:
                return False
            word, starts = word[1:], self.line_start
        ends = word[:-1] if word[-1:] == "\n" and self.line_start else word
        return bool(starts.match(word) and self.before.match(ends[-1:]))

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
                    pieces.append((SEPARATOR, None))
                elif not (after_break or spaced):
                    pieces.append((f" {SEPARATOR}\n", None))
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
    to_space = set(re.findall("(.)[\u0120\u2581 ]", vocabulary))
    from_break = set(re.findall("[\u010a\n](.)", vocabulary))
    if not _LETTERS.isdisjoint(to_space | first | last):
        return None
    cut_lines = not (space_prefix or "\n" in last or from_break & _LETTERS)
    return Cuts(
        _visible_but(to_space | last),
        _visible_but(first),
        _visible_but(from_break | first) if cut_lines else None,
        space_prefix=space_prefix,
    )


def _visible_but(chars: set[str]) -> str:
    """Return a pattern of one visible character.

    Args:
        chars: Those left out, as a vocabulary has them. A character beyond ASCII, or the stand-in
            for a byte of one, leaves out all of these.
    """
    left_out = "".join(c for c in chars if c <= "\x7f")
    if any(c > "\x7f" and c not in _BLANK_SYMBOLS for c in chars):
        beyond = "\\x80-\\U0010ffff"
    else:
        beyond = "\u2581"  # in a text, too, SentencePiece takes it for a space
    return f"[^\\s\\x00-\\x1f\\x7f{beyond}{re.escape(left_out)}]"


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
        ids.update(self._tokenize_joined(cuts, joined))
        new = {word: array("i", i).tobytes() for word, i in ids.items()}
        if len(self._known) < MAX_WORDS:
            self._known.update((w, i) for w, i in new.items() if len(w) <= MAX_WORD_CHARS)
        return new

    def _tokenize_joined(self, cuts: Cuts, words: list[str]) -> dict[str, list[int]]:
        """Tokenize words as one text; by halves where it is too long or its ids do not say."""
        pieces = cuts.join(words)
        text = "".join(piece for piece, _ in pieces)[cuts.space_prefix :]
        if len(words) <= 1:
            return {word: self._direct(text) for word in words}
        if len(text) <= MAX_JOINED_CHARS:
            split = self._split_ids(self._direct(text), pieces)
            if split is not None:
                return split
        half = len(words) // 2
        return {
            **self._tokenize_joined(cuts, words[:half]),
            **self._tokenize_joined(cuts, words[half:]),
        }

    def _split_ids(
        self, ids: list[int], pieces: list[tuple[str, str | None]]
    ) -> dict[str, list[int]] | None:
        """Split a text's ids among its words; None where they stand for other bytes."""
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
