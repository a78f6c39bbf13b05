"""`ggft eval`: the loss of data under a base model and an adapter, through the training engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ggft.settings.training import EvalConfig
from ggft.system.progress import Progress
from ggft.training.evaluation import evaluate_files


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Print and return the mean loss in nats per token and the perplexity.

    Raises:
        GgftError: A file, a setting or the memory does not serve.
    """
    progress = progress or Progress("json" if config.json else "auto")
    found = evaluate_files(config, progress.warn)
    result = {**asdict(found), "perplexity": found.perplexity}
    progress.event("evaluation", **result)
    progress.result(
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.3f} "
        f"({found.tokens} tokens of {found.examples} examples)"
    )
    return result
