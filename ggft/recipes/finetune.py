"""`ggft finetune`: base → data → settings → plan → engine → resume → loop → report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ggft.data.account import Account
from ggft.engine.memory import Plan
from ggft.gguf.linears import block_of, parse_targets
from ggft.gguf.read import check_model, read_gguf
from ggft.hub.download import find_model, model_here
from ggft.hub.header import model_outline
from ggft.settings.declared import asked_template
from ggft.settings.option import to_record
from ggft.settings.training import FinetuneConfig, SettledConfig
from ggft.setup.course import with_course
from ggft.setup.initial import with_initial
from ggft.setup.inputs import BaseModel, Data, load_data, open_model
from ggft.setup.open import (
    choose_settings,
    factor_of,
    lora_to_train,
    make_shape,
    plan_header,
    plan_run,
)
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals
from ggft.system.text import printable
from ggft.training.callbacks import Callback, TensorBoard, WandB
from ggft.training.outcome import Outcome
from ggft.training.run_directory import RunDirectory, check_output
from ggft.training.train import run_training

SHOWN = 3  # answers that are not as given, in the terminal


def finetune(config: FinetuneConfig, progress: Progress | None = None) -> None:
    """Train an adapter.

    Raises:
        GgftError: anything a user can cause or meet; a run that was begun can be resumed.
    """
    progress = progress or Progress("json" if config.json else "auto")
    output = Path(config.output)
    check_output(output)
    if config.dry_run:
        plan(config, progress)
        return
    path = find_model(config.model)
    with StopSignals() as stop:
        base = open_model(path, asked_template(config), warn=progress.warn)
        parse_targets(config.target_modules, base.info.linears)
        data = read_data(config, base, stop)
        callbacks = [Announcement(config, base, progress), *trackers(config)]
        outcome = run_training(config, base, data, stop, progress, callbacks)
        conclude(RunDirectory(output), outcome, progress)
        stop.check()


def read_data(config: FinetuneConfig, base: BaseModel, stop: StopSignals) -> Data:
    """Read the data as the settings say.

    Raises:
        InputError: A file cannot be read, or a row is not an example.
    """
    return load_data(
        base,
        config.data,
        format=config.format,
        columns=config.columns,
        ignore_columns=config.ignore_columns,
        max_length=config.max_length,
        val_split=config.val_split,
        train_on_prompt=config.train_on_prompt,
        keep_duplicates=config.keep_duplicates,
        seed=config.seed,
        check=stop.check,
    )


class Announcement(Callback):
    """Says what will be done before it is."""

    def __init__(self, config: FinetuneConfig, base: BaseModel, progress: Progress) -> None:
        self._config, self._base, self._progress = config, base, progress

    def on_plan(self, settings: SettledConfig, data: Data, plan: Plan) -> None:
        """Say it."""
        say = self._progress.note
        announce(self._config, settings, self._base, data, plan, self._progress, say)


def trackers(config: FinetuneConfig) -> list[Callback]:
    """Return the callback of the service that `--report-to` names.

    Raises:
        InputError: Its extra is not installed.
    """
    if config.report_to == "tensorboard":
        return [TensorBoard(Path(config.output) / "tensorboard")]
    if config.report_to == "wandb":
        return [WandB(project="ggft", config=to_record(config))]
    return []


def conclude(run: RunDirectory, outcome: Outcome, progress: Progress) -> None:
    """Say what came of the run."""
    verdict = outcome.verdict()
    progress.event(
        "done", adapter=str(run.adapter), verdict=verdict.kind, text=verdict.text,
        steps=len(outcome.steps), peak_bytes=outcome.peak_bytes, asked=asdict(outcome.tally()),
        measured=outcome.measured,
    )  # fmt: skip
    progress.result(verdict.text)
    wrong = [record for record in outcome.asked if not (record["as_given"] or record["held_out"])]
    for record in wrong[:SHOWN]:
        progress.result(f"  asked    {printable(record['question'])}")
        progress.result(f"  expected {printable(record['expected'])}")
        progress.result(f"  given    {printable(record['given'])}")
    progress.result(f"adapter: {run.adapter}")
    progress.result(f"report:  {run.report_html}")


def plan(config: FinetuneConfig, progress: Progress | None = None) -> None:
    """Print what a run would do and need.

    Without data it is planned from the model's header alone. A model that is not here is not
    downloaded.

    Raises:
        InputError: The model, the data or a setting cannot be used.
        ResourceError: It would not fit.
    """
    progress = progress or Progress("json" if config.json else "auto")
    is_whole = model_here(config.model) is not None
    with model_outline(config.model, progress.note) as path, StopSignals() as stop:
        if config.data:
            base = open_model(path, asked_template(config), check=is_whole, warn=progress.warn)
            data = read_data(config, base, stop)
            config, _ = with_initial(config, base, progress.warn)
            settled = choose_settings(config, data)
            data = with_course(settled, base, data, stop.check)
            lora = lora_to_train(settled, base.info, settled.rank, factor_of(settled))
            shape = make_shape(settled, lora, base.file, base.info)
            _, planned = plan_run(settled, data, shape)
            announce(config, settled, base, data, planned, progress, progress.result)
            return
        file = read_gguf(path)
        assumed, planned = plan_header(config, file, check_model(file))
    progress.event("plan", assumed=asdict(assumed), plan=planned.record())
    progress.result(
        f"assumed      {assumed.batch_size} examples of up to {assumed.max_length} tokens per"
        f" batch, rank {assumed.rank}"
    )
    progress.result("             with -d FILE the settings follow from the data")
    if planned.warning:
        progress.warn(planned.warning)
    for line in planned.lines():
        progress.result(line)


def announce(
    given: FinetuneConfig,
    config: SettledConfig,
    base: BaseModel,
    data: Data,
    plan: Plan,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Say what will be done, line by line to `say`, with warnings about the data.

    Args:
        given: The settings before those that were left open were chosen.
        config: The settings.
        base: The model.
        data: The data.
        plan: How memory is used.
        progress: Told the warnings and, as an event, the plan.
        say: Prints a line.
    """
    account = data.account
    say(f"model        {base.name} ({base.file.path.name})")
    say(
        f"data         {len(data.train)} examples, {account.n_tokens} tokens, "
        f"{account.n_trained} of them trained"
    )
    if data.course.n_general:
        say(
            f"             {data.course.n_general} general rows in each epoch against forgetting"
            " (--mix none leaves them out)"
        )
    if data.course.n_wordings > 1:
        say(
            "             each epoch asks the questions a little differently (--vary none does not)"
        )
    for text in account.notes:
        say(f"             {text}")
    say(f"template     {base.template.name}")
    for text in base.template.notes:
        say(f"             {text}")
    for text in (*base.file.warnings, *account.warnings):
        progress.warn(text)
    _announce_settings(given, config, account, say)
    for line in plan.lines():
        say(line)
    if ignored := sorted({block_of(name)[1] for name in plan.shape.ignored}):
        progress.warn(
            f"llama.cpp applies no adapter to {', '.join(ignored)} of {base.info.architecture}"
            " models: not trained"
        )
    if plan.warning:
        progress.warn(plan.warning)
    progress.event("plan", settings=to_record(config), plan=plan.record())


def _announce_settings(
    given: FinetuneConfig, config: SettledConfig, account: Account, say: Callable[[str], None]
) -> None:
    say(
        f"settings     {config.epochs} epochs, {config.batch_size} examples per batch, "
        f"lr {config.lr:g}, rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}"
    )
    names = ("epochs", "batch_size", "lr", "rank", "dropout")
    if chosen := [name.replace("_", " ") for name in names if getattr(given, name) is None]:
        say(
            f"             chosen by {account.n_kept} rows and {account.n_trained} tokens to learn:"
            f" {', '.join(chosen)}"
        )
