"""Rows that are tokens already: ids, and which of them are learned."""

from __future__ import annotations

from array import array
from typing import Any

from ggft.data.files import Row
from ggft.data.rows.values import kind_of, list_of, wrong
from ggft.prompts.encoding import Tokens

IGNORED = -100  # a label that the loss leaves out


def tokens_of(row: Row, ids: Any, labels: Any, masks: list[Any], attention: Any) -> Tokens:
    """Return the tokens of a row.

    Args:
        row: Where they stand.
        ids: `input_ids`.
        labels: `labels`: each token's own id, or −100 where it is not learned; or None.
        masks: Lists of 0 and 1; a token is learned where all are 1.
        attention: `attention_mask`: 0 behind the end, where there is padding; or None.
    """
    numbers = _numbers(row, ids, "input_ids", None)
    n = len(numbers)
    trained = bytearray(b"\x01") * n
    if labels is not None:
        for i, label in enumerate(_numbers(row, labels, "labels", n)):
            if label not in (IGNORED, numbers[i]):
                raise wrong(
                    row, "labels are not those of input_ids", f"{label} at {i}",
                    f"{numbers[i]} or {IGNORED}", "give labels that are not shifted",
                )  # fmt: skip
            trained[i] = label != IGNORED
    for mask in masks:
        for i, bit in enumerate(_numbers(row, mask, "a mask", n)):
            if bit not in (0, 1):
                raise wrong(row, "a mask is neither 0 nor 1", str(bit), "0 or 1")
            trained[i] &= bit
    if attention is not None:
        seen = _numbers(row, attention, "attention_mask", n)
        end = next((i for i, bit in enumerate(seen) if bit != 1), n)
        if any(bit != 0 for bit in seen[end:]):
            raise wrong(
                row, "attention_mask has holes", "0 before 1", "1 for tokens, then 0 for padding"
            )
        numbers, trained = numbers[:end], trained[:end]
    try:
        return Tokens(array("i", numbers), bytes(trained))
    except OverflowError:
        raise wrong(row, "input_ids are no token ids", "a large number", "ids") from None


def _numbers(row: Row, value: Any, where: str, n: int | None) -> list[int]:
    """Return a list of whole numbers, `n` of them if it says."""
    numbers = list_of(row, value, where)
    for number in numbers:
        if not isinstance(number, int):
            raise wrong(row, f"{where} is not a list of ids", kind_of(number), "whole numbers")
    if n is not None and len(numbers) != n:
        raise wrong(row, f"{where} is not as long as input_ids", str(len(numbers)), str(n))
    return numbers
