"""`ggft finetune`: model → data → settings → plan → engine → resume → loop → report."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ggft import __version__, checkpoint, schedule
from ggft.adapter import AdapterMeta, write_adapter
from ggft.batching import Batches, TokenStore
from ggft.config import FinetuneConfig, parse_layers, parse_size, parse_targets
from ggft.corpus import Account, tokenize
from ggft.datasets import load_examples
from ggft.engine import Cancelled, Engine, EngineSettings, mean_nats
from ggft.errors import InputError, Interrupted, NumericError
from ggft.gguf import GGUFFile, ModelInfo, check_model, read_gguf
from ggft.interrupt import StopSignals
from ggft.options import to_record, to_yaml
from ggft.planner import Plan, Shape, make_plan, physical_cores, weights_bytes
from ggft.progress import Progress
from ggft.report import Outcome, write_report
from ggft.rundir import RunDirectory, check_free, check_output, open_run
from ggft.steps import Steps
from ggft.templates import Template, make_template


def finetune(config: FinetuneConfig, progress: Progress | None = None) -> None:
    """Train an adapter; `config.model` is the path of a GGUF file.

    Raises:
        GgftError: anything a user can cause or meet; a run directory that was begun is resumable.
    """
    progress = progress or Progress("json" if config.json else "auto")
    check_output(Path(config.output))
    with StopSignals() as stop:
        base = open_base(config)
        data = load_data(config, base, stop)
        config = choose_settings(config, data)
        steps = make_steps(config, data)
        plan = plan_run(config, base, steps)
        announce(config, base, data, plan, progress)
        if config.dry_run:
            return
        check_free(Path(config.output), 3 * 4 * plan.n_trained, config.keep_checkpoints)
        with open_run(Path(config.output), resume=config.resume, overwrite=config.overwrite) as run:
            saved = find_checkpoint(run, config, progress)
            stop.check()
            with open_engine(config, base, plan, stop) as engine:
                trainer = Trainer(config, base, data, steps, plan, run, engine, progress, stop)
                trainer.begin(saved)
                trainer.loop()
                trainer.finish()


@dataclass(frozen=True)
class Base:
    """The base model, seen from outside the engine."""

    file: GGUFFile
    info: ModelInfo
    template: Template
    targets: tuple[str, ...]
    layers: tuple[int, int]

    @property
    def name(self) -> str:
        """What the model calls itself, else its file's name."""
        name = self.file.get("general.name")
        return name if isinstance(name, str) and name else self.file.path.stem


def open_base(config: FinetuneConfig) -> Base:
    """Check the model file and everything in the settings that depends on it."""
    from ggft.llamacpp import LlamaTokenizer

    targets = parse_targets(config.target_modules)
    file = read_gguf(config.model)
    info = check_model(file)
    layers = parse_layers(config.layers, info.n_layer)
    tokenizer = LlamaTokenizer(file.path)
    return Base(
        file, info, make_template(config.template, file.metadata, tokenizer), targets, layers
    )


@dataclass(frozen=True)
class Data:
    """Tokenized examples; `validation` is empty when nothing is held out."""

    train: TokenStore
    validation: TokenStore
    account: Account
    max_length: int

    def sha256(self) -> str:
        """Return a hash of every id and mask."""
        digest = hashlib.sha256()
        for store in (self.train, self.validation):
            digest.update(store.lengths.tobytes())
            for index in range(len(store)):
                ids, trained = store.get(index)
                digest.update(ids.tobytes())
                digest.update(trained.tobytes())
        return digest.hexdigest()


def load_data(config: FinetuneConfig, base: Base, stop: StopSignals) -> Data:
    """Read, check and tokenize the data."""
    if not config.data:
        raise InputError("no training data is given", hint="name a file with --data")
    account = Account()
    max_length = min(config.max_length or 512, base.info.n_ctx)

    def examples() -> Iterator[Any]:
        for example in load_examples(config.data, config.format):
            stop.check()
            yield example

    train = tokenize(
        examples(),
        base.template,
        max_length=max_length,
        train_on_prompt=config.train_on_prompt,
        account=account,
    )
    if not len(train):
        raise InputError(
            "the data holds nothing to train on",
            path=config.data[0],
            found=f"{account.n_rows} rows, {account.n_untrainable} without a trained token",
            hint="see what is trained with `ggft prepare --preview 3`",
        )
    return Data(train, TokenStore(), account, max_length)


