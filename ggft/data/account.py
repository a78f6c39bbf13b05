"""What became of the rows of some data, as commands tell it and runs record it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ggft.data.advice import Kind


@dataclass
class Account:
    """What became of the rows.

    Attributes:
        n_rows: Rows read, of training and validation files.
        n_kept: Examples kept for training.
        n_held_out: Examples kept for validation.
        n_duplicates: Rows dropped because they equal an earlier one.
        n_near: Rows kept that nearly equal an earlier one.
        n_truncated: Examples kept that were longer than the limit and lose their end.
        n_untrainable: Rows dropped because they have no token to learn.
        n_tokens: Training tokens.
        n_trained: Training tokens that the loss counts.
        val_share: Share of the rows that was to be held out.
        row_kind: What the rows are: facts, a task (or a style), or unclear.
        n_wordings: Rows for each answer, on average.
        unused: Rows that have something in a column that is not used, by its name.
        notes: What was chosen from the data, a sentence each.
        warnings: What a user should look at, a sentence each.
    """

    n_rows: int = 0
    n_kept: int = 0
    n_held_out: int = 0
    n_duplicates: int = 0
    n_near: int = 0
    n_truncated: int = 0
    n_untrainable: int = 0
    n_tokens: int = 0
    n_trained: int = 0
    val_share: float = 0.0
    row_kind: Kind = "task"
    n_wordings: float = 1.0
    unused: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
