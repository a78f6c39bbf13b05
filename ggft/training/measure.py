"""What a kept adapter does to losses: on its own rows, and on general text that it never saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.adapters.adapter import read_adapter
from ggft.data.batches import Batches, Subset
from ggft.data.store import StoreView
from ggft.engine.engine import Engine, mean_nats
from ggft.engine.memory import Plan
from ggft.setup.course import GENERAL_CHECK
from ggft.setup.inputs import BaseModel, Data, load_data
from ggft.setup.open import put_adapter

if TYPE_CHECKING:
    import numpy as np

MAX_ROWS = 32


def measure_kept(
    engine: Engine,
    plan: Plan,
    base: BaseModel,
    data: Data,
    adapter: Path,
    check: Callable[[], None],
) -> dict[str, float]:
    """Return losses before and after: of some trained rows, and of the packaged general rows.

    The engine's matrices are those of the kept adapter afterwards.
    """
    general = load_data(
        base, str(GENERAL_CHECK), max_length=plan.n_tokens, val_split=0.0, keep_duplicates=True,
        check=check,
    ).train  # fmt: skip
    found: dict[str, float] = {}
    for when, kept in (("before", None), ("after", read_adapter(adapter, base.file))):
        put_adapter(engine, kept, 1.0)
        for name, examples in (("rows", _some(data.train)), ("general", general)):
            batches = Batches(examples, rows=plan.n_rows, n_tokens=plan.n_tokens, shuffle=False)
            found[f"{name}_{when}"] = mean_nats(engine, batches.epoch(0), check)[0]
    return found


def _some(examples: StoreView) -> Subset:
    """Return at most `MAX_ROWS` examples, spread evenly."""
    import numpy as np

    n = len(examples)
    indexes: np.ndarray = np.arange(min(n, MAX_ROWS)) * n // min(n, MAX_ROWS)
    return Subset(examples, indexes, examples.lengths[indexes])
