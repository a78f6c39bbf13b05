"""Learned, too little, memorised, diverged, worse than chance: from the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggft.data.advice import MIN_SPLIT_ROWS

LEARNED = 0.9  # of the facts that are asked
FORGETTING = 1.1  # times the loss on general text


@dataclass(frozen=True)
class Losses:
    """Mean nats per trained token.

    Attributes:
        train_before: On training rows at the start.
        train_after: On training rows at the end.
        val_before: On held-out rows before training; None without any.
        val_best: Of the adapter that was kept.
        val_last: At the end.
        n_val: Held-out rows.
        smaller_lr: The learning rate to try next, if this run diverged; else None.
        is_kept: Whether the adapter is one from before that, not one that has learned nothing.
        chance: Loss of a guess that knows nothing, ln(vocabulary); None where it is not known.
    """

    train_before: float
    train_after: float
    val_before: float | None = None
    val_best: float | None = None
    val_last: float | None = None
    n_val: int = 0
    smaller_lr: float | None = None
    is_kept: bool = True
    chance: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a run.

    Attributes:
        kind: `learned`, `too little`, `memorised`, `forgetting`, `diverged` or
            `worse than chance`.
        text: The same in a sentence or two, with the numbers.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Tally:
    """How many rows were answered as they say, of how many that were asked."""

    n_as_given: int = 0
    n_trained: int = 0
    n_held_out_as_given: int = 0
    n_held_out: int = 0

    def text(self) -> str:
        """Return the same in words, nothing if none was asked."""
        parts = []
        if self.n_trained:
            parts.append(f"{self.n_as_given} of {self.n_trained} trained rows answered as given")
        if self.n_held_out:
            parts.append(f"{self.n_held_out_as_given} of {self.n_held_out} held-out ones")
        return ", ".join(parts)


def judge(
    losses: Losses,
    *,
    by_answers: bool = False,
    asked: Tally = Tally(),
    general: Sequence[float | None] = (None, None),
) -> Verdict:
    """Say plainly what was learned, from losses, answers, and what became of general text.

    - *forgetting*: the loss on general text rose by a tenth or more.
    - Facts are *learned* when nine of ten rows that are asked are answered as given, else it was
      *too little*. Of everything else, the losses tell.

    Args:
        losses: Of the adapter that was kept.
        by_answers: Whether the rows are facts, of which answers tell and held-out rows nothing.
        asked: What the rows that were asked were answered.
        general: Loss on general text before and after.
    """
    verdict = _judge_losses(losses)
    if verdict.kind in ("diverged", "worse than chance"):
        return verdict
    if by_answers and asked.n_trained:
        verdict = _judge_facts(losses, asked)
    elif said := asked.text():
        verdict = Verdict(verdict.kind, f"{verdict.text} Asked at the end: {said}.")
    before, after = general
    if before is None or after is None:
        return verdict
    change = f"general text {before:.3f} → {after:.3f}"
    if after < FORGETTING * before:
        return Verdict(verdict.kind, f"{verdict.text} Not forgotten: {change}.")
    return Verdict(
        "forgetting",
        f"forgetting: {change}, so the model answers other questions worse than before. Mix in"
        " general rows (--mix auto, or a larger --mix-share), or train less (fewer --epochs, a"
        f" smaller --lr). Otherwise {verdict.text}",
    )


def _judge_facts(x: Losses, asked: Tally) -> Verdict:
    """Judge a run on facts by what its rows were answered."""
    train = f"training loss {x.train_before:.3f} → {x.train_after:.3f}"
    if asked.n_as_given >= LEARNED * asked.n_trained:
        return Verdict("learned", f"learned: {asked.text()}, {train}.")
    return Verdict(
        "too little",
        f"too little: only {asked.text()}, {train}. Train longer (--epochs) or with a higher --lr.",
    )


def _judge_losses(losses: Losses) -> Verdict:
    """Judge by losses alone.

    - *diverged*: the loss rose while training, beyond what differs from step to step.
    - *worse than chance*: the end is above ln(vocabulary), where a guess among all tokens is.
    - *too little*: not even the loss on the training rows fell by a tenth.
    - *memorised*: the training loss fell, the held-out loss by less than a twentieth, or it rose
      again beyond its start; or, without held-out rows, the training answers are nearly certain
      (less than 0.1 nats a token).
    - *learned*: the held-out loss fell, too; or, without held-out rows, the training loss did.
    """
    x = losses
    train = f"training loss {x.train_before:.3f} → {x.train_after:.3f}"
    fell = _drop(x.train_before, x.train_after)
    if x.smaller_lr is not None:
        return _judge_diverged(x, train)
    if x.chance is not None and x.train_after > x.chance:
        return Verdict(
            "worse than chance",
            f"worse than chance: {train}, and a guess among all tokens has {x.chance:.3f}. The base"
            " model is ruined, by its quantization or a tokenizer that is not its own: nothing"
            " learned on it is of use. Train on another file of this model.",
        )
    if x.val_before is None or x.val_best is None:
        return _judge_alone(x, train, fell)
    val = f"held-out loss {x.val_before:.3f} → {x.val_best:.3f} on {x.n_val} rows"
    gained = _drop(x.val_before, x.val_best)
    last = x.val_best if x.val_last is None else x.val_last
    rough = f" With {x.n_val} held-out rows this is a rough estimate."
    rough = rough if x.n_val < MIN_SPLIT_ROWS else ""
    if gained >= 0.05 and last > x.val_before:
        return Verdict(
            "memorised",
            f"memorised: {train}, but {val}, and then it rose to {last:.3f}, above where it began."
            " The adapter that was kept is the one from the turning point: it has the form of the"
            " answers and little of their content. Give more and more varied rows. If repeating"
            f" these rows is the aim, train on all of them with --val-split 0.{rough}",
        )
    if gained >= 0.05:
        text = f"learned: {val}, {train}."
        if last > 1.05 * x.val_best:
            text += (
                f" Later epochs only memorised (held-out loss {last:.3f} at the end); the best"
                " adapter was kept."
            )
        return Verdict("learned", text + rough)
    if fell < 0.1:
        return Verdict(
            "too little",
            f"too little: {train}, {val}. Train longer (--epochs), with a higher --lr, or give"
            " more rows.",
        )
    return Verdict(
        "memorised",
        f"memorised: {train}, but {val}. The adapter repeats its rows and does not carry over to"
        " others: give more and more varied rows, or fewer --epochs. If repeating these rows is the"
        " aim, train on all of them with --val-split 0.",
    )


def _judge_diverged(x: Losses, train: str) -> Verdict:
    """Judge a run whose steps were too large."""
    kept = "the adapter has learned nothing"
    if x.is_kept:
        at = "" if x.val_best is None else f" (held-out loss {x.val_best:.3f})"
        kept = f"the adapter that was kept is from before the loss rose{at}"
    return Verdict(
        "diverged",
        f"diverged: {train}, the steps were too large; {kept}. Train again with"
        f" --lr {x.smaller_lr:g}.",
    )


def _judge_alone(x: Losses, train: str, fell: float) -> Verdict:
    """Judge a run without held-out rows."""
    blind = "nothing was held out, so whether it carries over to other questions is not known"
    if fell < 0.1:
        return Verdict(
            "too little",
            f"too little: {train}. Train longer (--epochs), with a higher --lr, or give more rows.",
        )
    if x.train_after < 0.1:
        return Verdict("memorised", f"memorised: {train}, the answers are known by heart; {blind}.")
    return Verdict("learned", f"learned: {train}; {blind}.")


def smaller_lr(lr: float, usual: float) -> float:
    """Return the rate to try after `lr` diverged: a fifth, at most what is usual for such data."""
    return float(f"{min(lr / 5, usual):.0e}")


def _drop(before: float, after: float) -> float:
    """Return the share of a loss that is gone."""
    return (before - after) / before if before > 0 else 0.0
