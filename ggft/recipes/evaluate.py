"""`ggft eval`: the loss of data under a base model and an adapter, through the training engine."""

from __future__ import annotations

import math
from typing import Any

from ggft.adapters.adapter import read_adapter
from ggft.data.batches import Batches
from ggft.engine.engine import Cancelled, Engine, mean_nats
from ggft.settings.training import EvalConfig
from ggft.setup.inputs import load_data, open_base, with_template
from ggft.setup.open import engine_settings, evaluation_shape, plan_evaluation, put_adapter
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Print and return the mean loss in nats per token and the perplexity.

    Raises:
        GgftError: a file, a setting or the memory does not serve.
    """
    progress = progress or Progress("json" if config.json else "auto")
    with StopSignals() as stop:
        base = open_base(config.model, "auto" if config.adapter else config.template)
        adapter = None
        if config.adapter is not None:
            adapter = read_adapter(config.adapter, base.file)
            base = with_template(config, adapter)
        data = load_data(
            config.data,
            base,
            form=config.format,
            max_length=config.max_length,
            train_on_prompt=config.train_on_prompt,
            check=stop.check,
        )
        stop.check()
        shape = evaluation_shape(config, base, adapter)
        plan = plan_evaluation(config, shape, data)
        with Engine(engine_settings(config, base, adapter, shape, plan)) as engine:
            stop.on_stop(engine.cancel)
            try:
                put_adapter(engine, adapter, config.adapter_scale)
                batches = Batches(
                    data.train, rows=plan.n_rows, n_tokens=plan.n_tokens, shuffle=False
                )
                loss, count = mean_nats(engine, batches.epoch(0), stop.check)
            except Cancelled:
                stop.check()
                raise
            finally:
                stop.on_stop(None)
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": count,
        "examples": len(data.train),
    }
    progress.event("evaluation", **result)
    progress.result(
        f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.3f} "
        f"({count} tokens of {len(data.train)} examples)"
    )
    return result
