"""`ggft finetune`: base → data → settings → plan → engine → resume → loop → report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ggft.engine.memory import Plan, make_plan
from ggft.gguf.linears import parse_targets
from ggft.gguf.read import check_model, read_gguf
from ggft.settings.option import to_record
from ggft.settings.training import FinetuneConfig, SettledConfig
from ggft.setup.course import with_general
from ggft.setup.inputs import BaseModel, Data, load_data, open_base
from ggft.setup.open import (
    BATCH_SIZE,
    MAX_LENGTH,
    RANK,
    choose_settings,
    joins,
    limits_of,
    make_shape,
    open_engine,
    plan_run,
)
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals
from ggft.training import checkpoint
from ggft.training.outcome import Outcome
from ggft.training.page import write_report
from ggft.training.run_directory import RunDirectory, check_free, check_output, open_run
from ggft.training.samples import ask
from ggft.training.trainer import Trainer


def finetune(config: FinetuneConfig, progress: Progress | None = None) -> None:
    """Train an adapter; `config.model` is the path of a GGUF file.

    Raises:
        GgftError: anything a user can cause or meet; a run that was begun can be resumed.
    """
    progress = progress or Progress("json" if config.json else "auto")
    output = Path(config.output)
    check_output(output)
    parse_targets(config.target_modules)
    with StopSignals() as stop:
        base = open_base(config.model, config.template)
        data = load_data(
            config.data,
            base,
            form=config.format,
            max_length=config.max_length,
            train_on_prompt=config.train_on_prompt,
            check=stop.check,
            val_split=config.val_split,
            keep_duplicates=config.keep_duplicates,
            seed=config.seed,
        )
        settled = choose_settings(config, data)
        data = with_general(settled, base, data, stop.check)
        shape = make_shape(config, settled.rank, base.file, base.info)
        if config.dry_run:
            _, planned = plan_run(settled, data, shape)
            announce(settled, base, data, planned, progress)
            return
        with open_run(output, resume=config.resume, overwrite=config.overwrite) as run:
            saved = find_checkpoint(run, config, progress)
            micro_batch = saved.state["circumstances"]["micro_batch"] if saved else None
            steps, planned = plan_run(settled, data, shape, micro_batch and tuple(micro_batch))
            announce(settled, base, data, planned, progress)
            check_free(output, checkpoint.n_bytes(planned.n_trained), config.keep_checkpoints)
            stop.check()
            with open_engine(settled, base, shape, planned, stop) as engine:
                trainer = Trainer(settled, base, data, steps, planned, run, engine, progress, stop)
                trainer.begin(saved)
                trainer.loop()
                outcome = trainer.outcome()
            if config.samples and not stop.signal_number:
                progress.note("asking the base model and the adapter")
                samples = ask(base, data, run.adapter, settled, stop, progress)
                outcome = replace(outcome, samples=samples)
            conclude(run, outcome, progress)
            stop.check()


def conclude(run: RunDirectory, outcome: Outcome, progress: Progress) -> None:
    """Write the report and say what came of the run."""
    write_report(run, outcome)
    verdict = outcome.verdict()
    progress.event(
        "done", adapter=str(run.adapter), verdict=verdict.kind, text=verdict.text,
        steps=len(outcome.steps), peak_bytes=outcome.peak_bytes,
    )  # fmt: skip
    progress.result(verdict.text)
    progress.result(f"adapter: {run.adapter}")
    progress.result(f"report:  {run.report_html}")


def plan(config: FinetuneConfig, progress: Progress | None = None) -> None:
    """Print what a run would need, from the model's header alone.

    Raises:
        ResourceError: it would not fit.
    """
    progress = progress or Progress("json" if config.json else "auto")
    file = read_gguf(config.model)
    info = check_model(file)
    n_tokens = min(config.max_length or MAX_LENGTH, info.n_ctx)
    shape = make_shape(config, config.rank or RANK, file, info)
    max_rows = (config.batch_size or BATCH_SIZE) * config.grad_accum
    made = make_plan(
        shape,
        limits_of(config),
        n_tokens=n_tokens,
        max_rows=max_rows,
        joined_tokens=max_rows * n_tokens if joins(config, shape) else None,
        keep=None if config.recompute is None else not config.recompute,
    )
    progress.event("plan", plan=made.record())
    if made.warning:
        progress.warn(made.warning)
    for line in made.lines():
        progress.result(line)


def announce(
    config: SettledConfig, base: BaseModel, data: Data, plan: Plan, progress: Progress
) -> None:
    """Say what will be done, with warnings about the data."""
    account = data.account
    progress.note(f"model        {base.name} ({base.file.path.name})")
    progress.note(
        f"data         {len(data.train)} examples, {account.n_tokens} tokens, "
        f"{account.n_trained} of them trained"
    )
    if data.course.n_general:
        progress.note(
            f"             {data.course.n_general} general rows in each epoch against forgetting"
            " (--mix none leaves them out)"
        )
    for text in account.notes:
        progress.note(f"             {text}")
    progress.note(f"template     {base.template.name}")
    for text in base.template.notes:
        progress.note(f"             {text}")
    for text in (*base.file.warnings, *account.warnings):
        progress.warn(text)
    progress.note(
        f"settings     {config.epochs} epochs, {config.batch_size} examples per batch, "
        f"lr {config.lr:g}, rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}"
    )
    for line in plan.lines():
        progress.note(line)
    if plan.warning:
        progress.warn(plan.warning)
    progress.event("plan", settings=to_record(config), plan=plan.record())


def find_checkpoint(
    run: RunDirectory, config: FinetuneConfig, progress: Progress
) -> checkpoint.Checkpoint | None:
    """Return what to continue from, None to start anew.

    Raises:
        InputError: a run is there, but nothing to continue it from.
    """
    if not config.resume:
        return None
    saved = checkpoint.load_newest(run.checkpoints, progress.warn)
    if saved is None and run.adapter.exists():
        raise InputError(
            "there is an adapter but no checkpoint to continue from",
            path=run.path,
            expected=f"{run.checkpoints.name}/step-…",
            hint="start again with --overwrite, or choose another directory with --output",
        )
    if saved is None:
        progress.note("nothing to resume; starting from the beginning")
    return saved
