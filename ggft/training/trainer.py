"""The training loop of one run: steps, evaluations, checkpoints, and the best adapter kept."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ggft import __version__
from ggft.adapters.adapter import Adapter, AdapterMeta
from ggft.adapters.base import base_record
from ggft.data.advice import suggest
from ggft.data.batches import Batches, Steps
from ggft.engine.engine import Cancelled, Engine, mean_nats
from ggft.engine.memory import Plan
from ggft.settings.option import to_record
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import BaseModel, Data
from ggft.system.errors import Interrupted, NumericError
from ggft.system.machine import peak_rss_bytes
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals
from ggft.training import checkpoint, schedule
from ggft.training.callbacks import Callback, Step
from ggft.training.divergence import Trend, Watch, is_worse
from ggft.training.kept import KeptAdapter
from ggft.training.outcome import Outcome
from ggft.training.run_directory import RunDirectory
from ggft.training.state import State
from ggft.training.verdict import smaller_lr

# Settings that do not change the course of a run: where things lie, what is shown and kept.
_MAY_CHANGE = (
    "model", "data", "memory", "recompute", "save_steps", "keep_checkpoints", "logging_steps",
    "samples", "ask", "mix", "init_adapter",
)  # fmt: skip


@dataclass
class Trainer:
    """The loop of one run."""

    config: SettledConfig
    base: BaseModel
    data: Data
    steps: Steps
    plan: Plan
    run: RunDirectory
    engine: Engine
    progress: Progress
    stop: StopSignals
    tell: Callback
    state: State = field(default_factory=State)
    saved_step: int = -1

    def __post_init__(self) -> None:
        config = self.config
        self.n_steps = schedule.total_steps(self.steps.per_epoch, config.epochs, config.max_steps)
        self.warmup_steps = schedule.choose_warmup(config.warmup_steps, self.n_steps)
        self.interval = schedule.safe_interval(config.logging_steps, self.n_steps)
        self.meta = AdapterMeta(
            architecture=self.base.file.architecture,
            rank=config.rank,
            alpha=self.engine.settings.alpha,
            dropout=config.dropout,
            base_name=self.base.name,
            **base_record(self.base.file),
            **self.base.template.record(),
        )
        began_with_one = config.init_adapter is not None
        self.kept = KeptAdapter(self.run, self.engine, self.meta, config.seed, began_with_one)
        self.chance = math.log(self.base.info.n_vocab)
        self.watch = Watch(self.steps.per_epoch, self.n_steps, self.chance)

    def circumstances(self) -> dict[str, Any]:
        """Return all that must be the same for a run to be continued to the bit."""
        record = to_record(self.config)
        for name in _MAY_CHANGE:
            del record[name]
        record.update(
            model_sha256=self.meta.base_sha256,
            data_sha256=self.data.sha256(),
            rows_sha256=self.data.rows_sha256(),
            template_sha256=self.meta.template_sha256,
            micro_batch=[self.plan.n_rows, self.plan.n_tokens],
            steps=self.n_steps,
        )
        return record

    def begin(self, saved: checkpoint.Checkpoint | None, initial: Adapter | None = None) -> None:
        """Initialize the adapter, from `initial` if that is given, or restore a checkpoint.

        Raises:
            InputError: the checkpoint is of a run under other circumstances.
        """
        self._circumstances = self.circumstances()
        if saved is None:
            self.kept.start(initial)
        else:
            self.state = State(**saved.state["progress"])
            then, now = saved.state["circumstances"], self._circumstances
            if self.state.extend(then, now):
                then = schedule.extended(then, now)
            checkpoint.check_same({"rows_sha256": now["rows_sha256"], **then}, now, saved.path)
            saved.restore(self.engine)
            self.saved_step = saved.step
            self.progress.note(f"resuming after step {saved.step} of {self.n_steps}")
            if self.state.best_val is not None and not self.run.adapter.exists():
                self.progress.warn("the best adapter is gone; the next evaluation counts as best")
                self.state.best_val = None
        self.state.chance = self.chance
        self.run.write_settings(self.config, self.base.file.path)
        self.run.open_metrics(self.state.metrics_bytes)
        for line in self.run.read_metrics():
            if "loss" in line:
                self.watch.add(line["loss"], line["trained_tokens"])
        if saved is not None and self.state.ended:
            self.kept.mend(saved, self.state.best_step, self.state.kept_sha256, self.progress.warn)

    def loop(self) -> None:
        """Train to the end; evaluations and saves that are due come before the next step.

        Raises:
            Interrupted: a signal came; what was done is saved.
            NumericError: NaN or infinity, with the step and the tensor.
        """
        if self.state.ended:
            self.progress.note("the run is finished already")
            return
        self.tell.on_start(self.n_steps, self.engine.step)
        try:
            if self.engine.step == 0:
                self._measure_base()
            while True:
                if self._evaluation_is_due():
                    self._evaluate()
                if self.engine.step >= self.n_steps:
                    self.state.ended = self.state.ended or self._ending()
                if self.state.ended:
                    self._settle()
                if self.state.ended or self.engine.step % self.config.save_steps == 0:
                    self._save()
                if self.state.ended:
                    break
                self.stop.check()
                self._step()
        except (Cancelled, Interrupted):
            self._save_interrupted()
        finally:
            self.tell.on_end()

    def outcome(self) -> Outcome:
        """Return what the report is made of."""
        return Outcome(
            settings=to_record(self.config),
            model=self.base.name,
            plan=self.plan.record(),
            engine=self.engine.info(),
            account=asdict(self.data.account),
            state=asdict(self.state),
            metrics=self.run.read_metrics(),
            peak_bytes=peak_rss_bytes(),
            n_held_out=len(self.data.validation),
            samples=[],
        )

    def _measure_base(self) -> None:
        """Measure what the base makes of the data, and say so if that is worse than chance."""
        state = self.state
        loss = state.start_loss = self._first_rows_loss()
        if self._evaluation_is_due():
            self.progress.note("measuring the held-out loss before training")
            self._evaluate()
        if state.base_val is not None:
            loss = state.base_val
        if loss > self.chance:
            self.progress.warn(
                f"the base predicts this data worse than chance: its loss is {loss:.3f}, that of a"
                f" guess among {self.base.info.n_vocab} tokens {self.chance:.3f}. The file is"
                " ruined, by its quantization or a tokenizer that is not its own: try another file"
                " of this model"
            )

    def _ending(self) -> str:
        """Return what ended the run; it diverged if the first rows are predicted worse now."""
        start = self.state.start_loss
        if start is not None and is_worse(self._first_rows_loss(), start):
            return self._diverged()
        return "all steps done"

    def _diverged(self) -> str:
        """Note that the steps were too large, and return what ends the run."""
        self.state.smaller_lr = self._smaller_lr()
        return "the loss rose"

    def _smaller_lr(self) -> float:
        n_rows, n_trained = len(self.data.train), self.data.account.n_trained
        kind, batch_size = self.data.account.row_kind, self.config.batch_size
        usual = suggest(n_rows, n_trained, kind, batch_size=batch_size).lr
        return smaller_lr(self.config.lr, usual)

    def _first_rows_loss(self) -> float:
        """Return the loss on the first rows of the data, with the matrices as they are now.

        Raises:
            NumericError: NaN or infinity: the matrices are not to be saved.
        """
        batch = next(iter(self.steps.step(0, 0, self.plan.n_rows, self.plan.n_tokens)))
        with self._numeric_errors(self.engine.step):
            return mean_nats(self.engine, [batch])[0]

    @contextlib.contextmanager
    def _numeric_errors(self, step: int) -> Iterator[None]:
        """Add to a NumericError where the run was and how to go on."""
        try:
            yield
        except NumericError as error:
            if self.engine.step == 0:
                hint = (
                    "this is the base's, before any training: try --precision f32, or another file"
                    " of the model"
                )
            else:
                config, folder = (shlex.quote(str(p)) for p in (self.run.config, self.run.path))
                hint = (
                    f"start again with smaller steps: ggft finetune --config {config} -o {folder}"
                    f" --lr {self._smaller_lr():g} --overwrite"
                )
            raise NumericError(
                f"step {step}: {error.message}", found=error.found, hint=hint
            ) from None

    def _step(self) -> None:
        """Do one optimizer step: gradients of its micro-batches, then the update."""
        state, step = self.state, self.engine.step
        started_s = time.monotonic()
        nats, count, tokens = 0.0, 0, 0
        with self._numeric_errors(step + 1):
            for number, batch in enumerate(
                self.steps.step(state.epoch, state.index, self.plan.n_rows, self.plan.n_tokens)
            ):
                seed = self.steps.dropout_seed(step, number) if self.config.dropout else 0
                batch_nats, batch_count = self.engine.forward_backward(batch, seed)
                nats += batch_nats
                count += batch_count
                tokens += int((batch["segments"] >= 0).sum())
            lr = self._lr(step)
            norm = self.engine.optimizer_step(lr, count)
        seconds = time.monotonic() - started_s
        state.index += 1
        if state.index == self.steps.per_epoch:
            state.epoch, state.index = state.epoch + 1, 0
        state.tokens_seen += tokens
        state.elapsed_s += seconds
        state.interval_nats += nats
        state.interval_count += count
        self._log(nats / count, lr, norm, tokens / max(seconds, 1e-9), count)
        trend = self.watch.add(nats / count, count)
        if trend is Trend.DIVERGES:
            state.ended = self._diverged()
        elif trend is Trend.BEST and not len(self.data.validation):
            self._keep()

    def _lr(self, step: int) -> float:
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
        done = Step(
            step=step,
            epoch=round(epoch, 4),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            trained_tokens=count,
            tokens_seen=state.tokens_seen,
            tokens_per_s=round(tokens_per_s, 1),
            elapsed_s=round(state.elapsed_s, 3),
        )
        self.tell.on_step(done)
        if step % self.interval == 0 or step == self.n_steps:
            self.tell.on_report(done, state.interval_nats / state.interval_count)
            state.interval_nats, state.interval_count = 0.0, 0

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
        with self._numeric_errors(step):
            loss, count = mean_nats(self.engine, batches.epoch(0), self.stop.check)
        state.evaluated_step, state.last_val = step, loss
        self.tell.on_evaluation(step, loss, count)
        if step == 0:
            state.base_val = loss
            return
        best = state.best_val
        if best is None and state.smaller_lr:
            best = state.base_val
        if best is None or loss < best:
            state.best_val, state.bad_evals = loss, 0
            self._keep()
        else:
            state.bad_evals += 1
            if self.config.patience and state.bad_evals >= self.config.patience:
                state.ended = f"no better held-out loss in {state.bad_evals} evaluations"

    def _settle(self) -> None:
        """Keep the last adapter where the held-out loss ends higher: no row tells another."""
        state = self.state
        ended_higher = (state.last_val or 0.0) > (state.base_val or math.inf)
        if self.data.account.row_kind == "task" or state.smaller_lr or not ended_higher:
            return
        if state.best_step and state.best_step != self.engine.step:
            self.kept.copy_best()
            state.kept_last = True
            self._keep()

    def _keep(self) -> None:
        """Keep the adapter as it is now."""
        self.state.best_step = self.engine.step
        with self._numeric_errors(self.engine.step):
            self.state.kept_sha256 = self.kept.write()

    def _save(self, *, at_start: bool = False) -> None:
        """Write a checkpoint, unless this step has one; before the first step only `at_start`.

        Without held-out rows the adapter that is kept is the last one, until the loss rises.
        """
        state, step = self.state, self.engine.step
        if (step == self.saved_step and not state.ended) or (step == 0 and not at_start):
            return
        keeps_this = not (len(self.data.validation) or self.watch.is_rising or state.smaller_lr)
        if step and state.evaluated_step != step:
            loss = self._first_rows_loss()
            keeps_this = keeps_this and not is_worse(loss, state.start_loss or loss)
        if keeps_this:
            state.best_step = step
        state.metrics_bytes = self.run.metrics_bytes
        with self._numeric_errors(step):
            saved = checkpoint.save(
                self.run.checkpoints,
                self.engine,
                self.meta,
                {
                    "ggft": __version__,
                    "circumstances": self._circumstances,
                    "progress": asdict(state),
                },
                keep=self.config.keep_checkpoints,
            )
        self.saved_step = step
        self.tell.on_save(step, saved)
        if keeps_this:
            self._keep()
        elif state.ended and not state.best_step:
            self.kept.begin()
            self.kept.write()

    def _save_interrupted(self) -> None:
        """Save after a signal, then raise Interrupted."""
        self.stop.on_stop(None)
        self.engine.zero_grad()
        self._save(at_start=True)
        if not self.state.best_step:
            self._keep()
        step = self.engine.step
        self.progress.event("interrupted", step=step, adapter=str(self.run.adapter))
        learned = "holds what was learned" if step else "has learned nothing yet"
        raise Interrupted(
            f"stopped after step {step} of {self.n_steps}; {self.run.adapter} {learned}",
            signal_number=self.stop.signal_number or 2,
            hint="continue with the same command and --resume",
        ) from None
