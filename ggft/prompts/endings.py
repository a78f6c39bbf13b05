"""The special tokens in a template's own text, and which of them ends an answer."""

from __future__ import annotations

from ggft.prompts.dialect import Dialect
from ggft.prompts.encoding import SpecialToken, Tokenizer, find_special
from ggft.system.errors import InputError

MAX_LITERALS = 4096  # fixed texts whose units are kept


class Units:
    """Cuts texts at the special tokens of a vocabulary.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._literals: dict[str, list[str | SpecialToken]] = {}
        self._specials: dict[int, SpecialToken | None] = {}

    def of(self, literal: str) -> list[str | SpecialToken]:
        """Cut fixed text at its special tokens."""
        known = self._literals.get(literal)
        if known is None:
            if len(self._literals) >= MAX_LITERALS:
                self._literals.clear()
            known = self._literals[literal] = self.cut(literal)
        return known

    def cut(self, literal: str) -> list[str | SpecialToken]:
        """Cut a text at its special tokens, longest first, as llama.cpp does."""
        units: list[str | SpecialToken] = [literal] if literal else []
        ids = set(self._tokenizer.encode(literal, special=True))
        specials = [s for s in (self._special(i) for i in ids) if s is not None]
        for s in sorted(specials, key=lambda s: -len(s.text)):
            cut: list[str | SpecialToken] = []
            for unit in units:
                if isinstance(unit, SpecialToken):
                    cut.append(unit)
                    continue
                for n, piece in enumerate(unit.split(s.text)):
                    cut.extend([s] if n else [])
                    cut.extend([piece] if piece else [])
            units = cut
        return units

    def _special(self, token: int) -> SpecialToken | None:
        if token not in self._specials:
            self._specials[token] = find_special(self._tokenizer, token)
        return self._specials[token]


class Endings:
    """Where a template ends answers.

    Args:
        units: Cuts texts at special tokens.
        tokenizer: The model's tokenizer.
        dialect: Says what the template writes behind answers.

    Attributes:
        end_id: The token that an answer is trained to end with.
        added: The same where it is put behind answers because the template writes none.
        implied: The text that ends a last answer where the template writes none; may be empty.
    """

    def __init__(self, units: Units, tokenizer: Tokenizer, dialect: Dialect) -> None:
        self._units = units
        known = (tokenizer.eos_id, tokenizer.eot_id)
        self._end_ids = tokenizer.end_ids.union(i for i in known if i is not None)
        self._text = self._until_end(dialect.last_tail, any_special=True)
        self.implied = ""
        if not self._text:
            self.implied = self._until_end(dialect.later_tail, any_special=False)
        self.added: int | None = None
        text = self._text or self.implied
        if text:
            ended = units.of(text)
            self.end_id = [u.id for u in ended if isinstance(u, SpecialToken)][-1]
            return
        end = next((i for i in known if i is not None), None)
        if end is None:
            raise InputError("neither the template nor the vocabulary has an end token")
        self.added = self.end_id = end

    def _until_end(self, tail: str, *, any_special: bool) -> str:
        """Return the beginning of a tail up to its first token that ends a generation.

        With `any_special`, a tail without such a token ends at its first special one.
        """
        stop = first = at = 0
        for unit in self._units.of(tail):
            at += len(unit if isinstance(unit, str) else unit.text)
            if isinstance(unit, SpecialToken):
                first = first or at
                if unit.id in self._end_ids:
                    stop = at
                    break
        return tail[: stop or (first if any_special else 0)]

    def end_of(self, tail: str, calls: bool) -> int | None:
        """Return where an answer ends in the fixed text behind its content; see AssistantMask."""
        if not calls and self._text and tail.startswith(self._text):
            return len(self._text)
        if end := self._until_end(tail, any_special=not calls and bool(self._text)):
            return len(end)
        if calls and self._text and (place := tail.rfind(self._text)) >= 0:
            return place + len(self._text)
        return None
