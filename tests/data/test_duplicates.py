"""Copies are found, near copies too, and a split keeps them on one side."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggft.data.duplicates import Duplicates, HashTable, hash_rows, normalized, split
from ggft.prompts.messages import Message

WORDS = ("lamp", "tide", "sea", "robot", "copper", "window", "stair", "tea", "fog", "whale")


def sentence(rng: random.Random, n: int = 40) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(n))


def find(texts: list[str]) -> Duplicates:
    table = HashTable()
    table.extend(hash_rows(texts))
    return table.duplicates()


def test_every_copy_of_a_copied_half_is_found() -> None:
    rng = random.Random(1)
    rows = [sentence(rng, rng.randrange(3, 60)) for _ in range(60)]
    copied = [*rows, *rows[:30]]
    found = find(copied)
    assert found.copy_of.tolist() == [*range(60), *range(30)]
    assert (found.near == -1).all()


def test_copies_with_small_changes_are_near() -> None:
    rng = random.Random(2)
    rows = [sentence(rng) for _ in range(60)]
    changed = []
    for text in rows[:30]:
        words = text.split()
        words[rng.randrange(len(words))] = "changed"
        changed.append("  " + " ".join(words).upper() + " !")
    found = find([*rows, *changed])
    assert found.copy_of.tolist() == list(range(90))
    assert found.near.tolist() == [-1] * 60 + list(range(30))
    assert found.group.tolist() == [*range(60), *range(30)]


def test_other_rows_are_not_near() -> None:
    rng = random.Random(3)
    assert (find([sentence(rng, 8) for _ in range(500)]).near == -1).all()
    sums = [f"What is {i} + 457? The answer is {i + 457}." for i in range(100, 400, 7)]
    assert (find(sums).near == -1).all()
    chinese = ["你叫什么名字？我叫小石。", "你住在哪里？住在灯塔里。", "谁造了你？老玛塔造的。"]
    assert (find(chinese).near == -1).all()


def test_chinese_near_copies() -> None:
    text = (
        "我叫小石，是鸥角的灯塔机器人，每四十分钟给灯上一次弦，早饭吃热灯油配一片柠檬。"
        "老玛塔用一口旧钟和三只茶壶造了我，她教我看云听潮，也教我在雾里数船只的汽笛声。"
        "冬天海面结冰的时候，渔夫们会到塔里取暖，轮流讲述各自见过的最大的鱼和最长的风暴。"
        "我把这些故事刻在铜片上，挂满楼梯的扶手，让来访的孩子一边爬一边读给海鸥听。"
    )
    assert find([text, text.replace("柠檬", "橙子")]).near.tolist() == [-1, 0]
    assert find([text, text[: len(text) // 2]]).near.tolist() == [-1, -1]


def test_the_estimate_is_the_overlap() -> None:
    """Of many pairs, the mean error is small and the deviation what 64 hashes give."""
    rng = random.Random(4)
    errors = []
    for _ in range(150):
        words = sentence(rng, 40).split()
        other = [w if rng.random() < 0.9 else f"new{rng.randrange(99)}" for w in words]
        texts = [" ".join(words), " ".join(other)]
        a, b = ({t[i : i + 5] for i in range(len(t) - 4)} for t in map(normalized, texts))
        signatures = hash_rows(texts).signatures
        errors.append((signatures[0] == signatures[1]).mean() - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.08


def test_the_same_question_is_one_group() -> None:
    table = HashTable()
    for question, answer in (
        ("What now?", "Tea."),
        ("what  now", "Fog and more fog."),
        ("Who?", "I"),
    ):
        chat: list[Message] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        table.extend(hash_rows([chat]))
    found = table.duplicates()
    assert found.copy_of.tolist() == [0, 1, 2]
    assert found.group.tolist() == [0, 0, 2]


def test_no_rows_and_empty_texts() -> None:
    assert len(find([]).group) == 0
    assert find(["", "", "a"]).copy_of.tolist() == [0, 0, 2]


def test_normalized() -> None:
    assert normalized(" The  ＦＯＧ, is… here_now ") == "the fog is here now"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    group=st.lists(st.integers(0, 30), min_size=1, max_size=80),
    n=st.integers(0, 20),
    seed=st.integers(1, 5),
    data=st.data(),
)
def test_a_split_is_disjoint_and_keeps_groups_together(
    group: list[int], n: int, seed: int, data: st.DataObject
) -> None:
    groups = np.array(group)
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(group), max_size=len(group))))
    held_out = split(groups, usable, n, seed)
    assert not (held_out & ~usable).any()
    trained = usable & ~held_out
    assert not set(groups[held_out].tolist()) & set(groups[trained].tolist())
    assert held_out.sum() <= n + n // 2
    assert trained.any() or not usable.any()
    assert (split(groups, usable, n, seed) == held_out).all()


def test_a_split_has_the_size_asked_for() -> None:
    every = np.ones(1000, np.bool_)
    chosen = split(np.arange(1000), every, 100, 1)
    assert chosen.sum() == 100
    assert (split(np.arange(1000), every, 100, 2) != chosen).any()
