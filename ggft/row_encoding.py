"""Rows to tokens and fingerprints, in batches that are worked at while the next ones are read."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .chat_template import Message
from .datasets import Example
from .dedup import Prints, fingerprint
from .errors import InputError
from .templates import Template, Tokens

N_THREADS = min(4, os.cpu_count() or 1)
BATCH_ROWS = 64

Texts = Sequence[Sequence[Message] | str]  # conversations and plain texts
Encoded = tuple[list[Tokens | InputError], Prints]
Encode = Callable[[Texts], Encoded]


def encode_with(template: Template, batch: Texts, *, train_on_prompt: bool) -> Encoded:
    """Return the tokens of rows, or what is wrong with one, and their fingerprints."""
    return template.encode_all(batch, train_on_prompt=train_on_prompt), fingerprint(batch)


def encode_ahead(
    examples: Iterator[Example], encode: Encode
) -> Iterator[tuple[list[Example], Encoded]]:
    """Yield batches of examples in order, each with what `encode` makes of it in a thread."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        ahead: deque[tuple[list[Example], Future[Encoded]]] = deque()
        while (batch := list(itertools.islice(examples, BATCH_ROWS))) or ahead:
            if batch:
                texts = [e.messages if e.text is None else e.text for e in batch]
                ahead.append((batch, pool.submit(encode, texts)))
                if len(ahead) <= N_THREADS:
                    continue
            done, future = ahead.popleft()
            yield done, future.result()
