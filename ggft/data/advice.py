"""What a small data set needs: settings from its size, and a verdict from its losses.

Pure functions. The thresholds are rules of thumb for LoRA on a few to many thousand rows; each
stands next to its reason, and every choice comes with the words to print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_SPLIT_ROWS = 20  # below, a held-out row costs more than its loss can tell
MAX_HELD_OUT = 256  # more make the estimate hardly better and evaluation slow
SHORT_ROW = 32
MIX_SHARE = 2 / 7  # of general rows in an epoch of few rows


@dataclass(frozen=True)
class Suggestion:
    """Settings for the ones that the user left open.

    Attributes:
        epochs: Passes over the data.
        batch_size: Examples per optimizer step.
        rank: LoRA rank.
        lr: Peak learning rate.
        dropout: Dropout of the LoRA input.
        mix_share: Share of general rows among an epoch's examples.
        reasons: Why, a line each.
    """

    epochs: int
    batch_size: int
    rank: int
    lr: float
    dropout: float
    mix_share: float
    reasons: tuple[str, ...]


def suggest(n_rows: int, n_trained: int, *, batch_size: int | None = None) -> Suggestion:
    """Return settings for a data set.

    Small sets need more passes, since the number of optimizer steps is what lets an adapter move,
    and a higher learning rate with smaller batches for the same reason. The rank follows from how
    many tokens there are to store; dropout hinders a set that is small enough to be learned by
    heart, which is then what the user wants of it.

    Args:
        n_rows: Training rows.
        n_trained: Tokens in them that the loss counts.
        batch_size: The user's choice, if any; the learning rate follows it.
    """
    tiny, small = n_rows < 200, n_rows < 2_000
    epochs = max(1, min(10, math.ceil(800 / max(n_rows, 1)))) if tiny else 3
    if n_rows > 20_000:
        epochs = 1 if n_rows > 100_000 else 2
    batch = batch_size or (4 if small else 8 if n_rows <= 20_000 else 16)
    rank = 8 if n_trained < 200_000 else 16 if n_trained < 2_000_000 else 32
    lr = 1e-3 if tiny else 5e-4 if small else 3e-4
    if batch > 16:
        lr *= math.sqrt(batch / 16)  # Adam's square-root rule for large batches
    mix_share = MIX_SHARE if tiny else 0.0
    n_mixed = n_general(n_rows, mix_share)
    per_epoch = math.ceil((n_rows + n_mixed) / batch)
    mixed = f" and {n_mixed} general ones against forgetting" if n_mixed else ""
    reasons = (
        f"{n_rows} rows{mixed}: {epochs} epochs of {per_epoch} steps, {per_epoch * epochs} in all",
        f"{n_trained} tokens to learn: rank {rank}",
    )
    return Suggestion(epochs, batch, rank, lr, 0.0 if tiny else 0.05, mix_share, reasons)


def n_general(n_rows: int, share: float) -> int:
    """Return how many general rows an epoch has beside `n_rows` for them to be `share` of all."""
    return round(n_rows * share / (1.0 - share))


def choose_max_length(longest: int, usual: int, n_ctx: int) -> int:
    """Return the length in tokens at which examples are cut.

    No example is cut while the longest needs at most 1,024 tokens; beyond that, at most one in a
    hundred is, since a few very long rows would decide how much memory each step takes.

    Args:
        longest: Tokens of the longest example.
        usual: Tokens that 99 of 100 examples do not exceed.
        n_ctx: The model's context.
    """
    wanted = longest if longest <= 1024 else max(1024, usual)
    return min(n_ctx, math.ceil(max(wanted, 1) / SHORT_ROW) * SHORT_ROW)


def held_out_rows(n_rows: int, share: float | None) -> tuple[int, str]:
    """Return how many rows to hold out for validation, and why.

    Args:
        n_rows: Rows there are.
        share: The user's `--val-split`, None if not given.
    """
    if share == 0:
        return 0, "no validation (--val-split 0)"
    if share is not None:
        n = max(0, min(n_rows - 1, math.ceil(share * n_rows - 1e-9)))
        return n, f"{n} of {n_rows} rows held out (--val-split {share:g})"
    if n_rows < MIN_SPLIT_ROWS:
        return 0, (
            f"no validation: with {n_rows} rows (fewer than {MIN_SPLIT_ROWS}) every one is needed"
            " for training; --val-split 0.1 forces it"
        )
    n = max(2, min(MAX_HELD_OUT, n_rows // 10))
    return n, f"{n} of {n_rows} rows held out for validation (--val-split 0 trains on all)"
