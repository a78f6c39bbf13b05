"""The base model and the data as a run sees them: checked, and as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ggft.adapters.adapter import Adapter, _text
from ggft.data.batches import Course
from ggft.data.corpus import Account, CorpusOptions, load_corpus
from ggft.data.encode import EncoderPool
from ggft.data.store import StoreView
from ggft.gguf.finite import check_values
from ggft.gguf.read import GGUFFile, ModelInfo, check_model, read_gguf
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.encoding import Tokenizer
from ggft.prompts.template import Template, make_template
from ggft.settings.training import EvalConfig
from ggft.system.errors import InputError


@dataclass(frozen=True)
class BaseModel:
    """The base model, seen from outside the engine."""

    file: GGUFFile
    info: ModelInfo
    template: Template

    @property
    def name(self) -> str:
        """What the model calls itself, else its file's name."""
        name = self.file.get("general.name")
        return name if isinstance(name, str) and name else self.file.path.stem


def open_base(path: str, template: str) -> BaseModel:
    """Check a model file and bind a prompt template to it.

    Raises:
        InputError: the file cannot be trained or has NaN in it, or the template cannot be used.
    """
    file = read_gguf(path)
    info = check_model(file)
    check_values(file)
    tokenizer = LlamaTokenizer(file.path, of_model=True)
    return BaseModel(file, info, make_template(template, file.metadata, tokenizer))


@dataclass(frozen=True)
class Data:
    """Tokenized examples; `validation` is empty when nothing is held out."""

    train: StoreView
    validation: StoreView
    account: Account
    max_length: int
    course: Course

    def sha256(self) -> str:
        """Return a hash of every id and mask."""
        digest = hashlib.sha256()
        for store in (self.course.examples, self.validation):
            digest.update(store.lengths.tobytes())
            for index in range(len(store.lengths)):
                ids, trained = store.get(index)
                digest.update(ids.tobytes())
                digest.update(trained.tobytes())
        return digest.hexdigest()


def load_data(
    paths: tuple[str, ...],
    base: BaseModel,
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
        EncoderPool, base.file.path, base.template.name, train_on_prompt=options.train_on_prompt
    )
    corpus = load_corpus(paths, base.template, options, check, helpers)
    course = Course(corpus.train, len(corpus.train))
    return Data(corpus.train, corpus.validation, corpus.account, corpus.max_length, course)


def choose_template(
    name: str,
    adapter: Adapter | None,
    file: GGUFFile,
    tokenizer: Tokenizer,
    warn: Callable[[str], None],
) -> Template:
    """Return the template to ask with; `auto` is the one that was trained with.

    An adapter says which one that was, and so does a model that one was merged into.

    Raises:
        InputError: No such template, or it has another text than in training.
    """
    from ggft.prompts.template import make_template

    if adapter is None:
        path, trained = file.path, _text(file, "ggft.template")
        wanted = _text(file, "ggft.template_sha256")
    else:
        path, trained = adapter.path, adapter.meta.template
        wanted = adapter.meta.template_sha256
    template = make_template(
        trained or "auto" if name == "auto" else name, file.metadata, tokenizer
    )
    if name == "auto":
        check_template_hash(template, path, wanted)
    elif wanted not in (None, template.source_hash):
        warn("warning: the adapter was trained with another template; answers may be worse")
    return template


def check_template_hash(template: Template, path: Path, wanted: str | None) -> None:
    """Refuse a template whose text is not the one that the adapter at `path` was trained with.

    Raises:
        InputError: The hashes differ.
    """
    if wanted not in (None, template.source_hash):
        raise InputError(
            f"the template `{template.name}` is not the one that the adapter was trained with",
            path=path,
            found=f"SHA-256 {template.source_hash[:16]}…",
            expected=f"{str(wanted)[:16]}…",
            hint="give the template's file to --template",
        )


def with_template(config: EvalConfig, adapter: Adapter) -> BaseModel:
    """Open the base with the template that the adapter was trained with, or the one asked for.

    Raises:
        InputError: the adapter's template is not what its name stands for here.
    """
    name = config.template
    if name == "auto":
        name = adapter.meta.template or "auto"
    base = open_base(config.model, name)
    if config.template == "auto":
        check_template_hash(base.template, adapter.path, adapter.meta.template_sha256)
    return base
