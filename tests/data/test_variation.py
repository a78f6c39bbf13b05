"""Questions asked differently: the same words in the same order, whatever is around them."""

from __future__ import annotations

import numpy as np
import pytest

from ggft.data.variation import vary


@pytest.mark.parametrize(
    "question",
    ["Who owns the Copper Whisk?", "Name the mill", "Wo?", "云溪茶馆几点开门？", "?", "a", "  "],
)
def test_what_is_asked_stays_whole(question: str) -> None:
    core = question.lower().rstrip("?？.").strip()
    for seed in range(200):
        assert core in vary(question, np.random.default_rng(seed)).lower()


@pytest.mark.parametrize("question", ["Who owns the Copper Whisk?", "云溪茶馆几点开门？"])
def test_wordings_are_many_and_repeatable(question: str) -> None:
    wordings = [vary(question, np.random.default_rng(seed)) for seed in range(100)]
    assert wordings == [vary(question, np.random.default_rng(seed)) for seed in range(100)]
    assert len(set(wordings)) > 20
    assert 15 < wordings.count(question) < 50


def test_each_language_is_greeted_in_its_own() -> None:
    for seed in range(100):
        wording = vary("云溪茶馆几点开门？", np.random.default_rng(seed))
        assert not any(c.isascii() and c.isalpha() for c in wording)
        assert vary("Who are you?", np.random.default_rng(seed)).isascii()
