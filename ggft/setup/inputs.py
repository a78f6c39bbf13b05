"""The base model and the data as a run sees them: checked, and as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ggft.adapters.adapter import Adapter, read_adapter
from ggft.data.account import Account
from ggft.data.batches import Course
from ggft.data.corpus import CorpusOptions, load_corpus
from ggft.data.encode import EncoderPool
from ggft.data.examples import RowOptions
from ggft.data.store import Examples, StoreView
from ggft.gguf.finite import check_and_hash
from ggft.gguf.read import GGUFFile, ModelInfo, check_model, read_gguf
from ggft.gguf.vocabulary import check_special_ids, check_vocabulary
from ggft.hub.download import find_model
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.builtin import BUILTIN, TemplateChoice
from ggft.prompts.encoding import Tokenizer
from ggft.prompts.messages import Message
from ggft.prompts.template import Template, make_template
from ggft.system.errors import InputError
from ggft.system.progress import print_note
from ggft.system.text import MAX_SHOWN


@dataclass(frozen=True)
class BaseModel:
    """The base model, seen from outside the engine.

    Attributes:
        file: Its GGUF, all shards joined.
        info: Its hyper-parameters.
        template: How conversations become prompts.
    """

    file: GGUFFile
    info: ModelInfo
    template: Template

    @property
    def name(self) -> str:
        """What the model calls itself, else its file's name."""
        return self.file.text("general.name") or self.file.path.stem


def print_warning(text: str) -> None:
    """Print a warning on stderr."""
    print_note(f"warning: {text}")


def open_model(
    model: str | Path,
    template: str | TemplateChoice = "auto",
    *,
    check: bool = True,
    warn: Callable[[str], None] = print_warning,
) -> BaseModel:
    """Check a model and bind a prompt template to it.

    Args:
        model: A GGUF file, or a name that `ggft models` lists, which is downloaded if need be.
        template: The name of a template, a file with one, or `auto`: the one that an adapter merged
            into the model was trained with, else the model's own, else the instruction template.
        check: Whether to read all of it, for NaN and infinity.
        warn: Told what a user should know.

    Raises:
        InputError: The file cannot be trained or has NaN in it, or the template cannot be used.
        NetworkError, ResourceError: It is not here, and cannot be downloaded or is too large.
    """
    return open_with_adapter(model, None, template, check=check, warn=warn)[0]


def open_with_adapter(
    model: str | Path,
    adapter: str | Path | None,
    template: str | TemplateChoice = "auto",
    *,
    check: bool = True,
    warn: Callable[[str], None] = print_warning,
) -> tuple[BaseModel, Adapter | None]:
    """Check a model and an adapter for it, and bind the template that it was trained with.

    With `check` all of the model is read, once for its values and its SHA-256 together.

    Raises:
        InputError: As `open_model`; or the adapter is for another model.
    """
    file = read_gguf(find_model(str(model)))
    info = check_model(file)
    if check:
        check_and_hash(file)
    trained = None if adapter is None else read_adapter(adapter, file)
    tokenizer = LlamaTokenizer(file.path, of_model=True)
    chosen = choose_template(template, trained, file, tokenizer, warn)
    return BaseModel(file, info, chosen), trained


def open_vocabulary(
    model: str | Path,
    template: str | TemplateChoice = "auto",
    *,
    warn: Callable[[str], None] = print_warning,
) -> tuple[GGUFFile, Template]:
    """Bind a template to the tokenizer of a model, which may have no weights.

    Raises:
        InputError: The vocabulary or the template cannot be used.
    """
    file = read_gguf(find_model(str(model)))
    check_special_ids(file, check_vocabulary(file))
    return file, choose_template(template, None, file, LlamaTokenizer(file.path), warn)


@dataclass(frozen=True)
class Data:
    """Tokenized examples.

    Attributes:
        train: Training examples.
        validation: Held-out examples; empty when nothing is held out.
        account: What became of the rows.
        max_length: Where examples were cut, tokens.
        course: What each epoch trains.
        conversations: Those of the training examples, if all are short and have one answer each.
    """

    train: StoreView
    validation: StoreView
    account: Account
    max_length: int
    course: Course
    conversations: list[list[Message]]

    @property
    def to_evaluate(self) -> StoreView:
        """The held-out examples, or all where none are held out."""
        return self.validation if len(self.validation) else self.train

    def sha256(self) -> str:
        """Return a hash of every id and mask that is trained or held out."""
        return self._hash(self.course.examples)

    def rows_sha256(self) -> str:
        """Return a hash of every id and mask of the rows, whatever is trained beside them."""
        return self._hash(self.train)

    def _hash(self, examples: Examples) -> str:
        digest = hashlib.sha256()
        for store in (examples, self.validation):
            digest.update(store.lengths.tobytes())
            for index in range(len(store.lengths)):
                ids, trained = store.get(index)
                digest.update(ids.tobytes())
                digest.update(trained.tobytes())
        return digest.hexdigest()


