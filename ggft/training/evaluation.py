"""The mean loss of data under a base model, with or without an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggft.adapters.adapter import Adapter, read_adapter
from ggft.data.batches import Batches
from ggft.data.store import StoreView, Subset
from ggft.engine.engine import Engine, mean_nats
from ggft.engine.memory import Plan
from ggft.hub.download import find_model
from ggft.settings.declared import asked_template
from ggft.settings.option import make
from ggft.settings.training import EvalConfig
from ggft.setup.course import GENERAL_CHECK
from ggft.setup.inputs import BaseModel, Data, load_data, open_with_adapter, print_warning
from ggft.setup.open import (
    MachineSettings,
    lora_of,
    make_shape,
    open_engine,
    plan_evaluation,
    put_adapter,
)
from ggft.system.signals import StopSignals

if TYPE_CHECKING:
    import numpy as np

MAX_ROWS = 32  # trained rows whose loss is measured after the run


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        loss: Mean nats per trained token.
        tokens: Trained tokens.
        examples: Examples that they are in.
    """

    loss: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        """Of how many equally likely tokens one would have this loss."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: BaseModel,
    data: Data,
    adapter: Adapter | str | Path | None = None,
    *,
    scale: float = 1.0,
    **settings: Any,
) -> Evaluation:
    """Return the loss of the held-out examples, or of all where none are held out.

    Args:
        model: From `open_model`.
        data: From `load_data`.
        adapter: An adapter of the model, or its file.
        scale: Factor on its delta.
        settings: How the machine is used: precision, device, threads and memory, as in `ggft eval`.

    Raises:
        GgftError: The adapter is not the model's, or there is not enough memory.
    """
    config = make(EvalConfig, settings)
    tuned = adapter
    if tuned is not None and not isinstance(tuned, Adapter):
        tuned = read_adapter(tuned, model.file)
    with StopSignals() as stop:
        return measure(config, model, data, tuned, scale, stop)


def evaluate_files(config: EvalConfig, warn: Callable[[str], None] = print_warning) -> Evaluation:
    """Return the loss of all rows of data files, as `ggft eval` measures it.

    Raises:
        GgftError: A file, a setting or the memory does not serve.
    """
    path = find_model(config.model)
    with StopSignals() as stop:
        model, adapter = open_with_adapter(path, config.adapter, asked_template(config), warn=warn)
        data = load_data(
            model,
            config.data,
            format=config.format,
            columns=config.columns,
            ignore_columns=config.ignore_columns,
            max_length=config.max_length,
            val_split=0.0,
            train_on_prompt=config.train_on_prompt,
            keep_duplicates=True,
            check=stop.check,
        )
        return measure(config, model, data, adapter, config.adapter_scale, stop)


def measure(
    config: MachineSettings,
    model: BaseModel,
    data: Data,
    adapter: Adapter | None,
    scale: float,
    stop: StopSignals,
) -> Evaluation:
    """Return the loss of the held-out examples, or of all where none are held out.

    Raises:
        InputError: The engine cannot apply the adapter.
        ResourceError: There is not enough memory.
        Interrupted: A signal came.
    """
    stop.check()
    lora = lora_of(adapter, model.info)
    plan = plan_evaluation(config, make_shape(config, lora, model.file, model.info), data)
    with open_engine(plan, stop) as engine:
        put_adapter(engine, adapter, scale)
        batches = Batches(data.to_evaluate, rows=plan.n_rows, n_tokens=plan.n_tokens, shuffle=False)
        loss, count = mean_nats(engine, batches.epoch(0), stop.check)
    return Evaluation(loss, count, len(data.to_evaluate))


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
