"""`ggft finetune`: base → data → settings → plan → engine → resume → loop → report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ggft import checkpoint
from ggft.base import Base, Data, load_data, open_base
from ggft.config import FinetuneConfig, SettledConfig, parse_layers, parse_size, parse_targets
from ggft.engine import Engine, EngineSettings, find_device
from ggft.errors import InputError, ResourceError
from ggft.gguf import GGUFFile, ModelInfo, check_model, read_gguf
from ggft.interrupt import StopSignals
from ggft.machine import physical_cores
from ggft.options import to_record
from ggft.planner import Limits, Plan, Shape, make_plan, weights_bytes
from ggft.progress import Progress
from ggft.recipe import suggest
from ggft.report import Outcome, write_report
from ggft.rundir import RunDirectory, check_free, check_output, open_run
from ggft.samples import ask
from ggft.schedule import steps_per_epoch
from ggft.steps import Steps
from ggft.trainer import Trainer

MAX_LENGTH = 512
BATCH_SIZE = 4
# Rows may be as long as this where examples are shorter, so that several share one.
ROW_TOKENS = 512
RANK = 8
PATIENCE = 3


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
        shape = make_shape(config, settled.rank, base.file, base.info)
        if config.dry_run:
            _, planned = plan_run(settled, data, shape)
            announce(settled, base, data, planned, progress)
            return
        with open_run(output, resume=config.resume, overwrite=config.overwrite) as run:
            saved = find_checkpoint(run, config, progress)
            steps, planned = plan_run(settled, data, shape, saved)
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


def plan_run(
    config: SettledConfig,
    data: Data,
    shape: Shape,
    saved: checkpoint.Checkpoint | None = None,
) -> tuple[Steps, Plan]:
    """Divide the data into steps and choose how they use memory.

    Rows are long, so that short examples share one, unless only shorter ones fit into memory. The
    fused kernels pay for an example whatever row it is in, so there a micro-batch is one row. A run
    that is continued keeps its micro-batches.
    """
    lengths = sorted({max(data.max_length, min(ROW_TOKENS, shape.model.n_ctx)), data.max_length})
    while True:
        steps = make_steps(config, data, lengths.pop())
        try:
            return steps, make_plan(
                shape,
                limits_of(config),
                n_tokens=steps.row_tokens,
                max_rows=steps.max_rows,
                joined_tokens=steps.largest_step_tokens if joins(config, shape) else None,
                size=tuple(saved.state["circumstances"]["micro_batch"]) if saved else None,
                keep=None if config.recompute is None else not config.recompute,
            )
        except ResourceError:
            if not lengths:
                raise


def joins(config: FinetuneConfig, shape: Shape) -> bool:
    """Return whether the rows of a micro-batch are laid end to end as one."""
    return config.packing and shape.fused


def limits_of(config: FinetuneConfig) -> Limits:
    """Return what memory the run may take."""
    memory = None if config.memory is None else parse_size(config.memory)
    return Limits.of(find_device(config.device), memory)


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


def choose_settings(config: FinetuneConfig, data: Data) -> SettledConfig:
    """Fill what the user left open."""
    advice = suggest(len(data.train), data.account.n_trained, batch_size=config.batch_size)
    rank = config.rank or advice.rank
    batch_size = config.batch_size or advice.batch_size
    epochs = config.epochs or advice.epochs
    if config.epochs is None and config.max_steps is not None:
        per_epoch = steps_per_epoch(len(data.train), batch_size * config.grad_accum)
        epochs = -(-config.max_steps // per_epoch)
    chosen = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": config.lr or advice.lr,
        "rank": rank,
        "alpha": config.alpha or 4.0 * rank,
        "dropout": advice.dropout if config.dropout is None else config.dropout,
        "max_length": data.max_length,
        "val_split": data.account.val_share,
        "patience": PATIENCE if config.patience is None else config.patience,
        "threads": config.threads or physical_cores(),
    }
    return SettledConfig(**{**vars(config), **chosen})


def make_shape(config: FinetuneConfig, rank: int, file: GGUFFile, info: ModelInfo) -> Shape:
    """Return what memory depends on."""
    first, last = parse_layers(config.layers, info.n_layer)
    device = find_device(config.device)
    return Shape(
        model=info,
        weights_bytes=weights_bytes(file),
        targets=parse_targets(config.target_modules),
        layer_first=first,
        layer_last=last,
        rank=rank,
        fused=device["type"] == "cpu" and config.kernels != "ggml",
    )


def make_steps(config: SettledConfig, data: Data, n_tokens: int) -> Steps:
    """Divide the data into optimizer steps of rows of at most `n_tokens`."""
    return Steps(
        data.train,
        examples_per_step=config.batch_size * config.grad_accum,
        n_tokens=n_tokens,
        packing=config.packing,
        seed=config.seed,
    )


def announce(config: SettledConfig, base: Base, data: Data, plan: Plan, progress: Progress) -> None:
    """Say what will be done, with warnings about the data."""
    account = data.account
    progress.note(f"model        {base.name} ({base.file.path.name})")
    progress.note(
        f"data         {len(data.train)} examples, {account.n_tokens} tokens, "
        f"{account.n_trained} of them trained"
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


@contextlib.contextmanager
def open_engine(
    config: SettledConfig, base: Base, shape: Shape, plan: Plan, stop: StopSignals
) -> Iterator[Engine]:
    """Open the engine as planned; a signal cancels its calls."""
    settings = EngineSettings(
        paths=[str(path) for path in base.file.paths],
        targets=list(shape.targets),
        layer_first=shape.layer_first,
        layer_last=shape.layer_last,
        rank=shape.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        precision=config.precision,
        device=config.device,
        kernels=config.kernels,
        threads=config.threads,
        keep=plan.keep,
        prepacked_bytes=plan.prepacked_bytes,
        n_rows=plan.n_rows,
        n_tokens=plan.n_tokens,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        max_grad_norm=config.max_grad_norm,
    )
    with Engine(settings) as engine:
        stop.on_stop(engine.cancel)
        try:
            yield engine
        finally:
            stop.on_stop(None)