def load_data(
    model: BaseModel,
    data: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",  # noqa: A002
    columns: Sequence[str] = (),
    ignore_columns: Sequence[str] = (),
    max_length: int | None = None,
    val_split: float | None = None,
    train_on_prompt: bool = False,
    keep_duplicates: bool = False,
    seed: int = 42,
    check: Callable[[], None] = lambda: None,
) -> Data:
    """Read, check and tokenize data.

    Args:
        model: Whose tokenizer and template are used.
        data: Files and folders.
        format: Format of the rows; `auto` looks at each.
        columns: What columns are for, `NAME=ROLE` each; known names need none.
        ignore_columns: Columns that are left out.
        max_length: Longest example in tokens; None: chosen from the data.
        val_split: Share of the rows to hold out; None: chosen from their number.
        train_on_prompt: Whether prompts are learned, too.
        keep_duplicates: Whether rows that equal an earlier one are kept.
        seed: Seed of the choice of held-out rows.
        check: Called often; may raise to stop.

    Raises:
        InputError: No file, a row that is not an example, or nothing to train on.
    """
    options = CorpusOptions(
        rows=RowOptions(format, columns, ignore_columns),
        n_ctx=model.info.n_ctx,
        max_length=max_length,
        val_split=val_split,
        train_on_prompt=train_on_prompt,
        keep_duplicates=keep_duplicates,
        seed=seed,
    )
    helpers = partial(
        EncoderPool, model.file.path, model.template.choice, train_on_prompt=train_on_prompt
    )
    paths = [data] if isinstance(data, str | Path) else data
    corpus = load_corpus(paths, model.template, options, check, helpers)
    course = Course(corpus.train, len(corpus.train))
    return Data(
        corpus.train, corpus.validation, corpus.account, corpus.max_length, course,
        corpus.conversations,
    )  # fmt: skip


def choose_template(
    asked: str | TemplateChoice,
    adapter: Adapter | None,
    file: GGUFFile,
    tokenizer: Tokenizer,
    warn: Callable[[str], None],
) -> Template:
    """Return the template to use; `auto` is the one that was trained with.

    An adapter holds that one, and so does a model that one was merged into. What the template was
    given in training it is given again, but for what is asked otherwise.

    Raises:
        InputError: No such template, or it has another text than in training.
    """
    asked = TemplateChoice(asked) if isinstance(asked, str) else asked
    if adapter is not None and adapter.note:
        warn(adapter.note)
    name, source, arguments = asked.name, None, "{}"
    if adapter is None:
        path, trained = file.path, file.text("ggft.template")
        wanted = file.text("ggft.template_sha256")
    else:
        path, trained = adapter.path, adapter.meta.template
        wanted, source = adapter.meta.template_sha256, adapter.meta.template_source
        arguments = adapter.meta.template_arguments or "{}"
    if name == "auto":
        name = trained or "auto"
        if source is None and name not in ("auto", "gguf", *BUILTIN):
            raise InputError(
                "the adapter was trained with a template from a file, and what a model file names"
                " is not opened",
                path=path,
                found=repr(name)[:MAX_SHOWN],
                hint="give that file to --template",
            )
    else:
        source = None
    given = _arguments(arguments, path)
    if any(given.get(key, value) != value for key, value in asked.arguments.items()):
        warn("the adapter was trained with other template arguments; its answers may be worse")
    choice = replace(asked, name=name, source=source, arguments={**given, **asked.arguments})
    template = make_template(choice, file.metadata, tokenizer)
    if wanted in (None, template.source_hash):
        return template
    if asked.name == "auto":
        raise InputError(
            f"the template `{template.name}` is not the one that the adapter was trained with",
            path=path,
            found=f"SHA-256 {template.source_hash[:16]}…",
            expected=f"{str(wanted)[:16]}…",
            hint="give the template's file to --template",
        )
    warn("the adapter was trained with another template; its answers may be worse")
    return template


def _arguments(text: str, path: Path) -> dict[str, object]:
    """Return the template arguments that an adapter names."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(
            "the adapter's template arguments are no JSON object", path=path,
            found=repr(text)[:MAX_SHOWN],
        )  # fmt: skip
    return arguments
