"""What a data set is, facts or a task, and what it needs: settings by kind and size.

Pure functions. The thresholds are rules of thumb for LoRA on a few to many thousand rows; each
stands next to its reason, and every choice comes with the words to print.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ggft.prompts.messages import Message

MIN_SPLIT_ROWS = 20  # with fewer held-out rows, their loss is a rough estimate
SHORT_ROW = 32
MIX_SHARE = 2 / 7  # of general rows in an epoch of few rows
MANY_WORDINGS = 6  # rows for an answer: with more, answers are classes
SHORT_ANSWER = 12  # words: one fact in a sentence
MANY_ROWS = 1000  # of so many, a few that are held out are no loss
LONG_ANSWER = 60  # words: beyond, how an answer is written matters more than what it says
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+|[^\W_\u3400-\u9fff\uf900-\ufaff]+")
_PLAIN_SIGNS = ".。\"'“”"  # with which any answer may begin or end
_COMMON_WORDS = (
    "a an and are as at be by can could did do does for from had has have how i if in is it its"
    " many me much must my of on one or should the their them there they this to was we were what"
    " when where which who whose why will with would 什么 多少 哪个 哪里 怎么 是什 么是 我的"
)
_COMMON = frozenset(_COMMON_WORDS.split())  # they say nothing about a question's subject

Kind = Literal["facts", "task", "unclear"]


@dataclass(frozen=True)
class Likeness:
    """How alike questions and answers are: what tells facts from a style or a task.

    Attributes:
        n: Rows that were looked at.
        length: Words (or Chinese characters) of half of the answers, at most.
        novel: Share of answers with a word that no question has, and no other answer: what only
            its own row can teach.
        form: Share of answers of one form: a phrase of three words, a line break, a sign at the
            beginning or end, capitals.
        subject: Share of questions about one subject: a word that they share, or "you".
        worded: Rows for each distinct answer.
    """

    n: int
    length: int
    novel: float
    form: float
    subject: float
    worded: float


def likeness(rows: Sequence[tuple[str, str]]) -> Likeness:
    """Compare the questions and answers of rows."""
    questions = [_words(question) for question, _ in rows]
    answers = [_words(answer) for _, answer in rows]
    asked = {word for words in questions for word in words}
    distinct = {answer.strip(): words for (_, answer), words in zip(rows, answers, strict=True)}
    known = Counter(word for words in distinct.values() for word in set(words))
    novel = [any(word not in asked and known[word] == 1 for word in words) for words in answers]
    subjects = Counter(word for words in questions for word in {*words} - _COMMON)
    n = len(rows)
    return Likeness(
        n=n,
        length=sorted(map(_n_words, (answer for _, answer in rows)))[n // 2],
        novel=sum(novel) / n,
        form=_form(distinct, questions),
        subject=max(subjects.values(), default=0) / n,
        worded=n / len(distinct),
    )


def _form(answers: Mapping[str, Sequence[str]], questions: Iterable[Sequence[str]]) -> float:
    """Return the share of distinct answers that have the commonest form."""
    asked = {phrase for words in questions for phrase in _phrases(words)}
    forms: Counter[object] = Counter()
    for text, words in answers.items():
        forms.update(_phrases(words) - asked)
        forms["lines"] += "\n" in text
        forms["capitals"] += text.isupper() and len(text) > 4
        for place, sign in (("first", text[:1]), ("last", text[-1:])):
            forms[place, sign] += bool(sign) and not sign.isalnum() and sign not in _PLAIN_SIGNS
    return max(forms.values()) / len(answers) if len(answers) > 2 else 0.0


def _phrases(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case; of Chinese, the pairs of characters."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if _HAN.match(word):
            found += [word[i : i + 2] for i in range(max(1, len(word) - 1))]
        else:
            found.append(word)
    return found


def _n_words(text: str) -> int:
    return sum(len(w) if _HAN.match(w) else 1 for w in _WORD.findall(text))


def kind_of(rows: Sequence[tuple[str, str]], *, share_given: float = 0.0) -> tuple[Kind, str]:
    """Return what rows are, and how that is known.

    Facts have short answers, each with words of its own; no row tells another's. The answers of a
    task or a style follow from what is given, are of few kinds, long, or of one form; how well that
    was learned shows on rows that are held out.

    Args:
        rows: Questions and answers; none if the rows are something else.
        share_given: Share of the rows that give something to work on (alpaca's input).
    """
    if not rows:
        return "task", "they are not single questions with answers"
    if share_given > 0.5:
        return "task", "they give something to work on"
    x = likeness(rows)
    if x.novel < 0.5 or x.worded > MANY_WORDINGS:
        return "task", "answers repeat one another or their questions"
    if x.form >= 0.5:
        return "task", f"{x.form:.0%} of the answers have one form"
    if x.length > LONG_ANSWER:
        return "task", f"half of the answers are longer than {LONG_ANSWER} words"
    short = x.length <= SHORT_ANSWER or (x.length <= LONG_ANSWER / 2 and x.subject >= 0.5)
    if short and x.novel >= 0.75 and x.n < MANY_ROWS:
        return "facts", f"answers are short, {x.novel:.0%} of them with words of their own"
    return "unclear", "answers are neither short facts nor of one form"


def kind_of_texts(texts: Sequence[Sequence[Message] | None]) -> tuple[Kind, str]:
    """Return what rows are, by those of one question and one answer if these are most of them.

    Args:
        texts: Conversations; None for what is none, or a long one.
    """
    single = [
        (messages[-2], messages[-1])
        for messages in texts
        if messages is not None
        and [m["role"] for m in messages if m["role"] != "system"] == ["user", "assistant"]
    ]
    if 2 * len(single) < len(texts):
        single = []
    given = sum(bool(question.get("input", "").strip()) for question, _ in single)
    return kind_of(
        [(question["content"], answer["content"]) for question, answer in single],
        share_given=given / max(1, len(single)),
    )


def wordings_of_texts(texts: Sequence[Sequence[Message] | None]) -> float:
    """Return how many conversations there are for each last answer."""
    answers = [messages[-1]["content"].strip() for messages in texts if messages]
    return len(answers) / max(1, len(set(answers)))


@dataclass(frozen=True)
class Suggestion:
    """Settings for the ones that the user left open.

    Attributes:
        epochs: Passes over the data.
        batch_size: Examples per optimizer step.
        rank: LoRA rank.
        lr: Peak learning rate.
        dropout: Dropout of the LoRA input.
        mix_share: Share of general rows among an epoch's examples.
        vary: Whether questions are varied.
        reasons: Why, a line each.
    """

    epochs: int
    batch_size: int
    rank: int
    lr: float
    dropout: float
    mix_share: float
    vary: bool
    reasons: tuple[str, ...]


@cache
def recipes() -> dict[str, Any]:
    """Return the table of settings by kind and size of the data, recipes.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)
    return table


