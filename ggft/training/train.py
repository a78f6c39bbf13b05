"""Train an adapter: what `ggft finetune` and `import ggft` both call."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggft.adapters.adapter import Adapter, read_adapter
from ggft.settings.option import make
from ggft.settings.training import FinetuneConfig
from ggft.setup.course import draw_general, with_course
from ggft.setup.initial import with_initial
from ggft.setup.inputs import BaseModel, Data, load_data
from ggft.setup.open import (
    choose_settings,
    factor_of,
    lora_to_train,
    make_shape,
    open_engine,
    plan_run,
    put_adapter,
)
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals
from ggft.training import checkpoint
from ggft.training.callbacks import Callback, Callbacks, Display, RunLog
from ggft.training.evaluation import measure_kept
from ggft.training.outcome import Outcome
from ggft.training.page import write_report
from ggft.training.run_directory import (
    RunDirectory,
    check_free,
    check_output,
    open_run,
    settings_to_resume,
)
from ggft.training.samples import ask
from ggft.training.trainer import Trainer
from ggft.training.verdict import Losses, Verdict

# Settings that were made use of when the model was opened and the data read; the seed serves both.
_OF_INPUTS = {
    *inspect.signature(load_data).parameters, "template", "template_arg", "thinking",
} - {"seed"}  # fmt: skip
_OF_COMMAND = {"dry_run", "json", "report_to"}


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        adapter: The adapter that was kept; `adapter.save(path)` copies it.
        losses: Before and after, on training and on held-out examples.
        verdict: Whether it learned, in a word and in a sentence.
        outcome: All that the report says.
    """

    adapter: Adapter
    losses: Losses
    verdict: Verdict
    outcome: Outcome


def train(
    model: BaseModel,
    data: Data,
    *,
    output: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    show: str = "auto",
    **settings: Any,
) -> TrainingResult:
    """Train a LoRA adapter on a quantized model.

    Ctrl-C ends training after a moment: what was learned is saved, and Interrupted raised.

    Args:
        model: From `open_model`.
        data: From `load_data`.
        output: The run's directory; without, it is a temporary one that goes with the adapter.
        callbacks: Told what happens.
        resume: Whether to continue the run in `output`, whose settings then are the defaults.
        overwrite: Whether to replace it.
        show: What is printed: auto, bar, lines, json or quiet.
        settings: Those of `ggft finetune` by their long flags, such as rank=8 or lr=1e-3; what is
            left open is chosen from the data.

    Raises:
        GgftError: Anything that a user can cause or meet; a run that was begun can be resumed.
    """
    for name in settings:
        if name in _OF_INPUTS | _OF_COMMAND:
            raise InputError(
                f"`{name}` is not a setting of training",
                hint="give it to open_model or load_data"
                if name in _OF_INPUTS
                else "it is one of the command; here there are `show` and `callbacks`",
            )
    folder = Path(tempfile.mkdtemp(prefix="ggft-run-")) if output is None else Path(output)
    try:
        given = {"model": str(model.file.path), "output": str(folder), **settings}
        given |= {"resume": resume, "overwrite": overwrite}
        config = make(FinetuneConfig, given, settings_to_resume(given))
        check_output(folder)
        with StopSignals() as stop:
            outcome = run_training(config, model, data, stop, Progress(show), callbacks)
            stop.check()
        adapter = read_adapter(RunDirectory(folder).adapter, model.file)
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if output is None:
        weakref.finalize(adapter, shutil.rmtree, folder, ignore_errors=True)
    return TrainingResult(adapter, outcome.losses(), outcome.verdict(), outcome)


def run_training(
    config: FinetuneConfig,
    model: BaseModel,
    data: Data,
    stop: StopSignals,
    progress: Progress,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Settle, plan, open the engine, train, ask for samples, write the report.

    Raises:
        GgftError: Anything that a user can cause or meet.
    """
    initial = None
    if not (config.resume and RunDirectory(Path(config.output)).can_be_resumed()):
        config, initial = with_initial(config, model, progress.warn)
    settled = choose_settings(config, data)
    data = with_course(settled, model, data, stop.check)
    lora = lora_to_train(settled, model.info, settled.rank, factor_of(settled))
    shape = make_shape(settled, lora, model.file, model.info)
    output = Path(config.output)
    with open_run(output, resume=config.resume, overwrite=config.overwrite) as run:
        saved = find_checkpoint(run, config, progress)
        micro_batch = saved.state["circumstances"]["micro_batch"] if saved else None
        steps, plan = plan_run(settled, data, shape, micro_batch and tuple(micro_batch))
        tell = Callbacks([RunLog(run), Display(progress), *callbacks])
        tell.on_plan(settled, data, plan)
        check_free(output, checkpoint.n_bytes(plan.n_trained), config.keep_checkpoints)
        stop.check()
        with open_engine(plan, stop) as engine:
            if data.course.n_general and settled.mix_as_base:
                progress.note("asking the base model what it would say to general rows")
                put_adapter(engine, None, 1.0)
                steps.examples = draw_general(engine, data.course, settled.epochs, stop.check)
            trainer = Trainer(settled, model, data, steps, plan, run, engine, progress, stop, tell)
            trainer.begin(saved, initial)
            trainer.loop()
            outcome = trainer.outcome()
            if settled.ask and run.adapter.exists():
                measured = measure_kept(engine, plan, model, data, run.adapter, stop.check)
                outcome = replace(outcome, measured=measured)
        if (config.samples or config.ask) and not stop.signal_number:
            progress.note("asking the base model and the adapter")
            answers = ask(model, data, run.adapter, settled, stop, progress)
            outcome = replace(outcome, samples=answers.samples, asked=answers.asked)
        write_report(run, outcome)
    return outcome


def find_checkpoint(
    run: RunDirectory, config: FinetuneConfig, progress: Progress
) -> checkpoint.Checkpoint | None:
    """Return what to continue from, None to start anew.

    Raises:
        InputError: A run is there, but nothing to continue it from.
    """
    if not config.resume:
        return None
    saved = checkpoint.load_newest(run.checkpoints, progress.warn)
    if saved is None and run.adapter.exists() and not run.was_begun():
        raise InputError(
            "there is an adapter but no checkpoint to continue from",
            path=run.path,
            expected=f"{run.checkpoints.name}/step-…",
            hint="start again with --overwrite, or choose another directory with --output",
        )
    if saved is None:
        progress.note("nothing to resume; starting from the beginning")
    return saved
