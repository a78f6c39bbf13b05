"""What a user should look at before rows are trained: personal data, keys, contradictions.

Values are never kept or shown, only where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ggft.data.duplicates import normalized
from ggft.data.examples import Example

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Of a row so many characters are looked at; and no pattern looks twice at a run of what it takes
# more than some bound, so that time is linear in any text.
SCANNED = 1 << 20
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?!example\.)[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,63}"
)
_PHONE = re.compile(
    r"(?<![\w.])\+\d{1,3}[ .()/-]*\d(?:[ .()/-]{0,2}\d){6,12}(?!\w)"  # international
    r"|(?<![\w.-])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?![\w-])"  # North American
    r"|(?<![\dA-Za-z_.])1[3-9]\d{9}(?![\dA-Za-z_])"  # Chinese mobile
)
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<!\w)(?:AKIA[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|gh[pousr]_\w{36,}|github_pat_\w{22,}|hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|glpat-[\w-]{20,}|eyJ[\w-]{10,400}\.eyJ[\w-]{10,4000}\.[\w-]{10,})"
)
KINDS = ("e-mail addresses", "phone numbers", "card numbers", "keys and tokens of services")


class Survey:
    """Looks at rows one after the other.

    Args:
        asked: For each row the first row with the same questions; (N,).

    Attributes:
        found: The numbers of the rows that hold something, by what it is.
    """

    def __init__(self, asked: npt.NDArray[np.int64]) -> None:
        import numpy as np

        self.found: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._asked = asked
        self._several = np.bincount(asked, minlength=len(asked))[asked] > 1
        self._answers: dict[int, tuple[int, str]] = {}
        self._contradicting: set[int] = set()

    def look(self, row: int, example: Example) -> None:
        """Take note of a row."""
        for kind in personal_data("\n".join(text[:SCANNED] for text in _texts(example))[:SCANNED]):
            self.found[kind].append(row)
        if not (self._several[row] and example.messages):
            return
        said = normalized(
            " ".join(m["content"] for m in example.messages if m["role"] == "assistant")
        )
        first, answer = self._answers.setdefault(int(self._asked[row]), (row, said))
        if said and answer and said != answer:
            self._contradicting |= {first, row}

    @property
    def contradicting(self) -> list[int]:
        """Rows that ask the same as others and answer otherwise."""
        return sorted(self._contradicting)


def personal_data(text: str) -> Iterator[str]:
    """Yield which kinds of personal data and keys a text seems to hold."""
    if "@" in text and _EMAIL.search(text):
        yield KINDS[0]
    if _PHONE.search(text):
        yield KINDS[1]
    if any(_is_card(match[0]) for match in _CARD.finditer(text)):
        yield KINDS[2]
    if _KEY.search(text):
        yield KINDS[3]


def _texts(example: Example) -> Iterator[str]:
    if example.text is not None:
        yield example.text
    for message in example.messages:
        yield message["content"]
        yield message.get("input", "")
        yield message.get("reasoning", "")
        yield from (str(call["arguments"]) for call in message.get("tool_calls", ()))


def _is_card(text: str) -> bool:
    """Whether digits begin as cards do and pass Luhn's check (ISO/IEC 7812-1)."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return digits[0] in (2, 3, 4, 5, 6) and (sum(digits[::-2]) + sum(doubled)) % 10 == 0