def suggest(
    n_rows: int, n_trained: int, kind: Kind, *, batch_size: int | None = None
) -> Suggestion:
    """Return settings for a data set, by the table of recipes.

    Args:
        n_rows: Training rows.
        n_trained: Tokens in them that the loss counts.
        kind: What the rows are.
        batch_size: The user's choice, if any; the learning rate follows it.
    """
    table = recipes()
    found = next(
        recipe
        for recipe in table["recipe"]
        if kind in recipe["kinds"] and n_rows < recipe.get("rows_below", math.inf)
    )
    rank = next(r["rank"] for r in table["rank"] if n_trained < r.get("trained_below", math.inf))
    epochs = found["epochs"]
    if "rows_seen" in found:
        epochs = min(epochs, math.ceil(found["rows_seen"] / max(n_rows, 1)))
    batch, lr, mix_share = batch_size or found["batch_size"], found["lr"], found["mix_share"]
    if batch > 16:
        lr *= math.sqrt(batch / 16)  # Adam's square-root rule for large batches
    n_mixed = n_general(n_rows, mix_share)
    per_epoch = math.ceil((n_rows + n_mixed) / batch)
    mixed = f" and {n_mixed} general ones against forgetting" if n_mixed else ""
    reasons = (
        f"{n_rows} rows{mixed}: {epochs} epochs of {per_epoch} steps, {per_epoch * epochs} in all",
        f"{n_trained} tokens to learn: rank {rank}",
    )
    return Suggestion(epochs, batch, rank, lr, found["dropout"], mix_share, found["vary"], reasons)


def n_general(n_rows: int, share: float) -> int:
    """Return how many general rows an epoch has beside `n_rows` for them to be `share` of all.

    With a share there is at least one.
    """
    return max(1, round(n_rows * share / (1.0 - share))) if share else 0


def choose_max_length(longest: int, usual: int, n_ctx: int) -> int:
    """Return the length in tokens at which examples are cut.

    No example is cut while the longest needs at most 1,024 tokens; beyond that, at most one in a
    hundred is, since a few very long rows would decide how much memory each step takes.

    Args:
        longest: Tokens of the longest example.
        usual: Tokens that 99 of 100 examples do not exceed.
        n_ctx: The model's context.
    """
    wanted = longest if longest <= 1024 else max(1024, usual)
    return min(n_ctx, math.ceil(max(wanted, 1) / SHORT_ROW) * SHORT_ROW)


def held_out_rows(n_rows: int, share: float | None, kind: Kind, known: str) -> tuple[int, str]:
    """Return how many rows to hold out for validation, and why.

    Args:
        n_rows: Rows there are.
        share: The user's `--val-split`, None if not given.
        kind: What the rows are.
        known: How that is known.
    """
    if share == 0:
        return 0, "no validation (--val-split 0)"
    if share is not None:
        n = max(0, min(n_rows - 1, math.ceil(share * n_rows - 1e-9)))
        return n, f"{n} of {n_rows} rows held out (--val-split {share:g})"
    if kind == "facts":
        return 0, (
            f"all {n_rows} rows are trained, as they are facts ({known}): none tells another;"
            " --val-split 0.1 holds some out"
        )
    rule = recipes()["hold_out"]
    if n_rows < rule["min_rows"]:
        return 0, (
            f"no validation: with {n_rows} rows (fewer than {rule['min_rows']}) every one is needed"
            " for training; --val-split 0.1 forces it"
        )
    n = max(rule["fewest"], min(rule["most"], math.floor(n_rows * rule["share"] + 1e-9)))
    of = "a task or a style" if kind == "task" else "a task, perhaps facts"
    return n, (
        f"{n} of {n_rows} rows held out for validation, as they are {of} ({known});"
        " --val-split 0 trains on all"
    )
