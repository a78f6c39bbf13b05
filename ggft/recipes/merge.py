"""`ggft merge`: an adapter into its base model, with a receipt of what survived.

W + scale·B·A is written in the type of W. A small delta can vanish there: the codes of a 4-bit
weight do not move until it exceeds half a step. So each changed tensor is tried on sample rows
first; where too little of the delta would survive, the tensor gets a finer type, and the receipt
says so. Everything streams, a few rows at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggft.adapters.adapter import Adapter
from ggft.adapters.merge import Measure
from ggft.adapters.merge import merge as merge_adapter
from ggft.adapters.receipt import MergeReport, render
from ggft.hub.download import find_model
from ggft.settings.commands import MergeConfig
from ggft.settings.option import make
from ggft.settings.training import EvalConfig
from ggft.setup.inputs import BaseModel
from ggft.system.progress import ByteBar
from ggft.training.evaluation import evaluate_files


def merge(
    model: BaseModel | str | Path,
    adapter: Adapter | str | Path,
    output: str | Path,
    **settings: Any,
) -> MergeReport:
    """Write a model with an adapter merged in; return what survived of each tensor's delta.

    Args:
        model: From `open_model`, or a GGUF file or a name.
        adapter: The adapter, or its file.
        output: The GGUF to write.
        settings: Those of `ggft merge` by their long flags, such as type="Q8_0".

    Raises:
        InputError: A file is bad, they do not fit, or the output cannot be used.
        ResourceError: The disk is full.
        NumericError: The sum has NaN or infinity in it.
    """
    base = model.file.path if isinstance(model, BaseModel) else find_model(str(model))
    tuned = adapter.path if isinstance(adapter, Adapter) else adapter
    config = make(MergeConfig, settings)
    return merge_adapter(base, tuned, output, config, measure=_measure_on(config.data))


def _measure_on(data: tuple[str, ...]) -> Measure:
    """Return what measures the loss of a model on data."""

    def measure(model: str, tuned: str | None, template: str) -> float:
        files = EvalConfig(model=model, adapter=tuned, template=template, data=data)
        return evaluate_files(files).loss

    return measure


def merge_files(base: str, adapter: str, output: str, config: MergeConfig) -> str:
    """Merge with a progress bar where somebody watches; return what `ggft merge` prints."""
    measure = _measure_on(config.data)
    with ByteBar() as bar:
        report = merge_adapter(find_model(base), adapter, output, config, bar.move_to, measure)
    return render(report)