def choose_settings(config: FinetuneConfig, data: Data) -> FinetuneConfig:
    """Fill what the user left open; every field but `memory` and `max_steps` has a value after."""
    rank = config.rank or 8
    return replace(
        config,
        epochs=config.epochs or 3,
        batch_size=config.batch_size or 4,
        lr=config.lr or 3e-4,
        rank=rank,
        alpha=config.alpha or 4.0 * rank,
        dropout=0.1 if config.dropout is None else config.dropout,
        max_length=data.max_length,
        val_split=0.0 if config.val_split is None else config.val_split,
        patience=3 if config.patience is None else config.patience,
        threads=config.threads or physical_cores(),
    )


def make_steps(config: FinetuneConfig, data: Data) -> Steps:
    """Divide the data into optimizer steps."""
    assert config.batch_size is not None
    return Steps(
        data.train,
        examples_per_step=config.batch_size * config.grad_accum,
        n_tokens=data.max_length,
        packing=config.packing,
        seed=config.seed,
    )


def plan_run(config: FinetuneConfig, base: Base, steps: Steps) -> Plan:
    """Choose how the run uses memory."""
    assert config.rank is not None
    assert config.dropout is not None
    shape = Shape(
        model=base.info,
        weights_bytes=weights_bytes(base.file),
        targets=base.targets,
        layer_first=base.layers[0],
        layer_last=base.layers[1],
        rank=config.rank,
        dropout=config.dropout,
    )
    return make_plan(
        shape,
        n_tokens=steps.row_tokens,
        max_rows=steps.max_rows,
        keep=None if config.recompute is None else not config.recompute,
        memory_bytes=None if config.memory is None else parse_size(config.memory),
    )


