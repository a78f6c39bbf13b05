"""The mean loss of data under a base model, with or without an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ggft.adapters.adapter import Adapter
from ggft.data.batches import Batches
from ggft.engine.engine import mean_nats
from ggft.hub.download import find_model
from ggft.settings.training import EvalConfig
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


def evaluate_files(config: EvalConfig, warn: Callable[[str], None] = print_warning) -> Evaluation:
    """Return the loss of all rows of data files, as `ggft eval` measures it.

    Raises:
        GgftError: A file, a setting or the memory does not serve.
    """
    path = find_model(config.model)
    with StopSignals() as stop:
        model, adapter = open_with_adapter(path, config.adapter, config.template, warn=warn)
        data = load_data(
            model,
            config.data,
            format=config.format,
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
    lora = lora_of(adapter)
    plan = plan_evaluation(config, make_shape(config, lora, model.file, model.info), data)
    with open_engine(plan, stop) as engine:
        put_adapter(engine, adapter, scale)
        batches = Batches(data.to_evaluate, rows=plan.n_rows, n_tokens=plan.n_tokens, shuffle=False)
        loss, count = mean_nats(engine, batches.epoch(0), stop.check)
    return Evaluation(loss, count, len(data.to_evaluate))
