"""Turn conversations into token ids, and say of each token whether the model learns it.

The text is tokenized exactly as llama.cpp tokenizes the whole rendering, but for two borders:
between prompt and answer the text is cut, so that a prompt has the same ids in training and in
inference; and what stands in the contents is never read as a special token.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .builtin_templates import BUILTIN, KNOW_INPUT
from .chat_template import (
    MARK_CLOSE,
    MARK_OPEN,
    Message,
    Part,
    RenderAll,
    Side,
    Splitter,
    joined,
)
from .encoding import Run, SpecialToken, Tokenizer, Tokens, find_special
from .errors import InputError
from .jinja import JinjaProcess, render_here

__all__ = ["Message", "Template", "Tokenizer", "Tokens", "make_template"]

TOKENIZER_THREADS = min(4, os.cpu_count() or 1)
RENDER_BATCH = 64
MAX_SOURCE_BYTES = 1 << 20


class Template:
    """A prompt template bound to a tokenizer.

    Args:
        name: What the user called it.
        source: The Jinja source.
        tokenizer: The model's tokenizer; its `encode` is called from several threads.
        render: Renders conversations by the source.
        space_prefix: Whether the tokenizer puts a space before text that follows a special token.

    Attributes:
        source_hash: SHA-256 of the source, written into adapters.
        stop_ids: Tokens that end a generated answer.
        end_id: The token that an answer is trained to end with.
        added_end: The same where it is put behind answers because the template writes none.
        notes: What a user should know about this template, a sentence each.
    """

    def __init__(
        self, name: str, source: str, tokenizer: Tokenizer, render: RenderAll, *, space_prefix: bool
    ) -> None:
        self.name = name
        self.source = source
        self.source_hash = hashlib.sha256(source.encode()).hexdigest()
        self.tokenizer = tokenizer
        self.added_end: int | None = None
        self.notes: list[str] = []
        self._splitter = Splitter(render)
        self._space_prefix = space_prefix
        self._knows_input = source in KNOW_INPUT
        self._literals: dict[str, list[str | SpecialToken]] = {}
        self._literal_ids: dict[str, list[int]] = {}
        self._specials: dict[int, SpecialToken | None] = {}
        self._end_text = ""
        self._learn_end()

    def _learn_end(self) -> None:
        """Find out with a short conversation how the template ends an answer."""
        probe: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        parts = self._splitter.split(probe, prompt=False)
        t = self.tokenizer
        units = self._units("".join(p.text for p in parts if p.side is Side.TAIL))
        n = next((n for n, u in enumerate(units) if isinstance(u, SpecialToken)), None)
        if n is not None:
            ended = units[: n + 1]
            self._end_text = "".join(u if isinstance(u, str) else u.text for u in ended)
            self.end_id = [u.id for u in ended if isinstance(u, SpecialToken)][-1]
        else:
            end = t.eos_id if t.eos_id is not None else t.eot_id
            if end is None:
                raise InputError("neither the template nor the vocabulary has an end token")
            self.added_end = self.end_id = end
            self.notes.append(
                f"the template ends answers with no token of this vocabulary; {t.token_text(end)}"
                " is added to them"
            )
        known = (t.eos_id, t.eot_id, self.end_id)
        self.stop_ids = frozenset(i for i in known if i is not None)
        for part in parts:
            words = [u for u in self._units(part.text) if isinstance(u, str)]
            if not part.is_content and len(" ".join(words).split()) > 3:
                self.notes.append(f"the template adds text of its own: {' '.join(words).strip()!r}")

    def encode_example(
        self, messages: Sequence[Message], *, train_on_prompt: bool = False
    ) -> Tokens:
        """Return the ids of a conversation up to its last answer's end token.

        Turns after the last answer are left out: nothing can be learned from them.

        Args:
            messages: The conversation.
            train_on_prompt: Whether everything is learned, not only the answers.

        Raises:
            InputError: No answer, or the template cannot be split for this conversation.
        """
        n = _answered(messages)
        if not n:
            raise InputError("the conversation has no answer to learn")
        parts = self._splitter.split(self._prepared(messages[:n]), prompt=False)
        return self._encode(parts, closed=True, learn_all=train_on_prompt)

    def encode_turns(
        self, messages: Sequence[Message], *, train_on_prompt: bool = False
    ) -> list[Tokens]:
        """Return an example for each answer, with what is before it as context.

        For templates that write earlier turns otherwise than the last (`UnstableError`).
        """
        examples: list[Tokens] = []
        for n, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("learn", True):
                context: list[Message] = [{**m, "learn": False} for m in messages[:n]]
                examples.append(
                    self.encode_example([*context, message], train_on_prompt=train_on_prompt)
                )
        return examples

    def encode_examples(
        self, examples: Iterable[Sequence[Message] | str], *, train_on_prompt: bool = False
    ) -> Iterator[Tokens | InputError]:
        """Encode many conversations or plain texts, in order, rendering while threads tokenize.

        One that cannot be encoded gives its error, one without an answer no tokens.
        """

        def encode(parts: list[Part] | str | InputError) -> Tokens | InputError:
            if isinstance(parts, InputError):
                return parts
            try:
                if isinstance(parts, str):
                    return self.encode_text(parts)
                return self._encode(parts, closed=True, learn_all=train_on_prompt)
            except InputError as error:
                return error

        source = iter(examples)
        with ThreadPoolExecutor(TOKENIZER_THREADS) as pool:
            waiting: deque[Iterator[Tokens | InputError]] = deque()
            while batch := list(itertools.islice(source, RENDER_BATCH)):
                waiting.append(pool.map(encode, self._split_examples(batch), chunksize=4))
                if len(waiting) > 2:
                    yield from waiting.popleft()
            for results in waiting:
                yield from results

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the model's next answer begins."""
        return self._encode(self.prompt_parts(messages)).ids

    def prompt_parts(self, messages: Sequence[Message]) -> list[Part]:
        """Return fixed texts and contents of a prompt, as `encode_prompt` tokenizes them."""
        return self._splitter.split(self._prepared(messages), prompt=True)

    def encode_text(self, text: str) -> Tokens:
        """Return the ids of plain text with BOS, if the model has it, and the end token."""
        ids = self.tokenizer.encode(text, special=False)
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        if self.tokenizer.eos_id is not None:
            ids.append(self.tokenizer.eos_id)
        return Tokens(ids, [True] * len(ids))

    def _prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages if self._knows_input else joined(messages)

    def _split_examples(
        self, examples: list[Sequence[Message] | str]
    ) -> list[list[Part] | str | InputError]:
        """Split conversations up to their last answers; plain texts stay as they are."""
        usable: list[Sequence[Message]] = []
        for example in examples:
            if not isinstance(example, str) and (n := _answered(example)):
                usable.append(self._prepared(example[:n]))
        split = iter(self._splitter.split_all(usable, prompt=False))
        return [
            e if isinstance(e, str) else next(split) if _answered(e) else list[Part]()
            for e in examples
        ]

    def _encode(
        self, parts: list[Part], *, closed: bool = False, learn_all: bool = False
    ) -> Tokens:
        """Tokenize parts; `closed`: the last part is the tail of the last answer."""
        if not parts:
            return Tokens([], [])
        run = Run(self.tokenizer, self._space_prefix, self._literal_ids)
        for n, part in enumerate(parts):
            learn = part.learn
            if part.is_content:
                answer = part.side is Side.ANSWER
                run.text(part.text, part.side, learn and answer, content=True)
                if answer and self.added_end is not None:
                    run.token(self.added_end, learn)
            elif part.side is Side.TAIL:
                self._encode_tail(run, part, last=closed and n == len(parts) - 1)
            else:
                for unit in self._units(part.text):
                    run.unit(unit, part.side, learn and part.side is Side.ANSWER)
        run.flush()
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and run.ids[:1] != [bos]:
            run.ids.insert(0, bos)
            run.trained.insert(0, False)
        return Tokens(run.ids, [True] * len(run.ids) if learn_all else run.trained)

    def _encode_tail(self, run: Run, part: Part, *, last: bool) -> None:
        """Tokenize the fixed text after an answer: the end token is learned, the rest not."""
        if not part.text.startswith(self._end_text):
            raise InputError(
                "the chat template ends this answer otherwise than a last one",
                found=repr(part.text[:40]),
                expected=repr(self._end_text),
                hint="choose another template, for example --template chatml",
            )
        for unit in self._units(self._end_text):
            run.unit(unit, Side.ANSWER, part.learn)
        if not last:
            for unit in self._units(part.text[len(self._end_text) :]):
                run.unit(unit, Side.PROMPT, False)

    def _units(self, literal: str) -> list[str | SpecialToken]:
        """Cut fixed text at its special tokens, longest first, as llama.cpp does."""
        known = self._literals.get(literal)
        if known is not None:
            return known
        units: list[str | SpecialToken] = [literal] if literal else []
        ids = set(self.tokenizer.encode(literal, special=True))
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
        self._literals[literal] = units
        return units

    def _special(self, token: int) -> SpecialToken | None:
        if token not in self._specials:
            self._specials[token] = find_special(self.tokenizer, token)
        return self._specials[token]


