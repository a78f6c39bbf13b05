"""Ask a question a little differently: what says the same is to be answered the same.

A fact that is trained in one wording only is found again by that wording. Greetings, politeness,
small letters and a missing question mark change nothing about what is asked, in English and in
Chinese. Words are neither left out nor misspelt: measured, that cost exact answers and gained
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_PLAIN = 0.25  # of the wordings are the row's own
_GREETINGS = (
    "Hi!", "Hello!", "Hi there,", "Hey,", "Good morning!", "Hello,", "Excuse me,",
    "Quick question:", "Question:", "Sorry,", "One question:",
)  # fmt: skip
_REQUESTS = (
    "Can you tell me:", "Please tell me:", "Tell me:", "I'd like to know:", "I want to know:",
    "Do you know?", "Could you help me?", "Please answer:",
)  # fmt: skip
_ENDINGS = ("Thanks!", "Thank you.", "Please.", "Please tell me.", "I need to know.")
_HAN_GREETINGS = (
    "你好，", "您好，", "请问", "请问一下，", "问一下，", "你好！", "打扰一下，", "想问一下，",
)  # fmt: skip
_HAN_ENDINGS = ("谢谢", "谢谢！", "请告诉我。", "麻烦你了。")


def vary(question: str, rng: np.random.Generator) -> str:
    """Return the question in another wording, or now and then as it is."""
    if not question.strip() or rng.random() < _PLAIN:
        return question
    return _vary_chinese(question, rng) if _HAN.search(question) else _vary_english(question, rng)


def _vary_english(text: str, rng: np.random.Generator) -> str:
    letters = rng.random()
    if letters < 0.35:
        text = text[0].lower() + text[1:]
    elif letters < 0.5:
        text = text.lower()
    if rng.random() < 0.35:
        text = text.rstrip("?.") or text
    before = rng.random()
    if before < 0.3:
        text = f"{_one_of(_GREETINGS, rng)} {text}"
    elif before < 0.55:
        text = f"{_one_of(_REQUESTS, rng)} {text}"
    if rng.random() < 0.25:
        text = f"{text}{'' if text[-1] in '?.!' else '.'} {_one_of(_ENDINGS, rng)}"
    return text


def _vary_chinese(text: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        text = _one_of(_HAN_GREETINGS, rng) + text
    if rng.random() < 0.3:
        text = text.rstrip("？?。") or text
    if rng.random() < 0.25:
        text += ("" if text[-1] in "？。?！" else "，") + _one_of(_HAN_ENDINGS, rng)
    return text


def _one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
