"""Turn conversations into token ids, and say of each token whether the model learns it.

The text is tokenized exactly as llama.cpp tokenizes the whole rendering, but for two borders:
between prompt and answer the text is cut, so that a prompt has the same ids in training and in
inference; and what stands in the contents is never read as a special token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ggft.prompts.assistant_mask import AssistantMask, Part
from ggft.prompts.builtin import BUILTIN, KNOW_INPUT, TemplateChoice, find_source
from ggft.prompts.dialect import RenderAll, Thoughts, learn_dialect
from ggft.prompts.encoding import (
    Encoder,
    Run,
    Segment,
    SpecialToken,
    Tokenizer,
    Tokens,
)
from ggft.prompts.endings import Endings, Units
from ggft.prompts.jinja import JinjaProcess, render_here
from ggft.prompts.marks import MARK_CLOSE, MARK_OPEN, Side
from ggft.prompts.messages import Message, joined
from ggft.prompts.shorten import Shortener
from ggft.prompts.thoughts import dropped, split_thought
from ggft.prompts.word_cache import WordCache
from ggft.system.errors import InputError

__all__ = ["Message", "Template", "Tokenizer", "Tokens", "make_template"]


class Template:
    """A prompt template bound to a tokenizer.

    Args:
        choice: Which one it is, its source included, and how it is used.
        metadata: The model's key-value pairs.
        tokenizer: The model's tokenizer; its `encode` is called from several threads.
        render: Renders conversations by the choice, from several threads.

    Attributes:
        choice: As given.
        dialect: How the template is spoken to.
        source_hash: SHA-256 of the source, written into adapters.
        stop_ids: Tokens that end a generated answer.
        end_id: The token that an answer is trained to end with.
        added_end: The same where it is put behind answers because the template writes none.
        notes: What a user should know about this template, a sentence each.
    """

    def __init__(
        self,
        choice: TemplateChoice,
        metadata: Mapping[str, object],
        tokenizer: Tokenizer,
        render: RenderAll,
    ) -> None:
        self.choice = choice
        self.name = choice.name
        self.source = source = choice.source or ""
        self.source_hash = hashlib.sha256(source.encode()).hexdigest()
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        # Whether the tokenizer puts a space before text that follows a special token.
        self._space_prefix = metadata.get("tokenizer.ggml.model") == "llama" and bool(
            metadata.get("tokenizer.ggml.add_space_prefix", True)
        )
        self._shortener = Shortener(metadata)
        words = WordCache(tokenizer, metadata, space_prefix=self._space_prefix)
        self._encoder = Encoder(words.encode_all)
        self._knows_input = source in KNOW_INPUT
        self._units = Units(tokenizer)
        self.dialect = learn_dialect(render, source)
        ends = Endings(self._units, tokenizer, self.dialect)
        self.end_id, self.added_end = ends.end_id, ends.added
        if self.added_end is not None:
            self.notes.append(
                "the template ends answers with no token of this vocabulary;"
                f" {tokenizer.token_text(self.added_end)} is added to them"
            )
        known = (tokenizer.eos_id, tokenizer.eot_id, self.end_id)
        self.stop_ids = frozenset(i for i in known if i is not None)
        self._mask = AssistantMask(render, self.dialect, ends.end_of, ends.implied)
        self._probe()

    def _probe(self) -> None:
        """Try a short conversation, and note what the template adds to it."""
        probe: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        parts = self._mask.split(probe, prompt=False)
        self._lead = _before_content(parts, 0)
        with_thought: Message = {**probe[1], "reasoning": "c"}
        self._around_thought = ("", "")
        with contextlib.suppress(InputError):
            thought = self._mask.split([probe[0], with_thought], prompt=False)
            self._around_thought = _before_content(thought, 0), _before_content(thought, 1)
        for part in parts:
            words = [u for u in self._units.of(part.text) if isinstance(u, str)]
            if not part.is_content and len(" ".join(words).split()) > 3:
                self.notes.append(f"the template adds text of its own: {' '.join(words).strip()!r}")

    def record(self) -> dict[str, str]:
        """Return what an adapter keeps of this template: itself, and how it was used."""
        return {
            "template": self.name,
            "template_sha256": self.source_hash,
            "template_source": self.source,
            "template_arguments": json.dumps(dict(self.choice.arguments)),
        }

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
        segments = self._segments(parts, learn_all=train_on_prompt)
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
                    segments.append(self._segments(parts, learn_all=train_on_prompt))
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

    def read_answer(self, text: str) -> Message:
        """Return what a model wrote as the turn that the template expects in later prompts.

        Args:
            text: The answer without its end token, with the texts of control tokens.
        """
        body = text.lstrip()
        opening, closing = (mark.strip() for mark in self._around_thought)
        answer: Message = {"role": "assistant", "content": ""}
        if self.dialect.thoughts is Thoughts.TEXT:
            body = text
        elif closing and closing in body and body.startswith(opening):
            thought, _, body = body.removeprefix(opening).partition(closing)
            if thought := self._words_of(thought).strip():
                answer["reasoning"] = thought
        else:
            body = body.removeprefix(self._lead.strip())
        answer["content"] = self._words_of(body).lstrip()
        return answer

    def _words_of(self, text: str) -> str:
        """Return a text without the names of control tokens."""
        return "".join(unit for unit in self._units.cut(text) if isinstance(unit, str))

    def encode_text(self, text: str) -> Tokens:
        """Return the ids of plain text with BOS, if the model has it, and the end token."""
        return self._encoder.tokens([self._text_segments(text)])[0]

    def _prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return messages as the template can be given them."""
        messages = messages if self._knows_input else joined(messages)
        thinking = self.choice.thinking
        if thinking != "keep":
            messages = dropped(messages, empty=thinking == "empty")
        elif self.dialect.thoughts is not Thoughts.TEXT:
            messages = [split_thought(m) if m["role"] == "assistant" else m for m in messages]
        if any(m.keys() & _OF_TOOLS for m in messages):
            self._check_tools(messages)
        return messages

    def _check_tools(self, messages: Sequence[Message]) -> None:
        """Refuse control tokens in what templates write as their own text."""
        own = [{k: v for k, v in m.items() if k in _OF_TOOLS} for m in messages]
        text = json.dumps(own, ensure_ascii=False)
        if any(isinstance(unit, SpecialToken) for unit in self._units.cut(text)):
            raise InputError(
                "the tools, calls or documents of this row hold the text of a control token",
                hint="write it otherwise, or leave the row out",
            )

    def _split_all(
        self, examples: Sequence[Sequence[Message] | str]
    ) -> list[list[Part] | str | InputError]:
        """Split conversations up to their last answers; plain texts stay as they are."""
        results: list[list[Part] | str | InputError] = []
        usable: list[Sequence[Message]] = []
        places: list[int] = []
        for example in examples:
            results.append(example if isinstance(example, str) else [])
            if isinstance(example, str) or not (n := _answered(example)):
                continue
            try:
                usable.append(self._prepared(example[:n]))
                places.append(len(results) - 1)
            except InputError as error:
                results[-1] = error
        for place, parts in zip(places, self._mask.split_all(usable, prompt=False), strict=True):
            results[place] = parts
        return results

    def _tokens(self, examples: Sequence[list[Segment] | InputError]) -> list[Tokens | InputError]:
        """Tokenize examples; where one cannot be, only that one gives its error."""
        try:
            tokens = iter(
                self._encoder.tokens([e for e in examples if not isinstance(e, InputError)])
            )
        except InputError as error:
            return [error] if len(examples) == 1 else [self._tokens([e])[0] for e in examples]
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

    def _segments(self, parts: list[Part], *, learn_all: bool = False) -> list[Segment]:
        """Return the segments of parts."""
        if not parts:
            return []
        run = Run(self._space_prefix)
        for part in parts:
            side = Side.PROMPT if part.side is Side.PROMPT else Side.ANSWER
            learn = part.learn and side is Side.ANSWER
            if part.is_content:
                run.text(part.text, side, learn, content=True)
            elif part.text:
                for unit in self._units.of(part.text):
                    run.unit(unit, side, learn)
            else:
                run.token(self.end_id, learn)
        run.flush()
        segments, bos = run.segments, self.tokenizer.bos_id
        if (
            self.tokenizer.add_bos
            and bos is not None
            and not (segments and segments[0].what == bos)
        ):
            segments.insert(0, Segment(bos, learn=False))
        return [s._replace(learn=True) for s in segments] if learn_all else segments


