"""Turn conversations into token ids, and say of each token whether the model learns it.

The text is tokenized exactly as llama.cpp tokenizes the whole rendering, but for two borders:
between prompt and answer the text is cut, so that a prompt has the same ids in training and in
inference; and what stands in the contents is never read as a special token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .chat_template import Message, Part, Side, Splitter, compile_template, joined
from .errors import InputError


class Tokenizer(Protocol):
    """What templates need of a tokenizer; `ggft.llamacpp.LlamaTokenizer` is one."""

    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    n_vocab: int
    add_bos: bool

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return token ids without BOS; parse special tokens in the text only if `special`."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of ids."""
        ...

    def token_text(self, token: int) -> str:
        """Return a token's text as the vocabulary has it."""
        ...


@dataclass(frozen=True)
class Tokens:
    """An example as token ids; `trained[i]`: the model learns to produce token i."""

    ids: list[int]
    trained: list[bool]

    @property
    def n_trained(self) -> int:
        """Number of tokens that count in the loss (the first token is never predicted)."""
        return sum(self.trained[1:])


BUILTIN = {
    "instruction": (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n"
        "{% else %}{% if loop.index0 and messages[loop.index0 - 1].role == 'assistant' %}\n\n"
        "{% endif %}"
        "Instruction: {{ m.content }}\n{% if m.input %}Input: {{ m.input }}\n{% endif %}Output:"
        "{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@dataclass(frozen=True)
class _Special:
    """A special token in a template's fixed text, and the blanks that it swallows."""

    id: int
    text: str
    strips_left: bool
    strips_right: bool


@dataclass
class Template:
    """A prompt template bound to a tokenizer.

    Attributes:
        name: What the user called it.
        source: The Jinja source.
        source_hash: SHA-256 of the source, written into adapters.
        stop_ids: Tokens that end a generated answer.
    """

    name: str
    source: str
    tokenizer: Tokenizer
    space_prefix: bool
    knows_input: bool
    splitter: Splitter
    source_hash: str = field(init=False)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.source_hash = hashlib.sha256(self.source.encode()).hexdigest()
        t = self.tokenizer
        self._ends = {i for i in (t.eos_id, t.eot_id) if i is not None}
        self._literals: dict[str, list[str | _Special]] = {}
        self._specials: dict[int, _Special | None] = {}
        probe: list[Message] = [{"role": "user", "content": "a"}]
        tail = self._tail(self._split([*probe, {"role": "assistant", "content": "b"}], False))
        self._end_text = tail
        units = self._units(tail)
        self.stop_ids = frozenset(self._ends | {u.id for u in units if isinstance(u, _Special)})
        self._closing: int | None = None
        if not units:
            self._closing = t.eos_id if t.eos_id is not None else t.eot_id
            if self._closing is None:
                raise InputError("neither the template nor the vocabulary has an end token")

    def encode_example(
        self, messages: Sequence[Message], *, train_on_prompt: bool = False
    ) -> Tokens:
        """Return the ids of a conversation up to its last answer's end token.

        Turns after the last answer are left out: nothing can be learned from them.

        Raises:
            InputError: No answer, or the template cannot be split for this conversation.
        """
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        if last < 0:
            raise InputError("the conversation has no answer to learn")
        parts = self._split(messages[: last + 1], False)
        ids, trained = self._encode(parts, closed=True)
        if train_on_prompt:
            trained = [True] * len(ids)
        return Tokens(ids, trained)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the model's next answer begins."""
        return self._encode(self._split(messages, True), closed=False)[0]

    def encode_text(self, text: str) -> Tokens:
        """Return the ids of plain text with BOS, if the model has it, and the end token."""
        ids = self.tokenizer.encode(text, special=False)
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        if self.tokenizer.eos_id is not None:
            ids.append(self.tokenizer.eos_id)
        return Tokens(ids, [True] * len(ids))

    def _split(self, messages: Sequence[Message], prompt: bool) -> list[Part]:
        if not self.knows_input:
            return self.splitter.split(joined(messages), prompt=prompt)
        return self.splitter.split(messages, prompt=prompt)

    def _tail(self, parts: list[Part]) -> str:
        """Return the fixed text after the last answer, up to and with the end token."""
        text = "".join(p.text for p in parts if p.side is Side.TAIL)
        units = self._units(text)
        for n, u in enumerate(units):
            if isinstance(u, _Special):
                return "".join(v if isinstance(v, str) else v.text for v in units[: n + 1])
        return ""

    def _encode(self, parts: list[Part], *, closed: bool) -> tuple[list[int], list[bool]]:
        """Tokenize parts; `closed`: the last part is the tail of the last answer."""
        run = _Run(self.tokenizer, self.space_prefix)
        for n, part in enumerate(parts):
            if part.is_content:
                run.text(part.text, part.side is Side.ANSWER)
            elif part.side is Side.TAIL:
                self._encode_tail(run, part.text, last=closed and n == len(parts) - 1)
            else:
                for unit in self._units(part.text):
                    run.unit(unit, part.side is Side.ANSWER)
        run.flush()
        if closed and self._closing is not None:
            run.ids.append(self._closing)
            run.trained.append(True)
        ids, trained = run.ids, run.trained
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids, trained = [bos, *ids], [False, *trained]
        return ids, trained

    def _encode_tail(self, run: _Run, text: str, *, last: bool) -> None:
        if not text.startswith(self._end_text):
            raise InputError(
                "the chat template ends this answer otherwise than the last answer",
                found=repr(text[:40]),
                expected=repr(self._end_text),
                hint="choose another template, for example --template chatml",
            )
        for unit in self._units(self._end_text):
            run.unit(unit, True)
        if not last:
            for unit in self._units(text[len(self._end_text) :]):
                run.unit(unit, False)

    def _units(self, literal: str) -> list[str | _Special]:
        """Cut fixed text at its special tokens, longest first, as llama.cpp does."""
        known = self._literals.get(literal)
        if known is not None:
            return known
        units: list[str | _Special] = [literal] if literal else []
        ids = set(self.tokenizer.encode(literal, special=True))
        specials = [s for s in (self._special(i) for i in ids) if s is not None]
        for s in sorted(specials, key=lambda s: -len(s.text)):
            cut: list[str | _Special] = []
            for unit in units:
                if isinstance(unit, _Special):
                    cut.append(unit)
                    continue
                for n, piece in enumerate(unit.split(s.text)):
                    cut.extend([s] if n else [])
                    cut.extend([piece] if piece else [])
            units = cut
        self._literals[literal] = units
        return units

    def _special(self, token: int) -> _Special | None:
        """Return what is to be known of a token if it is special, else None."""
        if token not in self._specials:
            encode, text = self.tokenizer.encode, self.tokenizer.token_text(token)
            special = None
            if (
                text
                and encode(text, special=True) == [token]
                and encode(text, special=False) != [token]
            ):
                special = _Special(
                    token,
                    text,
                    strips_left=encode("x \n" + text, special=True)[:-1]
                    != encode("x \n", special=False),
                    strips_right=encode(text + "\n x", special=True)[1:]
                    != encode("\n x", special=False),
                )
            self._specials[token] = special
        return self._specials[token]


class _Run:
    """Collect text between special tokens, and tokenize it in one piece."""

    def __init__(self, tokenizer: Tokenizer, space_prefix: bool) -> None:
        self._tokenizer = tokenizer
        self._space_prefix = space_prefix
        self._text: list[str] = []
        self._side = False
        self._fresh = True  # whether the text begins at the start or after a special token
        self._strip = False
        self.ids: list[int] = []
        self.trained: list[bool] = []

    def unit(self, unit: str | _Special, trained: bool) -> None:
        if isinstance(unit, str):
            self.text(unit, trained)
            return
        self.flush(strip_right=unit.strips_left)
        self.ids.append(unit.id)
        self.trained.append(trained)
        self._fresh, self._strip = True, unit.strips_right

    def text(self, text: str, trained: bool) -> None:
        if trained != self._side:
            self.flush()
            self._side = trained
        self._text.append(text)

    def flush(self, *, strip_right: bool = False) -> None:
        text = "".join(self._text)
        self._text.clear()
        if self._strip:
            text = text.lstrip(" \t\n\r\v\f")
        if strip_right:
            text = text.rstrip(" \t\n\r\v\f")
        if not text:
            return
        if self._fresh or not self._space_prefix:
            ids = self._tokenizer.encode(text, special=False)
        else:
            ids = encode_continuation(self._tokenizer, text)
        self._fresh = self._strip = False
        self.ids += ids
        self.trained += [self._side] * len(ids)


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize text that goes on after other text, for a tokenizer that begins with a space.

    A control character stands in for the text before: it merges with nothing.
    """
    before = tokenizer.encode("\x02", special=False)
    ids = tokenizer.encode("\x02" + text, special=False)
    if ids[: len(before)] != before:
        raise InputError("this vocabulary merges control characters with text")
    return ids[len(before) :]


def make_template(name: str, metadata: Mapping[str, object], tokenizer: Tokenizer) -> Template:
    """Return the template called `name` for a model.

    Args:
        name: `auto` (the GGUF's own, else `instruction`), a built-in name, or a Jinja file.
        metadata: The GGUF's key-value pairs.
        tokenizer: The model's tokenizer.

    Raises:
        InputError: No such template, or one that cannot be used.
    """
    own = metadata.get("tokenizer.chat_template")
    if name == "auto":
        source = own if isinstance(own, str) and own.strip() else BUILTIN["instruction"]
        name = "gguf" if source is own else "instruction"
    elif name == "gguf":
        if not isinstance(own, str) or not own.strip():
            raise InputError("this model has no chat template of its own", hint="--template auto")
        source = own
    elif name in BUILTIN:
        source = BUILTIN[name]
    elif Path(name).is_file():
        source = Path(name).read_text(encoding="utf-8")
    else:
        raise InputError(
            "no such template",
            found=repr(name),
            expected="auto, gguf, " + ", ".join(BUILTIN) + ", or a Jinja file",
        )

    def text(token: int | None) -> str:
        return "" if token is None else tokenizer.token_text(token)

    spm = metadata.get("tokenizer.ggml.model") == "llama"
    return Template(
        name=name,
        source=source,
        tokenizer=tokenizer,
        space_prefix=spm and bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        knows_input=source == BUILTIN["instruction"],
        splitter=Splitter(
            compile_template(source, bos=text(tokenizer.bos_id), eos=text(tokenizer.eos_id))
        ),
    )
