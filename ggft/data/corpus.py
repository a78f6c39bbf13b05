"""From data files to tokenized training and validation examples, with an account of every row.

`ggft finetune` and `ggft prepare` both stand on this, so that they drop, cut and split alike.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.data.account import Account
from ggft.data.advice import (
    MANY_ROWS,
    choose_max_length,
    held_out_rows,
    kind_of_texts,
    wordings_of_texts,
)
from ggft.data.duplicates import Duplicates, HashTable, split
from ggft.data.encode import Encode, encode_ahead, encode_with, shortened, without_end
from ggft.data.examples import AS_FOUND, Example, RowOptions, RowReader
from ggft.data.sources.find import DataFiles, find_files, size_of
from ggft.data.store import RowTable, StoreView, TokenStore
from ggft.prompts.assistant_mask import UnstableError
from ggft.prompts.messages import Message
from ggft.prompts.template import Template, Tokens
from ggft.system.errors import InputError
from ggft.system.progress import BAR_DELAY_S, ByteBar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    IntArray = npt.NDArray[np.int64]
    BoolArray = npt.NDArray[np.bool_]

TEXT_TOKENS = 1024  # plain text is cut into pieces of this, if the user gives no length
LARGE_BYTES = 8 << 20  # of files that are worth a second to start helpers


@dataclass(frozen=True)
class CorpusOptions:
    """How data is read.

    Attributes:
        rows: What rows are called and which of their columns are used.
        n_ctx: The model's context in tokens.
        max_length: Longest example in tokens; None: chosen from the data.
        val_split: Share of rows to hold out; None: chosen from the number of rows.
        train_on_prompt: Whether prompts are learned, too.
        keep_duplicates: Whether equal rows are all kept.
        seed: Seed of the choice of held-out rows.
        keep_tokens: Whether token ids are kept; without, everything is only counted.
    """

    rows: RowOptions = AS_FOUND
    n_ctx: int = 1 << 30
    max_length: int | None = None
    val_split: float | None = None
    train_on_prompt: bool = False
    keep_duplicates: bool = False
    seed: int = 42
    keep_tokens: bool = True


class Fate(IntEnum):
    """What becomes of a row."""

    TRAIN = 0
    VALID = 1
    DUPLICATE = 2  # equal to an earlier row, dropped
    UNTRAINABLE = 3  # no token to learn, dropped
    BEYOND_SHARE = 4  # more of its source than its share asks


@dataclass(frozen=True)
class Corpus:
    """Tokenized data.

    Attributes:
        train: Training examples.
        validation: Held-out examples; empty when nothing is held out.
        account: What became of the rows.
        max_length: Where examples were cut.
        fate: A `Fate` for each row, in the order of the files; (N,).
        duplicates: What rows have to do with one another.
        table: Where the rows are.
        conversations: Those of the training examples, if all are short and have one answer each.
        row_tokens: Tokens that each row has in an epoch; (N,).
    """

    train: StoreView
    validation: StoreView
    account: Account
    max_length: int
    fate: npt.NDArray[np.uint8]
    duplicates: Duplicates
    table: RowTable
    conversations: list[list[Message]]
    row_tokens: IntArray


def load_corpus(
    paths: Iterable[str | Path],
    template: Template,
    options: CorpusOptions,
    check: Callable[[], None] = lambda: None,
    helpers: Callable[[], AbstractContextManager[Encode]] | None = None,
) -> Corpus:
    """Read, check, tokenize, deduplicate, cut and split data.

    Args:
        paths: Files and folders.
        template: Renders and tokenizes conversations.
        options: How data is read.
        check: Called for every row; may raise to stop.
        helpers: Makes what encodes the rows of large data in this function's stead, in several
            threads at a time, and with the same result.

    Raises:
        InputError: A file cannot be read, a row is not an example, or nothing is left.
    """
    reader = RowReader(options.rows)
    files = find_files(paths)
    encode = partial(encode_with, template, train_on_prompt=options.train_on_prompt)
    n_bytes = sum(size_of(path) for path in (*files.train, *files.valid))
    with (
        helpers() if helpers and n_bytes > LARGE_BYTES else nullcontext(encode) as encoding,
        ByteBar("reading data", n_bytes, delay_s=BAR_DELAY_S) as bar,
    ):
        loader = _Loader(files, reader, template, options, check, encoding)
        before = 0
        for number, path in enumerate(loader.table.paths):
            loader.read(number, path, partial(bar.move_to, after=before))
            before += size_of(path)
    return loader.finish()


class _Loader:
    """The work of `load_corpus`: read everything once, then decide row by row."""

    def __init__(
        self,
        files: DataFiles,
        reader: RowReader,
        template: Template,
        options: CorpusOptions,
        check: Callable[[], None],
        encode: Encode,
    ) -> None:
        self.files = files
        self.reader = reader
        self.template = template
        self.options = options
        self.check = check
        self.encode = encode
        self.n_tokens = min(options.max_length or options.n_ctx, options.n_ctx)  # at most used
        self.account = Account()
        self.table = RowTable([*files.train, *files.valid])
        self.hashes = HashTable()
        self.store = TokenStore(keep=options.keep_tokens)
        self.row_of = array("q")  # of each example; a long text is several
        self.texts: list[list[Message] | None] = []

    def finish(self) -> Corpus:
        """Return the corpus of all that was read."""
        import numpy as np

        account, n = self.account, len(self.table)
        account.n_rows = n
        account.notes += self.reader.notes()
        account.unused = dict(self.reader.unused)
        self._kind = kind_of_texts(self.texts)
        account.row_kind, account.n_wordings = self._kind[0], wordings_of_texts(self.texts)
        duplicates = self.hashes.duplicates()
        row_of = np.array(self.row_of, np.int64)
        max_length = self._max_length()
        counts = (self.store.n_trained(i, max_length) for i in range(len(self.store)))
        n_trained = np.fromiter(counts, np.int64, len(self.store))
        example_trainable = n_trained > 0
        is_trainable = np.zeros(n, np.bool_)
        is_trainable[row_of[example_trainable]] = True
        from_valid_file = self.table.files() >= len(self.files.train)
        is_duplicate = (duplicates.copy_of != np.arange(n)) & (
            from_valid_file[duplicates.copy_of] == from_valid_file
        )
        if self.options.keep_duplicates:
            is_duplicate[:] = False
        usable = is_trainable & ~is_duplicate
        is_held_out = usable & (
            from_valid_file if self.files.valid else self._hold_out(duplicates, usable)
        )
        beyond = self._beyond_share(usable & ~is_held_out)
        usable &= ~beyond
        self._account(duplicates, is_trainable, is_duplicate, is_held_out, from_valid_file)
        sides = [example_trainable & of[row_of] for of in (usable & ~is_held_out, is_held_out)]
        views = [StoreView(self.store, np.flatnonzero(side), max_length) for side in sides]
        account.n_kept, account.n_held_out = len(views[0]), len(views[1])
        account.n_tokens = int(views[0].lengths.sum(dtype=np.int64))
        account.n_trained = int(n_trained[sides[0]].sum())
        cut = example_trainable & usable[row_of] & (self.store.lengths > max_length)
        account.n_truncated = int(cut.sum())
        if account.n_truncated:
            account.warnings.append(
                f"{account.n_truncated} examples are longer than {max_length} tokens and lose their"
                " end (--max-length)"
            )
        if not len(views[0]):
            raise InputError(
                "the data holds nothing to train on",
                path=self.table.paths[0],
                found=f"{n} rows, {account.n_untrainable} without a token to learn",
                hint="each row needs an answer that is not empty and not beyond --max-length",
            )
        fate = np.where(is_held_out, np.uint8(Fate.VALID), np.uint8(Fate.TRAIN))
        fate[~is_trainable] = Fate.UNTRAINABLE
        fate[is_duplicate] = Fate.DUPLICATE
        fate[beyond] = Fate.BEYOND_SHARE
        return Corpus(
            views[0], views[1], account, max_length, fate, duplicates, self.table,
            self._conversations(row_of[sides[0]].tolist()),
            np.bincount(row_of[sides[0]], views[0].lengths, minlength=n).astype(np.int64),
        )  # fmt: skip

    def _conversations(self, rows: list[int]) -> list[list[Message]]:
        """Return those of some examples, by their rows; none if one has no text or is not alone."""
        texts = [self.texts[row] for row in rows] if max(rows) < len(self.texts) else [None]
        single = len(set(rows)) == len(rows) and None not in texts
        return [text for text in texts if text is not None] if single else []

    def read(self, number: int, path: Path, on_bytes: Callable[[int], object]) -> None:
        """Read and tokenize one file; `on_bytes` is told now and then how many bytes are read."""
        empty = True
        for example, encoded in self._examples_of(path, on_bytes):
            empty = False
            self.check()
            row = len(self.table)
            self.table.add(number, example.line)
            if row < MANY_ROWS:
                self.texts.append(example.short_conversation())
            for tokens in encoded:
                self.store.add(tokens.ids, tokens.trained)
                self.row_of.append(row)
        if empty:
            raise InputError(
                "the file has no rows", path=path, expected="at least one example",
                hint="a table needs a header and rows below it"
                if path.suffix in (".csv", ".tsv") else "add rows, or leave this file out",
            )  # fmt: skip

    def _examples_of(
        self, path: Path, on_bytes: Callable[[int], object]
    ) -> Iterator[tuple[Example, list[Tokens]]]:
        """Yield the rows of a file, each with the examples that it makes."""
        examples = self.reader.read(path, on_bytes)
        for example, tokens in self._encoded(shortened(examples, self.template, self.n_tokens)):
            try:
                if isinstance(tokens, UnstableError):
                    yield example, self._turn_by_turn(example.messages)
                elif isinstance(tokens, InputError):
                    raise tokens
                elif example.text is None:
                    yield example, [tokens]
                else:
                    yield (
                        example,
                        self._pieces(
                            tokens if example.ends else without_end(tokens, self.template)
                        ),
                    )
            except InputError as error:
                raise InputError(
                    error.message,
                    path=example.path,
                    line=example.line,
                    found=error.found,
                    expected=error.expected,
                    hint=error.hint or "correct or remove this row, or choose another --template",
                ) from None

    def _encoded(
        self, examples: Iterator[Example]
    ) -> Iterator[tuple[Example, Tokens | InputError]]:
        """Yield examples with their tokens, and keep their hashes."""
        for batch, (tokens, hashes) in encode_ahead(examples, self.encode):
            self.hashes.extend(hashes)
            yield from zip(batch, tokens, strict=True)

    def _turn_by_turn(self, messages: list[Message]) -> list[Tokens]:
        """Encode each answer of a conversation as an example with what is before it as context."""
        note = "the template rewrites earlier turns, so each answer is an example of its own"
        if note not in self.account.notes:
            self.account.notes.append(note)
        learn_all, n = self.options.train_on_prompt, self.n_tokens
        return self.template.encode_turns(messages, train_on_prompt=learn_all, n_tokens=n)

    def _pieces(self, tokens: Tokens) -> list[Tokens]:
        """Cut plain text into pieces that fit."""
        n = min(self.options.max_length or TEXT_TOKENS, self.options.n_ctx)
        return [
            Tokens(tokens.ids[at : at + n], tokens.trained[at : at + n])
            for at in range(0, len(tokens.ids), n)
        ]

    def _max_length(self) -> int:
        """Return where examples are cut."""
        import numpy as np

        asked, n_ctx = self.options.max_length, self.options.n_ctx
        if asked is None:
            lengths = np.sort(self.store.lengths)
            chosen = choose_max_length(
                int(lengths[-1]), int(lengths[len(lengths) * 99 // 100]), n_ctx
            )
            self.account.notes.append(f"examples of up to {chosen} tokens (--max-length)")
            return chosen
        if asked > n_ctx:
            self.account.warnings.append(
                f"--max-length {asked} is beyond the model's context of {n_ctx} tokens"
            )
        return min(asked, n_ctx)

    def _hold_out(self, duplicates: Duplicates, usable: BoolArray) -> BoolArray:
        """Return which rows to hold out."""
        n, why = held_out_rows(int(usable.sum()), self.options.val_split, *self._kind)
        self.account.val_share = n / max(1, int(usable.sum()))
        held_out = split(duplicates.group, usable, n, self.options.seed)
        if n and not held_out.any():
            why = "no validation: the rows are too much alike to hold some of them out"
        self.account.notes.append(why)
        return held_out

    def _beyond_share(self, training: BoolArray) -> BoolArray:
        """Return the training rows that are left out so that sources have the shares asked for."""
        import numpy as np

        beyond = np.zeros(len(training), np.bool_)
        if not self.files.shares:
            return beyond
        files = self.table.files()
        source = np.array([*self.files.source, *([-1] * len(self.files.valid))])[files]
        rows = [np.flatnonzero(training & (source == n)) for n in range(len(self.files.shares))]
        n_all = min(len(of) / share for of, share in zip(rows, self.files.shares, strict=True))
        rng = np.random.default_rng([self.options.seed, 2])
        for n, (of, share) in enumerate(zip(rows, self.files.shares, strict=True)):
            name = self.table.paths[self.files.source.index(n)].name
            wanted = round(n_all * share)
            if not wanted:
                raise InputError("no row is left of a source for its share", path=name)
            beyond[rng.permutation(of)[wanted:]] = True
            self.account.notes.append(f"{wanted} of {len(of)} rows of {name}: {share:.4g} of all")
        return beyond

    def _account(
        self,
        duplicates: Duplicates,
        is_trainable: BoolArray,
        is_duplicate: BoolArray,
        is_held_out: BoolArray,
        from_valid_file: BoolArray,
    ) -> None:
        """Count what is dropped and warn of what a user should look at."""
        import numpy as np

        account = self.account
        account.n_untrainable = int((~is_trainable).sum())
        account.n_duplicates = int(is_duplicate.sum())
        near = (duplicates.near >= 0) & ~is_duplicate
        account.n_near = int(near.sum())
        for rows, what in (
            (~is_trainable, "without an answer to learn, left out"),
            (is_duplicate, "equal to an earlier row, left out"),
            (near, "nearly equal to an earlier row; a split keeps them together"),
        ):
            if rows.any():
                account.warnings.append(f"{int(rows.sum())} rows {what} ({self._places(rows)})")
        if from_valid_file.any():
            seen = np.isin(duplicates.group[is_held_out], duplicates.group[~from_valid_file])
            if seen.any():
                rows = np.zeros(len(is_held_out), np.bool_)
                rows[np.flatnonzero(is_held_out)[seen]] = True
                account.warnings.append(
                    f"{int(seen.sum())} of {int(is_held_out.sum())} validation rows are (nearly) in"
                    f" the training data; their loss says little ({self._places(rows)})"
                )

    def _places(self, rows: BoolArray) -> str:
        """Name the first few of some rows."""
        import numpy as np

        return self.table.places(np.flatnonzero(rows).tolist())
