"""`ggft prepare`: show what training would see of some data, and write it out cleaned.

It stands on the same code as `ggft finetune`: what is printed here is what is trained there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ggft.data.advice import suggest
from ggft.data.corpus import Corpus, CorpusOptions, Fate, load_corpus
from ggft.data.encode import EncoderPool, without_end
from ggft.data.examples import Example, RowOptions, RowReader
from ggft.data.rows.columns import GOES_ON
from ggft.data.rows.survey import Survey
from ggft.data.rows.tokens import IGNORED
from ggft.data.rows.tools import spelled
from ggft.prompts.assistant_mask import UnstableError
from ggft.prompts.messages import joined
from ggft.prompts.template import Template, Tokens
from ggft.settings.commands import PrepareConfig
from ggft.settings.declared import asked_template
from ggft.setup.inputs import open_vocabulary
from ggft.system.errors import InputError
from ggft.system.files import (
    atomic_output,
    make_folder,
    remove_empty,
    require_new,
    require_plain_name,
)
from ggft.system.progress import Progress
from ggft.system.text import printable

if TYPE_CHECKING:
    from ggft.data.store import IntArray

SIDES = ("train.jsonl", "valid.jsonl")
FEW_WORDINGS = 1.2  # questions of an answer: hardly any has a second one
HISTOGRAM_ROWS = 10
N_DEAREST = 3  # rows whose cost is told
BAR_WIDTH = 40
GREEN, BOLD, RESET = "\x1b[32m", "\x1b[1m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, so that it is seen without colour, too


def prepare(config: PrepareConfig, progress: Progress | None = None) -> None:
    """Read, check and describe data.

    Raises:
        GgftError: a file, a row or the template does not serve; nothing is written then.
    """
    progress = progress or Progress("json" if config.json else "auto")
    if config.out is not None:
        require_plain_name(config.out)
        for name in SIDES if Path(config.out).is_dir() else ():
            require_new(Path(config.out) / name, force=config.force)
    model, template = open_vocabulary(config.model, asked_template(config), warn=progress.warn)
    n_ctx = model.get(f"{model.architecture}.context_length")
    rows = RowOptions(config.format, config.columns, config.ignore_columns)
    corpus = load_corpus(
        config.data,
        template,
        CorpusOptions(
            rows=rows,
            n_ctx=n_ctx if isinstance(n_ctx, int) else 1 << 30,
            max_length=config.max_length,
            val_split=config.val_split,
            train_on_prompt=config.train_on_prompt,
            keep_duplicates=config.keep_duplicates,
            seed=config.seed,
            keep_tokens=False,
        ),
        helpers=partial(
            EncoderPool, model.path, template.choice, train_on_prompt=config.train_on_prompt
        ),
    )
    for text in (*template.notes, *corpus.account.notes):
        progress.note(text)
    survey = look_at(rows, corpus)
    for text in (*corpus.account.warnings, *advisable(survey, corpus)):
        progress.warn(text)
    for line in describe(corpus, template):
        progress.result(line)
    for line in costs(corpus, len(corpus.fate) if config.costs else N_DEAREST):
        progress.result(line)
    if config.preview:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for line in preview(config, rows, corpus, template, colour=colour):
            progress.result(line)
    written = write_cleaned(Path(config.out), rows, corpus) if config.out else {}
    for name, n_rows in written.items():
        progress.result(f"written    {name}: {n_rows} rows")
    progress.event(
        "prepared",
        **asdict(corpus.account),
        max_length=corpus.max_length,
        template=template.name,
        written=written,
        personal={kind: len(found) for kind, found in survey.found.items()},
        contradicting=len(survey.contradicting),
    )


def look_at(rows: RowOptions, corpus: Corpus) -> Survey:
    """Look at all rows for what a user should know of before they are trained."""
    survey = Survey(corpus.duplicates.asked)
    for row, example in _examples(rows, corpus):
        if corpus.fate[row] != Fate.DUPLICATE:
            survey.look(row, example)
    return survey


def advisable(survey: Survey, corpus: Corpus) -> Iterator[str]:
    """Yield warnings of what a survey found: how many rows and where, never what they hold."""
    for kind, found in survey.found.items():
        if found:
            yield f"{len(found)} rows seem to hold {kind} ({corpus.table.places(found)})"
    if survey.contradicting:
        yield (
            f"{len(survey.contradicting)} rows ask the same as another and answer otherwise"
            f" ({corpus.table.places(survey.contradicting)})"
        )


def costs(corpus: Corpus, n: int) -> Iterator[str]:
    """Yield a line for each of the `n` dearest rows: its tokens, and its share of an epoch."""
    tokens = corpus.row_tokens
    total = max(1, int(tokens.sum()))
    label = "cost"
    for row in (-tokens).argsort(kind="stable")[:n].tolist():
        if tokens[row]:
            share = f"{tokens[row] / total:.1%} of an epoch"
            yield f"{label:10} {corpus.table.where(row)}: {tokens[row]} tokens, {share}"
            label = ""


def describe(corpus: Corpus, template: Template) -> Iterator[str]:
    """Yield the lines that describe a corpus."""
    import numpy as np

    account, lengths = corpus.account, corpus.train.lengths
    names = [path.name for path in corpus.table.paths]
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    yield f"data       {account.n_rows} rows of {shown}"
    yield f"template   {template.name}, answers end with {_name(template, template.end_id)}"
    yield (
        f"training   {account.n_kept} examples, {account.n_tokens} tokens, {account.n_trained} of"
        f" them trained ({account.n_trained / max(1, account.n_tokens):.0%})"
    )
    yield f"validation {account.n_held_out} examples"
    yield (
        f"dropped    {account.n_duplicates} duplicates, {account.n_untrainable} without an answer;"
        f" kept: {account.n_near} near duplicates, {account.n_truncated} cut"
        f" at {corpus.max_length} tokens"
    )
    median = int(np.median(lengths))
    yield f"length     {lengths.min()} to {lengths.max()} tokens, half of them up to {median}"
    yield from histogram(lengths)
    advice = suggest(account.n_kept, account.n_trained, account.row_kind)
    yield (
        f"suggested  --epochs {advice.epochs} --batch-size {advice.batch_size} --rank"
        f" {advice.rank} --lr {advice.lr:g}"
    )
    for reason in advice.reasons:
        yield f"           {reason}"
    if account.row_kind == "facts" and account.n_wordings < FEW_WORDINGS:
        yield (
            "           every fact has one wording: give three wordings of each question, and it"
            " is found by others, too"
        )


def histogram(lengths: IntArray) -> Iterator[str]:
    """Yield lines with how many examples are how long."""
    import numpy as np

    least = int(lengths.min())
    width = max(1, -(-(int(lengths.max()) - least + 1) // HISTOGRAM_ROWS))
    counts = np.bincount((lengths - least) // width).tolist()
    for number, count in enumerate(counts):
        bar = "#" * -(-BAR_WIDTH * count // max(counts))
        first = least + number * width
        yield f"{first:>6}–{first + width - 1:<6} {count:>8} {bar}".rstrip()


def preview(
    config: PrepareConfig, rows: RowOptions, corpus: Corpus, template: Template, *, colour: bool
) -> Iterator[str]:
    """Yield rows as the model sees them, the trained tokens between marks and in colour."""
    shown = 0
    for row, example in _examples(rows, corpus):
        if shown == config.preview:
            return
        if corpus.fate[row] > Fate.VALID:
            continue
        shown += 1
        for tokens in _encoded(example, template, train_on_prompt=config.train_on_prompt):
            cut = corpus.max_length if example.text is None else len(tokens.ids)
            yield ""
            counts = f"{len(tokens.ids)} tokens, {tokens.n_trained} trained"
            yield f"── {corpus.table.where(row)} · {counts}"
            yield marked(tokens, cut, template, colour=colour)


def _encoded(example: Example, template: Template, *, train_on_prompt: bool) -> list[Tokens]:
    """Return the examples that a row makes."""
    if example.tokens is not None:
        return [example.tokens]
    if example.text is not None:
        tokens = template.encode_text(example.text)
        return [tokens if example.ends else without_end(tokens, template)]
    try:
        return [template.encode_example(example.messages, train_on_prompt=train_on_prompt)]
    except UnstableError:
        return template.encode_turns(example.messages, train_on_prompt=train_on_prompt)


def marked(tokens: Tokens, cut: int, template: Template, *, colour: bool) -> str:
    """Return the text of an example with what is trained between marks, and in colour.

    Args:
        tokens: The example.
        cut: How many of its tokens are kept.
        template: Whose tokenizer gives the text.
        colour: Whether to colour, too.
    """
    out: list[str] = []
    pairs = zip(tokens.ids[:cut], tokens.trained[:cut], strict=True)
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        text = printable(template.tokenizer.decode(ids).decode("utf-8", "replace"))
        if trained:
            text = f"{OPEN}{text}{CLOSE}"
            text = f"{GREEN}{BOLD}{text}{RESET}" if colour else text
        out.append(text)
    if len(tokens.ids) > cut:
        out.append(f"… cut: {len(tokens.ids) - cut} more tokens")
    return "".join(out)


def _name(template: Template, token: int) -> str:
    return printable(template.tokenizer.token_text(token))


def _examples(rows: RowOptions, corpus: Corpus) -> Iterator[tuple[int, Example]]:
    """Yield the rows again, with their numbers.

    Raises:
        InputError: there are not as many as before.
    """
    row, reader = -1, RowReader(rows)
    for path in corpus.table.paths:
        for example in reader.read(path):
            row += 1
            if row >= len(corpus.fate):
                break
            yield row, example
    if row != len(corpus.fate) - 1:
        raise InputError(
            "the data changed while it was read",
            path=corpus.table.paths[-1],
            expected=f"{len(corpus.fate)} rows",
            hint="run the command again when nothing writes to the data",
        )


def write_cleaned(folder: Path, rows: RowOptions, corpus: Corpus) -> dict[str, int]:
    """Write the rows that are kept, as JSONL that mlx-lm reads, too.

    Conversations become `{"messages": […]}` with an alpaca row's input appended to its
    instruction, plain text `{"text": …}`. Both files are complete or not there.

    Returns:
        Rows written, by file.
    """
    made = make_folder(folder, "the folder cannot be used", hint="choose another one with --out")
    sides = dict(zip((Fate.TRAIN, Fate.VALID), SIDES, strict=True))
    counts = {side: 0 for side in sides if (corpus.fate == side).any()}

    def tidy(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            remove_empty(made)

    with contextlib.ExitStack() as stack:
        stack.push(tidy)
        files: dict[Fate, IO[str]] = {}
        for side in counts:
            path = stack.enter_context(
                atomic_output(folder / sides[side], inputs=corpus.table.paths)
            )
            files[side] = stack.enter_context(path.open("w", encoding="utf-8"))
        for row, example in _examples(rows, corpus):
            side = Fate(corpus.fate[row])
            if side in files:
                files[side].write(json.dumps(cleaned(example), ensure_ascii=False) + "\n")
                counts[side] += 1
    return {sides[side]: n for side, n in counts.items()}


def cleaned(example: Example) -> dict[str, Any]:
    """Return the row to write for an example."""
    if (tokens := example.tokens) is not None:
        learned = zip(tokens.ids, tokens.trained, strict=True)
        return {
            "input_ids": tokens.ids.tolist(),
            "labels": [i if trained else IGNORED for i, trained in learned],
        }
    if example.text is not None:
        return {"text": example.text} | ({} if example.ends else {GOES_ON: True})
    turns: list[dict[str, Any]] = []
    for message in joined(example.messages):
        content = {"role": message["role"], "content": message["content"]}
        turns.append(content | spelled(message))
        if not message.get("learn", True):
            turns[-1]["weight"] = 0
    first = example.messages[0]
    return {key: first[key] for key in ("tools", "documents") if key in first} | {"messages": turns}
