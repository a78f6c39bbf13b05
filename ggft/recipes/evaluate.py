"""`ggft eval`: the loss of data under a base model and an adapter, through the training engine."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ggft.settings.training import EvalConfig
from ggft.setup.course import GENERAL_CHECK
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from ggft.training.evaluation import evaluate_files


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Print and return the mean loss in nats per token and the perplexity.

    Raises:
        GgftError: A file, a setting or the memory does not serve.
    """
    progress = progress or Progress("json" if config.json else "auto")
    if config.forgetting:
        return forgetting(config, progress)
    found = evaluate_files(config, progress.warn)
    result = {**asdict(found), "perplexity": found.perplexity}
    progress.event("evaluation", **result)
    progress.result(
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.3f} "
        f"({found.tokens} tokens of {found.examples} examples)"
    )
    return result


def forgetting(config: EvalConfig, progress: Progress) -> dict[str, Any]:
    """Print and return the loss of the packaged general rows without the adapter and with it.

    Raises:
        InputError: There is no adapter, or there are rows of one's own.
    """
    if config.adapter is None or config.data:
        raise InputError(
            "--forgetting compares an adapter with its base on packaged rows",
            found="no --adapter" if config.adapter is None else "--data",
            expected="--adapter and no --data",
        )
    general = replace(
        config, data=(str(GENERAL_CHECK),), format="auto", columns=(), ignore_columns=()
    )
    before = evaluate_files(replace(general, adapter_scale=0.0), progress.warn).loss
    after = evaluate_files(general, progress.warn).loss
    result = {"general_before": before, "general_after": after, "ratio": after / before}
    progress.event("forgetting", **result)
    progress.result(f"general text: loss {before:.4f} → {after:.4f} ({after / before - 1:+.1%})")
    return result