_OF_TOOLS = frozenset(("tools", "tool_calls", "documents", "name", "tool_call_id"))


def _before_content(parts: Sequence[Part], n: int) -> str:
    """Return the fixed text in front of the answer's content number `n`."""
    answer = [part for part in parts if part.side is Side.ANSWER]
    places = [i for i, part in enumerate(answer) if part.is_content]
    if len(places) <= n:
        return ""
    start = places[n - 1] + 1 if n else 0
    return "".join(part.text for part in answer[start : places[n]])


def _answered(messages: Sequence[Message]) -> int:
    """Return the number of messages up to the last answer, 0 if there is none."""
    return max((n for n, m in enumerate(messages, 1) if m["role"] == "assistant"), default=0)


def make_template(
    choice: str | TemplateChoice, metadata: Mapping[str, object], tokenizer: Tokenizer
) -> Template:
    """Return a template for a model.

    Args:
        choice: Which one and how, or only its name.
        metadata: The GGUF's key-value pairs.
        tokenizer: The model's tokenizer.

    Raises:
        InputError: No such template, or one that cannot be used.
    """
    if isinstance(choice, str):
        choice = TemplateChoice(choice)
    name, source = choice.name, choice.source
    if source is None:
        name, source = find_source(name, metadata)
    if MARK_OPEN in source or MARK_CLOSE in source:
        raise InputError("the chat template contains the private characters U+E0C5 or U+E0C6")

    def text(token: int | None) -> str:
        return "" if token is None else tokenizer.token_text(token)

    trusted = source in BUILTIN.values()
    start: Any = render_here if trusted else JinjaProcess
    render = start(source, text(tokenizer.bos_id), text(tokenizer.eos_id), choice.arguments)
    chosen = replace(choice, name=name, source=source)
    template = Template(chosen, metadata, tokenizer, render)
    if trusted and source != BUILTIN["alpaca"]:
        template.notes = [note for note in template.notes if "of its own" not in note]
    if choice.name == "auto" and name == "llama2":
        template.notes.append("a Llama 2 chat model without a template: llama2 is used")
    return template