def _answered(messages: Sequence[Message]) -> int:
    """Return the number of messages up to the last answer, 0 if there is none."""
    return max((n for n, m in enumerate(messages, 1) if m["role"] == "assistant"), default=0)


def make_template(name: str, metadata: Mapping[str, object], tokenizer: Tokenizer) -> Template:
    """Return the template called `name` for a model.

    Args:
        name: `auto` (the GGUF's own, else `instruction`), `gguf`, a built-in name, or a Jinja file.
        metadata: The GGUF's key-value pairs.
        tokenizer: The model's tokenizer.

    Raises:
        InputError: No such template, or one that cannot be used.
    """
    name, source = _find_source(name, metadata)
    if MARK_OPEN in source or MARK_CLOSE in source:
        raise InputError("the chat template contains the private characters U+E0C5 or U+E0C6")

    def text(token: int | None) -> str:
        return "" if token is None else tokenizer.token_text(token)

    trusted = BUILTIN.get(name) == source
    start = render_here if trusted else JinjaProcess
    spm = metadata.get("tokenizer.ggml.model") == "llama"
    template = Template(
        name,
        source,
        tokenizer,
        start(source, text(tokenizer.bos_id), text(tokenizer.eos_id)),
        space_prefix=spm and bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )
    if trusted and name != "alpaca":
        template.notes = [note for note in template.notes if "of its own" not in note]
    return template


def _find_source(name: str, metadata: Mapping[str, object]) -> tuple[str, str]:
    """Return name and Jinja source of a template."""
    own = metadata.get("tokenizer.chat_template")
    usable = isinstance(own, str) and bool(own.strip())
    if name == "auto":
        name = "gguf" if usable else "instruction"
    if name == "gguf":
        if not usable:
            raise InputError(
                "this model has no chat template of its own", hint="choose one with --template"
            )
        return name, str(own)
    if name in BUILTIN:
        return name, BUILTIN[name]
    path = Path(name)
    if not path.is_file():
        raise InputError(
            "no such template",
            found=repr(name),
            expected="auto, gguf, " + ", ".join(BUILTIN) + ", or a Jinja file",
        )
    try:
        with path.open("rb") as file:
            return name, file.read(MAX_SOURCE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the template: {e}", path=path) from None
