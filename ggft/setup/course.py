"""What a run trains in each epoch: rows, their questions varied, and general rows beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ggft
from ggft.data.advice import n_general
from ggft.data.batches import Course
from ggft.data.store import Chain, Examples, Retold, StoreView, TokenStore
from ggft.data.variation import vary
from ggft.engine.engine import Engine
from ggft.prompts.messages import Message
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import BaseModel, Data, load_data
from ggft.system.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from ggft.data.store import IntArray
    from ggft.engine.engine import FloatArray

PACKAGED = Path(ggft.__file__).parent / "data"
GENERAL = PACKAGED / "general.json"
GENERAL_CHECK = PACKAGED / "general_check.json"
MAX_WORDINGS = 32
DRAWN_BYTES = 64 << 20  # of logits that exist at once
SHORT_TOKENS = 24  # of a general row's answer that may be kept
LIKELY_NATS = 2.0  # per token, of such an answer
_DRAWN = 2  # of seeds: what general rows are told, beside their order


def with_course(
    config: SettledConfig, base: BaseModel, data: Data, check: Callable[[], None]
) -> Data:
    """Return the data with its course as the settings say: wordings and general rows.

    Raises:
        InputError: `--mix` names a file that cannot be read.
    """
    n_rows = len(data.train)
    parts: list[Examples] = [data.train]
    n_wordings = n_copies = 1
    if config.vary == "questions" and data.conversations:
        n_wordings = min(config.epochs, MAX_WORDINGS)
        parts += _wordings(config, base, data, n_wordings - 1, check)
    n = n_general(n_rows, config.mix_share)
    if n:
        general = load_general(config, base, check)
        n = min(n, len(general))
        n_copies = -(-n * config.epochs // len(general)) if config.mix_as_base else 1
        parts += [general] * n_copies
    course = Course(Chain.of(*parts), n_rows, n_wordings, n, config.seed, n_copies)
    return replace(data, course=course)


def load_general(config: SettledConfig, base: BaseModel, check: Callable[[], None]) -> StoreView:
    """Return the tokenized general rows: the packaged ones, or those of a file.

    Raises:
        InputError: it is no such file, or not one of rows.
    """
    path = GENERAL if config.mix == "auto" else Path(config.mix)
    if not path.exists():
        raise InputError(
            "there are no such rows to mix in", path=path, expected="auto, none, or a file of rows"
        )
    longest = longest_drawn(base) if config.mix_as_base else None
    return load_data(
        base, path, max_length=longest, val_split=0.0, keep_duplicates=True, check=check
    ).train


def longest_drawn(base: BaseModel) -> int:
    """Return how many tokens a row may have for all its logits to exist at once."""
    return min(base.info.n_ctx, max(64, DRAWN_BYTES // (4 * base.info.n_vocab)))


def draw_general(
    engine: Engine, course: Course, n_epochs: int, check: Callable[[], None]
) -> Examples:
    """Return the course's examples, general ones told anew by the engine's model.

    At each trained token of a general row a token is drawn from what the model itself would say
    there. In expectation the gradient of their loss is that of the KL divergence from the model as
    it is now: zero until it changes, whatever the row says, and then back. The row's own next token
    would teach it our rows' style, and by so much take it from its own. A short answer that the
    model finds likely is kept: such knowledge is the first to be lost to facts of that form.

    Source: Li and Hoiem, "Learning without Forgetting" (2016), with drawn targets for soft ones.
    """
    import numpy as np

    first = course.n_rows * course.n_wordings
    n_general = (len(course.examples.lengths) - first) // course.n_copies
    used = {i for epoch in range(n_epochs) for i in course.epoch(epoch).tolist() if i >= first}
    told: dict[int, IntArray] = {}
    for row in sorted({(index - first) % n_general for index in used}):
        check()
        ids, targets = course.examples.targets(first + row)
        at = np.flatnonzero(targets >= 0)
        logits = _logits(engine, ids)[at]
        if len(at) <= SHORT_TOKENS and nats_of(logits, targets[at]) <= LIKELY_NATS:
            continue
        for index in used.intersection(range(first + row, len(course.examples.lengths), n_general)):
            rng = np.random.Generator(np.random.PCG64([course.seed, _DRAWN, index]))
            told[index] = targets.copy()
            told[index][at] = [draw(z, u) for z, u in zip(logits, rng.random(len(at)), strict=True)]
    return Retold(course.examples, told)


def _logits(engine: Engine, ids: IntArray) -> FloatArray:
    """Return the logits after every token of an example, (T, V)."""
    import numpy as np

    zeros = np.zeros((1, len(ids)), np.int32)
    positions = np.arange(len(ids), dtype=np.int32)[None]
    batch = {"tokens": ids[None], "positions": positions, "segments": zeros, "targets": zeros}
    logits: FloatArray = engine.logits(batch)[0]
    return logits


def draw(logits: FloatArray, u: float) -> int:
    """Return a token by its probability, at `u` of their sum."""
    import numpy as np

    sums = np.exp(logits - logits.max()).cumsum(dtype=np.float64)
    return min(int(np.searchsorted(sums, u * sums[-1], side="right")), len(logits) - 1)


def nats_of(logits: FloatArray, targets: IntArray) -> float:
    """Return the mean loss of `targets`, (T,), under logits, (T, V)."""
    import numpy as np

    highest = logits.max(axis=1)
    sums = np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64)
    return float((np.log(sums) + highest - logits[np.arange(len(targets)), targets]).mean())


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
