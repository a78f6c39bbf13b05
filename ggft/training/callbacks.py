"""What a run tells while it trains: subclass `Callback` and give what you write to `train`.

The progress display and the run's log are callbacks, too, and so are TensorBoard and Weights &
Biases. An exception that a callback raises ends the run; its last checkpoint can be resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggft.engine.memory import Plan
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import Data
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from ggft.training.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step that was done.

    Attributes:
        step: Its number, from 1.
        epoch: Passes over the data so far.
        loss: Mean nats per trained token of the step.
        lr: Learning rate.
        grad_norm: Norm of the gradient before it was clipped.
        trained_tokens: Tokens that the loss counts.
        tokens_seen: Tokens since the start of the run.
        tokens_per_s: Speed of the step.
        elapsed_s: Seconds spent in steps since the start of the run.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    trained_tokens: int
    tokens_seen: int
    tokens_per_s: float
    elapsed_s: float


class Callback:
    """Override what you want to know of; nothing is done here."""

    def on_plan(self, settings: SettledConfig, data: Data, plan: Plan) -> None:
        """All settings are chosen, and how memory is used; nothing has been done yet."""

    def on_start(self, n_steps: int, done: int) -> None:
        """Training begins; `done` of `n_steps` were done before the run was resumed."""

    def on_step(self, step: Step) -> None:
        """An optimizer step was done."""

    def on_report(self, step: Step, mean_loss: float) -> None:
        """As often as `logging_steps` says: the step, and the mean loss since the last report."""

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        """The held-out loss was measured after `step` steps: mean nats of so many tokens."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """A checkpoint was written."""

    def on_end(self) -> None:
        """Training ended, by whatever reason."""


class Callbacks(Callback):
    """Several callbacks, told one after the other."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = members

    def on_plan(self, settings: SettledConfig, data: Data, plan: Plan) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_plan(settings, data, plan)

    def on_start(self, n_steps: int, done: int) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_start(n_steps, done)

    def on_step(self, step: Step) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_step(step)

    def on_report(self, step: Step, mean_loss: float) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_report(step, mean_loss)

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_evaluation(step, val_loss, val_tokens)

    def on_save(self, step: int, checkpoint: Path) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_save(step, checkpoint)

    def on_end(self) -> None:
        """Tell all of them."""
        for member in self._members:
            member.on_end()


class RunLog(Callback):
    """The lines of metrics.jsonl."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def on_step(self, step: Step) -> None:
        """Write a line."""
        self._run.log(asdict(step))

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        """Write a line."""
        self._run.log({"step": step, "val_loss": val_loss, "val_tokens": val_tokens})


class Display(Callback):
    """A bar, lines or JSON events."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._n_steps = self._n_tokens = 0
        self._nats = 0.0

    def on_start(self, n_steps: int, done: int) -> None:
        """Begin to count."""
        self._n_steps = n_steps
        self._progress.start(n_steps, done)

    def on_step(self, step: Step) -> None:
        """Move the bar, which shows the mean loss since the last report."""
        self._nats += step.loss * step.trained_tokens
        self._n_tokens += step.trained_tokens
        self._show(step, self._nats / self._n_tokens, log=False)

    def on_report(self, step: Step, mean_loss: float) -> None:
        """Print a line or an event."""
        self._nats, self._n_tokens = 0.0, 0
        record = {**asdict(step), "loss": mean_loss, "total_steps": self._n_steps}
        self._progress.event("step", **record)
        self._show(step, mean_loss, log=True)

    def _show(self, step: Step, loss: float, *, log: bool) -> None:
        self._progress.step(
            step.step, loss=loss, lr=step.lr, tokens_per_s=step.tokens_per_s, log=log
        )

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        """Print a line."""
        self._progress.event("evaluation", step=step, val_loss=val_loss)
        self._progress.note(f"step {step}  held-out loss {val_loss:.4f}")

    def on_end(self) -> None:
        """Close the bar."""
        self._progress.stop()


class TensorBoard(Callback):
    """Curves for TensorBoard, in a folder.

    Raises:
        InputError: The extra is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("TensorBoard", "tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder))

    def on_step(self, step: Step) -> None:
        """Add a point to each curve."""
        for name in ("loss", "lr", "grad_norm", "tokens_per_s"):
            self._writer.add_scalar(f"train/{name}", getattr(step, name), step.step)

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        """Add a point."""
        self._writer.add_scalar("held-out/loss", val_loss, step)

    def on_end(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class WandB(Callback):
    """A run of Weights & Biases; `init` is what wandb.init takes, such as `project`.

    Raises:
        InputError: The extra is not installed.
    """

    def __init__(self, **init: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("Weights & Biases", "wandb") from None
        self._run: Any = wandb.init(**init)

    def on_step(self, step: Step) -> None:
        """Log the step."""
        record = asdict(step)
        self._run.log({f"train/{name}": value for name, value in record.items()}, step=step.step)

    def on_evaluation(self, step: int, val_loss: float, val_tokens: int) -> None:
        """Log the loss."""
        self._run.log({"held-out/loss": val_loss}, step=step)

    def on_end(self) -> None:
        """End the run there, too."""
        self._run.finish()


def _missing(title: str, extra: str) -> InputError:
    return InputError(f"{title} is not installed", hint=f"pip install 'ggft[{extra}]'")