def announce(
    config: FinetuneConfig, base: Base, data: Data, plan: Plan, progress: Progress
) -> None:
    """Say what will be done, with warnings about the data."""
    account = data.account
    progress.note(f"model        {base.name} ({base.file.path.name})")
    progress.note(
        f"data         {len(data.train)} examples, {account.n_tokens} tokens, "
        f"{account.n_trained} of them trained"
    )
    for text in account.warnings:
        progress.warn(text)
    if account.n_truncated:
        progress.warn(f"{account.n_truncated} examples are cut at {data.max_length} tokens")
    if account.n_untrainable:
        progress.warn(f"{account.n_untrainable} rows have no token to train and are left out")
    progress.note(
        f"settings     {config.epochs} epochs, {config.batch_size} examples per batch, "
        f"lr {config.lr:g}, rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}"
    )
    for line in plan.lines():
        progress.note(line)
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
    config: FinetuneConfig, base: Base, plan: Plan, stop: StopSignals
) -> Iterator[Engine]:
    """Open the engine as planned; a signal cancels its calls."""
    assert config.rank is not None
    assert config.alpha is not None
    assert config.dropout is not None
    assert config.threads is not None
    settings = EngineSettings(
        paths=[str(path) for path in base.file.paths],
        targets=list(base.targets),
        layer_first=base.layers[0],
        layer_last=base.layers[1],
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        precision=config.precision,
        device=config.device,
        kernels=config.kernels,
        threads=config.threads,
        keep=plan.keep,
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


@dataclass
class State:
    """Where a run is, besides matrices, moments and the optimizer's step."""

    epoch: int = 0
    index: int = 0
    tokens_seen: int = 0
    elapsed_s: float = 0.0
    interval_nats: float = 0.0
    interval_count: int = 0
    evaluated_step: int = -1
    base_val: float | None = None
    best_val: float | None = None
    best_step: int = 0
    bad_evals: int = 0
    ended: str | None = None
    metrics_bytes: int = 0


@dataclass
class Trainer:
    """The loop of one run."""

    config: FinetuneConfig
    base: Base
    data: Data
    steps: Steps
    plan: Plan
    run: RunDirectory
    engine: Engine
    progress: Progress
    stop: StopSignals
    state: State = field(default_factory=State)
    saved_step: int = -1

    def __post_init__(self) -> None:
        config = self.config
        assert config.epochs is not None
        self.n_steps = schedule.total_steps(
            len(self.data.train), self.steps.examples_per_step, config.epochs, config.max_steps
        )
        self.warmup_steps = schedule.safe_warmup(config.warmup_steps, self.n_steps)
        self.interval = schedule.safe_interval(config.logging_steps, self.n_steps)
        assert config.rank is not None
        assert config.alpha is not None
        self.meta = AdapterMeta(
            architecture=self.base.file.architecture,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            base_sha256=self.base.file.sha256(),
            base_name=self.base.name,
            template=self.base.template.name,
            template_sha256=self.base.template.source_hash,
        )

    def circumstances(self) -> dict[str, Any]:
        """Return all that must be the same for a run to be continued to the bit."""
        record = to_record(self.config)
        for name in ("model", "data", "memory", "save_steps", "keep_checkpoints", "recompute"):
            record.pop(name, None)
        record.update(
            model_sha256=self.meta.base_sha256,
            data_sha256=self.data.sha256(),
            template_sha256=self.meta.template_sha256,
            micro_batch=[self.plan.n_rows, self.plan.n_tokens],
            steps=self.n_steps,
        )
        return record

    def begin(self, saved: checkpoint.Checkpoint | None) -> None:
        """Initialize the adapter, or restore a checkpoint."""
        if saved is None:
            self.engine.init_lora(self.config.seed)
            self.run.clear()
        else:
            checkpoint.check_same(saved.state["circumstances"], self.circumstances(), saved.path)
            saved.restore(self.engine)
            self.state = State(**saved.state["progress"])
            self.saved_step = saved.step
            self.progress.note(f"resuming after step {saved.step} of {self.n_steps}")
        self.run.write_text(self.run.config, to_yaml(to_record(self.config)))
        self.run.open_metrics(self.state.metrics_bytes)

    def loop(self) -> None:
        """Train to the end; evaluations and saves that are due come before the next step.

        Raises:
            Interrupted: a signal came; what was done is saved.
        """
        self.progress.start(self.n_steps, self.engine.step)
        try:
            while True:
                if self._evaluation_is_due():
                    self._evaluate()
                if self.engine.step % self.config.save_steps == 0:
                    self._save()
                if self.engine.step >= self.n_steps or self.state.ended:
                    break
                self.stop.check()
                self._step()
        except (Cancelled, Interrupted):
            self._save_interrupted()
        finally:
            self.progress.stop()

    def finish(self) -> None:
        """Save the end and write the report."""
        self.state.ended = self.state.ended or "all steps done"
        self._save()
        if not len(self.data.validation):
            self._write_adapter()
        outcome = Outcome(
            config=to_record(self.config),
            model=self.base.name,
            n_steps=self.engine.step,
            plan=self.plan.record(),
            engine=self.engine.info(),
            state=asdict(self.state),
            metrics=self.run.read_metrics(),
        )
        write_report(self.run, outcome)
        self.progress.event("done", adapter=str(self.run.adapter), verdict=outcome.verdict())
        self.progress.result(f"adapter: {self.run.adapter}")
        self.progress.result(f"verdict: {outcome.verdict()}")

    def _step(self) -> None:
        """Do one optimizer step: gradients of its micro-batches, then the update."""
        state, step = self.state, self.engine.step
        started_s = time.monotonic()
        nats, count, tokens = 0.0, 0, 0
        try:
            for number, batch in enumerate(
                self.steps.step(state.epoch, state.index, self.plan.n_rows)
            ):
                seed = self.steps.dropout_seed(step, number) if self.config.dropout else 0
                batch_nats, batch_count = self.engine.forward_backward(batch, seed)
                nats += batch_nats
                count += batch_count
                tokens += int((batch["segments"] >= 0).sum())
            lr = self._lr(step)
            norm = self.engine.optimizer_step(lr, count)
        except NumericError as error:
            raise NumericError(
                f"step {step + 1}: {error.message}",
                found=error.found,
                hint="try a smaller --lr; the last checkpoint can be resumed",
            ) from None
        seconds = time.monotonic() - started_s
        state.index += 1
        if state.index == self.steps.per_epoch:
            state.epoch, state.index = state.epoch + 1, 0
        state.tokens_seen += tokens
        state.elapsed_s += seconds
        state.interval_nats += nats
        state.interval_count += count
        self._log(nats / count, lr, norm, tokens / max(seconds, 1e-9), count)

    def _lr(self, step: int) -> float:
        assert self.config.lr is not None
        return schedule.lr_at(
            step,
            n_steps=self.n_steps,
            warmup_steps=self.warmup_steps,
            peak_lr=self.config.lr,
            kind=self.config.lr_scheduler,
        )

    def _log(self, loss: float, lr: float, norm: float, tokens_per_s: float, count: int) -> None:
        state, step = self.state, self.engine.step
        epoch = state.epoch + state.index / self.steps.per_epoch
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "trained_tokens": count,
            "tokens_seen": state.tokens_seen,
            "tokens_per_s": round(tokens_per_s, 1),
            "elapsed_s": round(state.elapsed_s, 3),
        }
        self.run.log(record)
        log = step % self.interval == 0 or step == self.n_steps
        mean = state.interval_nats / state.interval_count
        if log:
            self.progress.event("step", **{**record, "loss": mean, "total_steps": self.n_steps})
            state.interval_nats, state.interval_count = 0.0, 0
        self.progress.step(step, loss=mean, lr=lr, tokens_per_s=tokens_per_s, log=log)

    def _evaluation_is_due(self) -> bool:
        at_border = self.state.index == 0 or self.engine.step == self.n_steps
        return (
            bool(len(self.data.validation))
            and at_border
            and self.state.evaluated_step != self.engine.step
        )

    def _evaluate(self) -> None:
        """Measure the held-out loss; keep the adapter if it is the best so far."""
        state, step = self.state, self.engine.step
        batches = Batches(
            self.data.validation,
            rows=self.plan.n_rows,
            n_tokens=self.plan.n_tokens,
            packing=self.config.packing,
            shuffle=False,
        )
        loss, count = mean_nats(self.engine, batches.epoch(0), self.stop.check)
        state.evaluated_step = step
        self.run.log({"step": step, "val_loss": loss, "val_tokens": count})
        self.progress.event("evaluation", step=step, val_loss=loss)
        self.progress.note(f"step {step}  held-out loss {loss:.4f}")
        if step == 0:
            state.base_val = loss
            return
        if state.best_val is None or loss < state.best_val:
            state.best_val, state.best_step, state.bad_evals = loss, step, 0
            self._write_adapter()
        else:
            state.bad_evals += 1
            if self.config.patience and state.bad_evals >= self.config.patience:
                state.ended = f"no better held-out loss in {state.bad_evals} evaluations"

    def _write_adapter(self) -> None:
        write_adapter(self.run.adapter, self.engine.parameters, self.engine.get, self.meta)

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one or nothing was done yet."""
        step = self.engine.step
        if step in (0, self.saved_step) and self.state.ended is None:
            return
        self.state.metrics_bytes = self.run.metrics_bytes
        checkpoint.save(
            self.run.checkpoints,
            self.engine,
            self.meta,
            {
                "ggft": __version__,
                "circumstances": self.circumstances(),
                "progress": asdict(self.state),
            },
            keep=self.config.keep_checkpoints,
        )
        self.saved_step = step
        if not len(self.data.validation):
            self._write_adapter()

    def _save_interrupted(self) -> None:
        """Save after a signal, then raise Interrupted."""
        self.engine.zero_grad()
        self._save()
        if not self.run.adapter.exists():
            self._write_adapter()
        step = self.engine.step
        self.progress.event("interrupted", step=step, adapter=str(self.run.adapter))
        raise Interrupted(
            f"stopped after step {step} of {self.n_steps}; "
            f"{self.run.adapter} holds what was learned",
            signal_number=self.stop.signal_number or 2,
            hint="continue with the same command and --resume",
        ) from None
