"""`ggft merge`: an adapter into its base model, with a receipt of what survived.

W + scale·B·A is written in the type of W. A small delta can vanish there: the codes of a 4-bit
weight do not move until it exceeds half a step. So each changed tensor is tried on sample rows
first; where too little of the delta would survive, the tensor gets a finer type, and the receipt
says so. Everything streams, a few rows at a time.
"""

from __future__ import annotations

from ggft.adapters.merge import merge
from ggft.adapters.receipt import render
from ggft.hub.download import find_model
from ggft.settings.commands import MergeConfig
from ggft.settings.training import EvalConfig
from ggft.system.progress import ByteBar
from ggft.training.evaluation import evaluate_files


def merge_files(base: str, adapter: str, output: str, config: MergeConfig) -> str:
    """Merge with a progress bar where somebody watches; return what `ggft merge` prints."""

    def measure(model: str, tuned: str | None, template: str) -> float:
        files = EvalConfig(model=model, adapter=tuned, template=template, data=config.data)
        return evaluate_files(files).loss

    with ByteBar() as bar:
        report = merge(find_model(base), adapter, output, config, bar.move_to, measure)
    return render(report)
