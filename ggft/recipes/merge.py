"""`ggft merge`: an adapter into its base model, with a receipt of what survived.

The merged file has the base's own types and size. A small delta vanishes when a four-bit weight is
rounded; so the linears are fitted, block by block, to what they will read (see
`ggft.adapters.calibrate`): on the rows of the fine-tune, and on general ones that come with ggft.
With `--type auto` nothing is fitted: each tensor is tried on sample rows, gets a finer type where
too little of the delta would survive, and the file grows.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ggft.adapters.adapter import Adapter, read_adapter
from ggft.adapters.merge import Fit, Measure
from ggft.adapters.merge import merge as merge_adapter
from ggft.adapters.receipt import MergeReport, render
from ggft.gguf.read import check_decoder, read_gguf
from ggft.hub.download import find_model
from ggft.prompts.builtin import BUILTIN
from ggft.settings.commands import MergeConfig
from ggft.settings.option import make
from ggft.settings.training import EvalConfig
from ggft.setup.calibration import N_GENERAL, Fitter, Rows, rows_of_run
from ggft.setup.inputs import BaseModel, print_warning
from ggft.system.errors import InputError
from ggft.system.progress import ByteBar, print_note
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
    config, fit = _fit_for(base, tuned, config)
    return merge_adapter(base, tuned, output, config, measure=_measure_on(config.data), fit=fit)


def _fit_for(
    base: str | Path, adapter: str | Path, config: MergeConfig
) -> tuple[MergeConfig, Fit | None]:
    """Return what fits weights to their inputs, and the settings where nothing can."""
    if config.type == "auto":
        return config, None
    file = read_gguf(base)
    try:
        check_decoder(file, "fitting weights")
    except InputError as error:
        if config.type == "base":
            print_warning(f"{error.message}: nothing can be fitted, so the file may grow")
            config = replace(config, type="auto")
        return config, None
    note = read_adapter(adapter, file, check_hash=not config.any_base).note
    if note:
        print_note(note)
    source = Rows(config.data) if config.data else rows_of_run(adapter)
    rows = ", ".join(source.data) or "no rows of the fine-tune (--data gives some)"
    print_note(f"fitting to {rows}, and {N_GENERAL} general rows")
    return config, Fitter(base, adapter, source, any_base=config.any_base)


def _measure_on(data: tuple[str, ...]) -> Measure:
    """Return what measures the loss of a model on data."""

    def measure(model: str, tuned: str | None, template: str) -> float:
        """Measure under a template that is given by its name, or itself where it has none."""
        with tempfile.TemporaryDirectory() as folder:
            if template not in ("auto", "gguf", *BUILTIN):
                file = Path(folder) / "template.jinja"
                file.write_text(template, encoding="utf-8")
                template = str(file)
            files = EvalConfig(model=model, adapter=tuned, template=template, data=data)
            return evaluate_files(files).loss

    return measure


def merge_files(base: str, adapter: str, output: str, config: MergeConfig) -> str:
    """Merge with a progress bar where somebody watches; return what `ggft merge` prints."""
    path = find_model(base)
    config, fit = _fit_for(path, adapter, config)
    measure = _measure_on(config.data)
    with ByteBar(total=path.stat().st_size) as bar:
        report = merge_adapter(path, adapter, output, config, bar.move_to, measure, fit)
    return render(report)
