"""Processes that encode large data, because Python threads share one interpreter lock."""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ggft.data.duplicates import RowHashes, hash_rows
from ggft.data.examples import Example
from ggft.gguf.read import read_gguf
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.builtin import TemplateChoice
from ggft.prompts.messages import Message
from ggft.prompts.template import Template, Tokens, make_template
from ggft.system.errors import GgftError, InputError, ResourceError
from ggft.system.processes import Child

N_PROCESSES = 2  # of about 100 MB each; with more, reading the rows is what takes time


class EncoderPool:
    """Encodes batches in processes of its own; several threads may call it, one for each.

    A context manager, which ends the processes.

    Args:
        model: The GGUF file whose tokenizer is used.
        template: The template, as for `make_template`.
        train_on_prompt: Whether prompts are learned, too.
        n: Number of processes.
    """

    def __init__(
        self,
        model: Path,
        template: str | TemplateChoice,
        *,
        train_on_prompt: bool,
        n: int = N_PROCESSES,
    ) -> None:
        setup = (str(model), template, train_on_prompt)
        self._idle: queue.SimpleQueue[_Member] = queue.SimpleQueue()
        self._members = [_Member(setup) for _ in range(n)]
        for member in self._members:
            self._idle.put(member)

    def __enter__(self) -> Encode:
        return self.encode

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for member in self._members:
            member.close()

    def encode(self, batch: Texts) -> Encoded:
        """Encode a batch in the next idle process.

        Raises:
            ResourceError: The process ended early.
        """
        member = self._idle.get()
        try:
            return member.encode(batch)
        finally:
            self._idle.put(member)


class _Member:
    """One process. It sets itself up while nobody waits for it.

    Args:
        setup: Model, template and whether prompts are learned.
    """

    def __init__(self, setup: tuple[str, str | TemplateChoice, bool]) -> None:
        self._process = Child("ggft.data.encode:serve")
        self.close = weakref.finalize(self, self._process.stop)
        self._is_ready = False
        self._send(setup)

    def encode(self, batch: Texts) -> Encoded:
        if not self._is_ready:
            error = self._receive()
            if isinstance(error, GgftError):
                raise error
            self._is_ready = True
        self._send(batch)
        encoded: Encoded = self._receive()
        return encoded

    def _send(self, message: object) -> None:
        try:
            pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _receive(self) -> Any:
        try:
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            raise self._ended() from None

    def _ended(self) -> ResourceError:
        return ResourceError(
            "a process that tokenizes data ended early",
            found=self._process.last_words(),
            hint="close other programs; if it happens again, give the data in smaller files",
        )


def serve() -> None:
    """Encode the batches that come on standard input until it ends."""
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer

    def send(message: object) -> None:
        pickle.dump(message, pipe_out, pickle.HIGHEST_PROTOCOL)
        pipe_out.flush()

    model, choice, train_on_prompt = pickle.load(pipe_in)
    try:
        metadata = read_gguf(model).metadata
        template = make_template(choice, metadata, LlamaTokenizer(model))
    except GgftError as error:
        send(error)
        return
    send(None)
    while True:
        try:
            batch = pickle.load(pipe_in)
        except EOFError:
            return
        send(encode_with(template, batch, train_on_prompt=train_on_prompt))


N_THREADS = min(4, os.cpu_count() or 1)
BATCH_ROWS = 64

Texts = Sequence[Sequence[Message] | str | Tokens]  # conversations, plain texts and tokens
Encoded = tuple[list[Tokens | InputError], RowHashes]
Encode = Callable[[Texts], Encoded]


def encode_with(template: Template, batch: Texts, *, train_on_prompt: bool) -> Encoded:
    """Return the tokens of rows, or what is wrong with one, and their hashes."""
    texts = [row for row in batch if not isinstance(row, Tokens)]
    encoded = iter(template.encode_all(texts, train_on_prompt=train_on_prompt))
    tokens = [
        _checked(row, template) if isinstance(row, Tokens) else next(encoded) for row in batch
    ]
    return tokens, hash_rows(batch)


def _checked(tokens: Tokens, template: Template) -> Tokens | InputError:
    """Return tokens if they are of the vocabulary."""
    n_vocab = template.tokenizer.n_vocab
    outside = next((i for i in tokens.ids if not 0 <= i < n_vocab), None)
    if outside is None:
        return tokens
    return InputError(
        "input_ids are not of this model's vocabulary",
        found=outside, expected=f"0 to {n_vocab - 1}",
        hint="tokenize the rows with this model's tokenizer, or give text",
    )  # fmt: skip


def without_end(tokens: Tokens, template: Template) -> Tokens:
    """Return a text's tokens without the end token, which stands only where a document ends."""
    if tokens.ids and tokens.ids[-1] == template.tokenizer.eos_id:
        return Tokens(tokens.ids[:-1], tokens.trained[:-1])
    return tokens


def shortened(examples: Iterator[Example], template: Template, n_tokens: int) -> Iterator[Example]:
    """Yield examples without what their first `n_tokens` tokens do not depend on.

    Plain text stays whole: all of it is learned, in pieces.
    """
    for example in examples:
        if example.text is None and example.tokens is None:
            messages = list(template.shorten(example.messages, n_tokens))
            yield Example(messages, None, example.path, example.line)
        else:
            yield example


def encode_ahead(
    examples: Iterator[Example], encode: Encode
) -> Iterator[tuple[list[Example], Encoded]]:
    """Yield batches of examples in order, each with what `encode` makes of it in a thread."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        ahead: deque[tuple[list[Example], Future[Encoded]]] = deque()
        while (batch := list(itertools.islice(examples, BATCH_ROWS))) or ahead:
            if batch:
                texts = [e.tokens or (e.messages if e.text is None else e.text) for e in batch]
                ahead.append((batch, pool.submit(encode, texts)))
                if len(ahead) <= N_THREADS:
                    continue
            done, future = ahead.popleft()
            yield done, future.result()
