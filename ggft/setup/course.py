"""What a run trains in each epoch: rows, their questions varied, and general rows beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ggft
from ggft.data.advice import n_general
from ggft.data.batches import Chain, Course, Examples
from ggft.data.store import StoreView, TokenStore
from ggft.data.variation import vary
from ggft.prompts.messages import Message
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import BaseModel, Data, load_data
from ggft.system.errors import InputError

if TYPE_CHECKING:
    import numpy as np

PACKAGED = Path(ggft.__file__).parent / "data"
GENERAL = PACKAGED / "general.json"
GENERAL_CHECK = PACKAGED / "general_check.json"
MAX_WORDINGS = 32


def with_course(
    config: SettledConfig, base: BaseModel, data: Data, check: Callable[[], None]
) -> Data:
    """Return the data with its course as the settings say: wordings and general rows.

    Raises:
        InputError: `--mix` names a file that cannot be read.
    """
    n_rows = len(data.train)
    parts: list[Examples] = [data.train]
    n_wordings = 1
    if config.vary == "questions" and data.conversations:
        n_wordings = min(config.epochs, MAX_WORDINGS)
        parts += _wordings(config, base, data, n_wordings - 1, check)
    n = n_general(n_rows, config.mix_share)
    if n:
        general = load_general(config.mix, base, check)
        n = min(n, len(general))
        parts.append(general)
    course = Course(Chain.of(*parts), n_rows, n_wordings, n, config.seed)
    return replace(data, course=course)


def load_general(mix: str, base: BaseModel, check: Callable[[], None]) -> StoreView:
    """Return the tokenized general rows: the packaged ones, or those of a file.

    Raises:
        InputError: it is no such file, or not one of rows.
    """
    path = GENERAL if mix == "auto" else Path(mix)
    if not path.exists():
        raise InputError(
            "there are no such rows to mix in", path=path, expected="auto, none, or a file of rows"
        )
    return load_data(base, path, val_split=0.0, keep_duplicates=True, check=check).train


def _wordings(
    config: SettledConfig, base: BaseModel, data: Data, n: int, check: Callable[[], None]
) -> list[StoreView]:
    """Return the rows in `n` more wordings; a row that gets too long stays as it is."""
    import numpy as np

    views: list[StoreView] = []
    for number in range(1, n + 1):
        check()
        rng = np.random.Generator(np.random.PCG64([config.seed, number]))
        varied = [_varied(messages, rng) for messages in data.conversations]
        tokens = base.template.encode_all(varied, train_on_prompt=config.train_on_prompt)
        store = TokenStore()
        for index, encoded in enumerate(tokens):
            if isinstance(encoded, InputError) or len(encoded.ids) > base.info.n_ctx:
                ids, trained = data.train.get(index)
                store.add(ids.tolist(), trained.tolist())
            else:
                store.add(encoded.ids, encoded.trained)
        views.append(StoreView(store, np.arange(len(varied)), base.info.n_ctx))
    return views


def _varied(messages: list[Message], rng: np.random.Generator) -> list[Message]:
    """Return the conversation with its last question varied."""
    last = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        return messages
    question: Message = {**messages[last], "content": vary(messages[last]["content"], rng)}
    return [*messages[:last], question, *messages[last + 1 :]]
