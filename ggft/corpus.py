"""From data files to tokenized training and validation examples, with an account of every row.

`ggft finetune` and `ggft prepare` both stand on this, so that they drop, truncate and split alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .batching import TokenStore
from .datasets import Example
from .templates import Template


@dataclass
class Account:
    """What became of the rows.

    Attributes:
        n_rows: Rows read.
        n_kept: Rows tokenized and kept.
        n_truncated: Kept rows that were longer than the limit and lost their end.
        n_untrainable: Dropped rows without a token to learn.
        n_tokens: Tokens kept.
        n_trained: Tokens the loss counts.
    """

    n_rows: int = 0
    n_kept: int = 0
    n_truncated: int = 0
    n_untrainable: int = 0
    n_tokens: int = 0
    n_trained: int = 0
    warnings: list[str] = field(default_factory=list)


def tokenize(
    examples: Iterable[Example],
    template: Template,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    account: Account | None = None,
) -> TokenStore:
    """Tokenize examples, cut them to `max_length` tokens, and drop those with nothing to learn."""
    account = account or Account()
    store = TokenStore()
    for example in examples:
        account.n_rows += 1
        if example.text is not None:
            tokens = template.encode_text(example.text)
        else:
            tokens = template.encode_example(example.messages, train_on_prompt=train_on_prompt)
        ids, trained = tokens.ids[:max_length], tokens.trained[:max_length]
        n_trained = sum(trained[1:])
        if not n_trained:
            account.n_untrainable += 1
            continue
        store.add(ids, trained)
        account.n_kept += 1
        account.n_truncated += len(tokens.ids) > max_length
        account.n_tokens += len(ids)
        account.n_trained += n_trained
    return store
