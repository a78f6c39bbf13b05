"""The base model and the data as a run sees them: checked, and as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ggft.batching import TokenStore
from ggft.corpus import Account, tokenize
from ggft.datasets import load_examples
from ggft.errors import InputError
from ggft.gguf import GGUFFile, ModelInfo, check_model, read_gguf
from ggft.llamacpp import LlamaTokenizer
from ggft.templates import Template, make_template


@dataclass(frozen=True)
class Base:
    """The base model, seen from outside the engine."""

    file: GGUFFile
    info: ModelInfo
    template: Template

    @property
    def name(self) -> str:
        """What the model calls itself, else its file's name."""
        name = self.file.get("general.name")
        return name if isinstance(name, str) and name else self.file.path.stem


def open_base(path: str, template: str) -> Base:
    """Check a model file and bind a prompt template to it.

    Raises:
        InputError: the file cannot be trained, or the template not be used.
    """
    file = read_gguf(path)
    info = check_model(file)
    tokenizer = LlamaTokenizer(file.path)
    return Base(file, info, make_template(template, file.metadata, tokenizer))


@dataclass(frozen=True)
class Data:
    """Tokenized examples; `validation` is empty when nothing is held out."""

    train: TokenStore
    validation: TokenStore
    account: Account
    max_length: int

    def sha256(self) -> str:
        """Return a hash of every id and mask."""
        digest = hashlib.sha256()
        for store in (self.train, self.validation):
            digest.update(store.lengths.tobytes())
            for index in range(len(store)):
                ids, trained = store.get(index)
                digest.update(ids.tobytes())
                digest.update(trained.tobytes())
        return digest.hexdigest()


def load_data(
    paths: tuple[str, ...],
    base: Base,
    *,
    form: str,
    max_length: int,
    train_on_prompt: bool,
    check: Callable[[], None],
) -> Data:
    """Read, check and tokenize data files; `check` is called often and may raise to stop.

    Raises:
        InputError: no file, a row that is not an example, or nothing to train on.
    """
    if not paths:
        raise InputError("no data is given", hint="name a file with --data")
    account = Account()
    max_length = min(max_length, base.info.n_ctx)

    def examples() -> Iterator[Any]:
        for example in load_examples(paths, form):
            check()
            yield example

    train = tokenize(
        examples(),
        base.template,
        max_length=max_length,
        train_on_prompt=train_on_prompt,
        account=account,
    )
    if not len(train):
        raise InputError(
            "the data holds nothing to train on",
            path=paths[0],
            found=f"{account.n_rows} rows, {account.n_untrainable} without a trained token",
            hint="see what is trained with `ggft prepare --preview 3`",
        )
    return Data(train, TokenStore(), account, max_length)
