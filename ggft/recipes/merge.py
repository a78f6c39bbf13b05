"""Merges an adapter into its base model, with a receipt of what survived.

W + scale·B·A is written in the type of W. A small delta can vanish there: the codes of a 4-bit
weight do not move until it exceeds half a step. So each changed tensor is tried on sample rows
first; where too little of the delta would survive, the tensor gets a finer type, and the receipt
says so. Everything streams, a few rows at a time.
"""

from __future__ import annotations

from ggft.adapters.merge import Measure, merge
from ggft.adapters.receipt import render
from ggft.settings.commands import MergeConfig
from ggft.system.progress import ByteBar


def merge_files(
    base: str, adapter: str, output: str, config: MergeConfig, measure: Measure | None = None
) -> str:
    """Merge with a progress bar where somebody watches; return what `ggft merge` prints."""
    with ByteBar() as bar:
        report = merge(base, adapter, output, config, bar.move_to, measure)
    return render(report)
