"""Turn conversations into token ids, and say of each token whether the model learns it.

The text is tokenized exactly as llama.cpp tokenizes the whole rendering, but for two borders:
between prompt and answer the text is cut, so that a prompt has the same ids in training and in
inference; and what stands in the contents is never read as a special token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ggft.prompts.assistant_mask import (
    MARK_CLOSE,
    MARK_OPEN,
    AssistantMask,
    Part,
    RenderAll,
    Side,
    joined,
)
from ggft.prompts.builtin import BUILTIN, KNOW_INPUT
from ggft.prompts.encoding import (
    Encoder,
    Run,
    Segment,
    SpecialToken,
    Tokenizer,
    Tokens,
    find_special,
)
from ggft.prompts.jinja import JinjaProcess, render_here
from ggft.prompts.messages import Message
from ggft.prompts.shorten import Shortener
from ggft.prompts.word_cache import WordCache
from ggft.system.errors import InputError

__all__ = ["Message", "Template", "Tokenizer", "Tokens", "make_template"]

MAX_SOURCE_BYTES = 1 << 20


class Template:
    """A prompt template bound to a tokenizer.

    Args:
        name: What the user called it.
        source: The Jinja source.
        metadata: The model's key-value pairs.
        tokenizer: The model's tokenizer; its `encode` is called from several threads.
        render: Renders conversations by the source, from several threads.

    Attributes:
        source_hash: SHA-256 of the source, written into adapters.
        stop_ids: Tokens that end a generated answer.
        end_id: The token that an answer is trained to end with.
        added_end: The same where it is put behind answers because the template writes none.
        notes: What a user should know about this template, a sentence each.
    """

    def __init__(
        self,
        name: str,
        source: str,
        metadata: Mapping[str, object],
        tokenizer: Tokenizer,
        render: RenderAll,
    ) -> None:
        self.name = name
        self.source = source
        self.source_hash = hashlib.sha256(source.encode()).hexdigest()
        self.tokenizer = tokenizer
        self.added_end: int | None = None
        self.notes: list[str] = []
        self._mask = AssistantMask(render)
        # Whether the tokenizer puts a space before text that follows a special token.
        self._space_prefix = metadata.get("tokenizer.ggml.model") == "llama" and bool(
            metadata.get("tokenizer.ggml.add_space_prefix", True)
        )
        self._shortener = Shortener(metadata)
        words = WordCache(tokenizer, metadata, space_prefix=self._space_prefix)
        self._encoder = Encoder(words.encode_all)
        self._knows_input = source in KNOW_INPUT
        self._literals: dict[str, list[str | SpecialToken]] = {}
        self._specials: dict[int, SpecialToken | None] = {}
        self._end_text = ""
        self._learn_end()

    def _learn_end(self) -> None:
        """Find out with a short conversation how the template ends an answer."""
        probe: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        parts = self._mask.split(probe, prompt=False)
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
        parts = self._mask.split(self._prepared(messages[:n]), prompt=False)
        segments = self._segments(parts, closed=True, learn_all=train_on_prompt)
        return self._encoder.tokens([segments])[0]

    def encode_turns(
        self,
        messages: Sequence[Message],
        *,
        train_on_prompt: bool = False,
        n_tokens: int = 1 << 30,
    ) -> list[Tokens]:
        """Return an example for each answer, with what is before it as context.

        For templates that write earlier turns otherwise than the last (`UnstableError`). Answers
        that would begin behind the first `n_tokens` tokens are left out.
        """
        examples: list[Tokens] = []
        for n, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("learn", True):
                context: list[Message] = [{**m, "learn": False} for m in messages[:n]]
                examples.append(
                    self.encode_example([*context, message], train_on_prompt=train_on_prompt)
                )
                if len(examples[-1].ids) > n_tokens:
                    break
        return examples

    def encode_all(
        self, examples: Sequence[Sequence[Message] | str], *, train_on_prompt: bool = False
    ) -> list[Tokens | InputError]:
        """Encode conversations and plain texts in one go; several threads may call it.

        One that cannot be encoded gives its error, one without an answer no tokens.
        """
        segments: list[list[Segment] | InputError] = []
        for parts in self._split_all(examples):
            try:
                if isinstance(parts, InputError):
                    raise parts
                if isinstance(parts, str):
                    segments.append(self._text_segments(parts))
                else:
                    segments.append(self._segments(parts, closed=True, learn_all=train_on_prompt))
            except InputError as error:
                segments.append(error)
        return self._tokens(segments)

    def shorten(self, messages: Sequence[Message], n_tokens: int) -> Sequence[Message]:
        """Return as much of a conversation as its first `n_tokens` tokens depend on."""
        return self._shortener.shorten(messages, n_tokens)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the model's next answer begins."""
        segments = self._segments(self.prompt_parts(messages))
        return self._encoder.tokens([segments])[0].ids.tolist()

    def prompt_parts(self, messages: Sequence[Message]) -> list[Part]:
        """Return fixed texts and contents of a prompt, as `encode_prompt` tokenizes them."""
        return self._mask.split(self._prepared(messages), prompt=True)

    def encode_text(self, text: str) -> Tokens:
        """Return the ids of plain text with BOS, if the model has it, and the end token."""
        return self._encoder.tokens([self._text_segments(text)])[0]

    def _prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages if self._knows_input else joined(messages)

    def _split_all(
        self, examples: Sequence[Sequence[Message] | str]
    ) -> list[list[Part] | str | InputError]:
        """Split conversations up to their last answers; plain texts stay as they are."""
        usable: list[Sequence[Message]] = []
        for example in examples:
            if not isinstance(example, str) and (n := _answered(example)):
                usable.append(self._prepared(example[:n]))
        split = iter(self._mask.split_all(usable, prompt=False))
        return [
            e if isinstance(e, str) else next(split) if _answered(e) else list[Part]()
            for e in examples
        ]

    def _tokens(self, examples: Sequence[list[Segment] | InputError]) -> list[Tokens | InputError]:
        """Tokenize examples; where one cannot be, only that one gives its error."""
        try:
            tokens = iter(
                self._encoder.tokens([e for e in examples if not isinstance(e, InputError)])
            )
        except InputError as error:
            if len(examples) == 1:
                return [error]
            return [self._tokens([e])[0] for e in examples]
        return [e if isinstance(e, InputError) else next(tokens) for e in examples]

    def _text_segments(self, text: str) -> list[Segment]:
        """Return the segments of plain text, all of which is learned."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        segments = [Segment(text, learn=True)] if text else []
        if self.tokenizer.add_bos and bos is not None:
            segments.insert(0, Segment(bos, learn=True))
        if eos is not None:
            segments.append(Segment(eos, learn=True))
        return segments

    def _segments(
        self, parts: list[Part], *, closed: bool = False, learn_all: bool = False
    ) -> list[Segment]:
        """Return the segments of parts; `closed`: the last part is the tail of the last answer."""
        if not parts:
            return []
        run = Run(self._space_prefix)
        for n, part in enumerate(parts):
            learn = part.learn
            if part.is_content:
                answer = part.side is Side.ANSWER
                run.text(part.text, part.side, learn and answer, content=True)
                if answer and self.added_end is not None:
                    run.token(self.added_end, learn)
            elif part.side is Side.TAIL:
                self._add_tail(run, part, last=closed and n == len(parts) - 1)
            else:
                for unit in self._units(part.text):
                    run.unit(unit, part.side, learn and part.side is Side.ANSWER)
        run.flush()
        segments, bos = run.segments, self.tokenizer.bos_id
        if (
            self.tokenizer.add_bos
            and bos is not None
            and not (segments and segments[0].what == bos)
        ):
            segments.insert(0, Segment(bos, learn=False))
        return [s._replace(learn=True) for s in segments] if learn_all else segments

    def _add_tail(self, run: Run, part: Part, *, last: bool) -> None:
        """Append the fixed text after an answer: the end token is learned, the rest not."""
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
    template = Template(
        name,
        source,
        metadata,
        tokenizer,
        start(source, text(tokenizer.bos_id), text(tokenizer.eos_id)),
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
        if any("\ud800" <= c <= "\udfff" for c in str(own)):
            raise InputError(
                "the model's chat template is not UTF-8",
                hint="choose another template, for example --template chatml",
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
