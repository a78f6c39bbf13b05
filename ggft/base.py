"""The base model and the data as a run sees them: checked, and as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ggft.block_scales import check_values
from ggft.corpus import Account, CorpusOptions, load_corpus
from ggft.crew import Crew
from ggft.gguf import GGUFFile, ModelInfo, check_model, read_gguf
from ggft.llamacpp import LlamaTokenizer
from ggft.templates import Template, make_template
from ggft.token_store import StoreView


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
        InputError: the file cannot be trained or has NaN in it, or the template cannot be used.
    """
    file = read_gguf(path)
    info = check_model(file)
    check_values(file)
    tokenizer = LlamaTokenizer(file.path)
    return Base(file, info, make_template(template, file.metadata, tokenizer))


@dataclass(frozen=True)
class Data:
    """Tokenized examples; `validation` is empty when nothing is held out."""

    train: StoreView
    validation: StoreView
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
    max_length: int | None,
    train_on_prompt: bool,
    check: Callable[[], None],
    val_split: float | None = 0.0,
    keep_duplicates: bool = True,
    seed: int = 42,
) -> Data:
    """Read, check and tokenize data files; `check` is called often and may raise to stop.

    Raises:
        InputError: no file, a row that is not an example, or nothing to train on.
    """
    options = CorpusOptions(
        format_name=form,
        n_ctx=base.info.n_ctx,
        max_length=max_length,
        val_split=val_split,
        train_on_prompt=train_on_prompt,
        keep_duplicates=keep_duplicates,
        seed=seed,
    )
    helpers = partial(
        Crew, base.file.path, base.template.name, train_on_prompt=options.train_on_prompt
    )
    corpus = load_corpus(paths, base.template, options, check, helpers)
    return Data(corpus.train, corpus.validation, corpus.account, corpus.max_length)
