"""What a run trains in each epoch: the user's rows, and general rows against forgetting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ggft
from ggft.data.advice import n_general
from ggft.data.batches import Chain, Course
from ggft.data.store import StoreView
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import BaseModel, Data, load_data
from ggft.system.errors import InputError

PACKAGED = Path(ggft.__file__).parent / "data"
GENERAL = PACKAGED / "general.json"


def with_general(
    config: SettledConfig, base: BaseModel, data: Data, check: Callable[[], None]
) -> Data:
    """Return the data with general rows mixed into each epoch, as many as the settings say.

    Raises:
        InputError: `--mix` names a file that cannot be read.
    """
    n = n_general(len(data.train), config.mix_share)
    if not n:
        return data
    general = load_general(config.mix, base, check)
    n = min(n, len(general))
    course = Course(Chain.of(data.train, general), len(data.train), n, config.seed)
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
