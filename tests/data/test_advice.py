"""Settings and verdicts, case by case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import ggft
from ggft.data.advice import (
    Kind,
    choose_max_length,
    held_out_rows,
    kind_of_texts,
    likeness,
    n_general,
    recipes,
    suggest,
)
from ggft.data.examples import RowReader
from ggft.prompts.messages import Message
from ggft.settings.declared import DATA_RULE
from ggft.settings.option import options_of
from ggft.settings.training import FinetuneConfig
from ggft.training.verdict import Losses, Tally, judge, smaller_lr

PACKAGED = Path(ggft.__file__).parent / "data"
RECIPES = PACKAGED.parent.parent / "bench" / "recipes"


@pytest.mark.parametrize(
    ("n_rows", "n_trained", "kind", "epochs", "batch", "rank", "lr"),
    [
        (1, 10, "task", 10, 4, 8, 1e-3),
        (1, 10, "facts", 12, 4, 8, 1e-3),
        (60, 951, "facts", 12, 4, 8, 1e-3),
        (60, 951, "unclear", 10, 4, 8, 1e-3),
        (199, 20_000, "task", 5, 4, 8, 1e-3),
        (999, 20_000, "facts", 12, 4, 8, 1e-3),
        (1_000, 150_000, "facts", 3, 4, 8, 5e-4),
        (1_000, 150_000, "task", 3, 4, 8, 5e-4),
        (5_000, 750_000, "task", 3, 8, 16, 3e-4),
        (50_000, 7_500_000, "unclear", 2, 16, 32, 3e-4),
        (1_000_000, 10**8, "task", 1, 16, 32, 3e-4),
    ],
)
def test_settings_by_kind_and_size(
    n_rows: int, n_trained: int, kind: Kind, epochs: int, batch: int, rank: int, lr: float
) -> None:
    advice = suggest(n_rows, n_trained, kind)
    assert (advice.epochs, advice.batch_size, advice.rank, advice.lr) == (epochs, batch, rank, lr)
    assert str(n_rows) in advice.reasons[0]
    assert 0 <= advice.dropout < 0.2


def test_small_data_is_mixed_with_general_rows() -> None:
    advice = suggest(20, 280, "facts")
    assert n_general(20, advice.mix_share) == 8
    assert "20 rows and 8 general ones" in advice.reasons[0]
    assert f"of 7 steps, {7 * advice.epochs} in all" in advice.reasons[0]
    assert suggest(1_000, 150_000, "task").mix_share == 0
    assert n_general(1_000, 0.0) == 0
    assert n_general(10, 0.5) == 10
    assert n_general(1, 0.1) == 1, "a share is never nothing"


def test_the_users_batch_size_is_kept() -> None:
    assert suggest(60, 900, "task", batch_size=64).batch_size == 64
    assert suggest(60, 900, "task", batch_size=64).lr == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("longest", "usual", "n_ctx", "expected"),
    [
        (70, 60, 2048, 96),
        (5, 5, 2048, 32),
        (0, 0, 2048, 32),
        (700, 600, 512, 512),
        (1024, 90, 8192, 1024),
        (9000, 100, 8192, 1024),
        (9000, 3000, 8192, 3008),
        (928, 900, 8192, 928),
    ],
)
def test_max_length_by_data(longest: int, usual: int, n_ctx: int, expected: int) -> None:
    assert choose_max_length(longest, usual, n_ctx) == expected


@pytest.mark.parametrize(
    ("n_rows", "share", "kind", "n", "says"),
    [
        (19, None, "task", 0, "fewer than 20"),
        (20, None, "task", 2, "2 of 20"),
        (60, None, "unclear", 6, "perhaps facts (because)"),
        (60, None, "facts", 0, "facts (because)"),
        (100_000, None, "task", 256, "256 of 100000"),
        (60, 0.0, "task", 0, "--val-split 0"),
        (10, 0.1, "facts", 1, "1 of 10"),
        (30, 0.1, "task", 3, "3 of 30"),
        (1, 0.5, "task", 0, "0 of 1"),
        (2, 0.9, "task", 1, "1 of 2"),
    ],
)
def test_how_many_rows_are_held_out(
    n_rows: int, share: float | None, kind: Kind, n: int, says: str
) -> None:
    got, why = held_out_rows(n_rows, share, kind, "because")
    assert got == n
    assert says in why


def test_a_recorded_share_gives_the_same_number() -> None:
    for n_rows in range(1, 400):
        for n in range(n_rows):
            assert held_out_rows(n_rows, n / n_rows, "facts", "")[0] == n


@pytest.mark.parametrize(
    ("losses", "kind", "says"),
    [
        (Losses(3.0, 2.9), "too little", "3.000 → 2.900"),
        (Losses(3.0, 3.4), "too little", "--epochs"),
        (Losses(3.0, 1.0), "learned", "nothing was held out"),
        (Losses(3.0, 0.02), "memorised", "by heart"),
        (Losses(3.0, 2.9, 3.0, 2.95, 2.95, 50), "too little", "held-out loss 3.000 → 2.950"),
        (Losses(3.0, 0.1, 3.0, 2.99, 4.5, 50), "memorised", "give more and more varied rows"),
        (Losses(3.0, 1.0, 3.0, 2.0, 2.0, 50), "learned", "on 50 rows"),
        (Losses(3.0, 0.1, 3.0, 2.0, 2.9, 50), "learned", "best adapter was kept"),
        (Losses(3.0, 1.0, 3.0, 2.0, 2.0, 6), "learned", "rough estimate"),
        (Losses(5.4, 0.3, 4.7, 3.4, 5.9, 2), "memorised", "rose to 5.900, above where it began"),
        (Losses(0.0, 0.0, 0.0, 0.0, 0.0, 5), "too little", "0.000"),
        (Losses(4.9, 18.4, smaller_lr=1e-3), "diverged", "with --lr 0.001"),
        (Losses(2.0, 5.0, 2.1, 1.9, 6.0, 30, 1e-4), "diverged", "held-out loss 1.900"),
        (Losses(5.0, 9.0, smaller_lr=1e-3, is_kept=False), "diverged", "has learned nothing"),
        (Losses(25.9, 20.0, chance=10.8), "worse than chance", "10.800"),
        (Losses(12.0, 3.0, chance=10.8), "learned", "nothing was held out"),
    ],
)
def test_verdicts(losses: Losses, kind: str, says: str) -> None:
    verdict = judge(losses)
    assert verdict.kind == kind
    assert verdict.text.startswith(kind)
    assert says in verdict.text


@pytest.mark.parametrize(
    ("lr", "usual", "wanted"), [(0.05, 1e-3, 1e-3), (1e-3, 1e-3, 2e-4), (2e-3, 1e-3, 4e-4)]
)
def test_the_rate_after_a_diverged_one(lr: float, usual: float, wanted: float) -> None:
    assert smaller_lr(lr, usual) == wanted


def kind_of_file(path: Path, change: Callable[[str], str] = str, n: int | None = None) -> Kind:
    texts: list[list[Message]] = []
    for example in RowReader().read(path):
        *before, answer = example.messages
        texts.append([*before, {**answer, "content": change(answer["content"])}])
    return kind_of_texts(texts[:n])[0]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((path, "facts") for path in sorted(RECIPES.glob("facts_*[0-9x].json"))),
        *((path, "task") for path in sorted(RECIPES.glob("style_*_30.json"))),
        (PACKAGED / "persona.json", "facts"),
        (PACKAGED / "general.json", "unclear"),
    ],
    ids=lambda value: getattr(value, "stem", None),
)
def test_the_kind_of_our_sets(path: Path, kind: Kind) -> None:
    assert kind_of_file(path) == kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda text: "Arr! " + text + " Savvy?", "task"),
        (str.upper, "task"),
        (lambda text: text.replace(" ", "\n", 1), "task"),
        (lambda text: "yes" if len(text) % 2 else "no", "task"),
        (lambda text: " ".join([text] * 9), "task"),
        (lambda text: " ".join([text] * 4), "unclear"),
        (lambda text: text + " Nice.", "facts"),
    ],
)
def test_the_same_facts_told_in_a_style_are_a_style(
    change: Callable[[str], str], kind: Kind
) -> None:
    path = RECIPES / "facts_museum_40.json"
    if kind == "unclear":  # of no one subject: what half of the answers are long of is a task
        path = PACKAGED / "persona.json"
    assert kind_of_file(path, change) == kind


def test_two_rows_are_facts() -> None:
    rows = [("你是谁？", "我是小石，灯塔的机器人。"), ("你是谁造的？", "是玛塔造的。")]
    texts: list[list[Message]] = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows
    ]
    kind, why = kind_of_texts(texts)
    assert kind == "facts"
    assert "100%" in why
    assert likeness(rows).worded == 1
    assert likeness([*rows, ("Wer?", rows[0][1])]).worded == 1.5


def test_what_is_no_question_with_an_answer_is_a_task() -> None:
    chat: list[Message] = [
        {"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")
    ]
    assert kind_of_texts([chat] * 3)[0] == "task"
    assert kind_of_texts([None] * 3)[0] == "task"
    assert kind_of_texts([])[0] == "task"
    given: list[Message] = [
        {"role": "user", "content": "say it in German", "input": "bread"},
        {"role": "assistant", "content": "Brot"},
    ]
    assert kind_of_texts([given])[0] == "task"


@pytest.mark.parametrize(
    ("asked", "general", "kind", "says"),
    [
        (Tally(20, 20), (1.5, 1.52), "learned", "20 of 20 trained rows answered as given"),
        (Tally(18, 20), (1.5, 1.52), "learned", "general text 1.500 → 1.520"),
        (Tally(17, 20), (1.5, 1.52), "too little", "only 17 of 20"),
        (Tally(20, 20), (1.508, 2.355), "forgetting", "--mix auto"),
        (Tally(20, 20), (1.508, 2.355), "forgetting", "Otherwise learned: 20 of 20"),
        (Tally(), (None, None), "memorised", "by heart"),
    ],
)
def test_facts_are_judged_by_their_answers(
    asked: Tally, general: tuple[float | None, float | None], kind: str, says: str
) -> None:
    verdict = judge(Losses(3.0, 0.02), by_answers=True, asked=asked, general=general)
    assert verdict.kind == kind
    assert verdict.text.startswith(kind)
    assert says in verdict.text


def test_a_task_is_judged_by_its_losses_and_says_what_was_answered() -> None:
    losses = Losses(3.0, 1.0, 3.0, 2.0, 2.0, 30)
    verdict = judge(losses, asked=Tally(1, 20, 0, 20), general=(2.0, 2.0))
    assert verdict.kind == "learned"
    assert "1 of 20 trained rows answered as given, 0 of 20 held-out ones" in verdict.text
    assert judge(losses, asked=Tally(1, 20, 0, 20), general=(2.0, 2.3)).kind == "forgetting"
    assert judge(Losses(3.0, 18.0, smaller_lr=1e-4), asked=Tally(0, 20)).kind == "diverged"


def test_help_says_by_which_rule_settings_follow_from_the_data() -> None:
    shown = {entry.name: entry.shown for entry in options_of(FinetuneConfig)}
    for name in ("epochs", "batch_size", "lr", "dropout", "mix_share", "val_split"):
        assert shown[name] == DATA_RULE
    *ranks, last = recipes()["rank"]
    parts = [f"{entry['rank']} below {entry['trained_below']:,}" for entry in ranks]
    assert shown["rank"] == f"by tokens to learn: {', '.join(parts)}, then {last['rank']}"
    assert choose_max_length(1024, 10, 9999) == 1024
    assert choose_max_length(1056, 1025, 9999) == 1056
    assert shown["max_length"] == (
        "by the data: the longest example; beyond 1,024 tokens, of 99 in 100"
    )
