"""A row's columns by their roles, and which of them were used."""

from __future__ import annotations

from typing import Any

from ggft.data.files import Row
from ggft.data.rows.columns import Plan
from ggft.data.rows.values import is_empty, keys_of, wrong


class Fields:
    """A row's columns by their roles, and which of them were used."""

    def __init__(self, row: Row, value: dict[str, Any], plan: Plan) -> None:
        self.row, self.value, self.plan = row, value, plan
        self.used: set[str] = set()

    def has(self, role: str) -> bool:
        """Whether there is such a column, whatever is in it."""
        return role in self.plan.by_role

    def take(self, name: str) -> str:
        """Use a column."""
        self.used.add(name)
        return name

    def filled(self, *roles: str) -> list[str]:
        """Return the columns of some roles that have something in them."""
        names = (name for role in roles for name in self.plan.by_role.get(role, ()))
        return [name for name in names if not is_empty(self.value[name])]

    def any(self, role: str) -> str | None:
        """Use the first column of a role that has something in it."""
        names = self.filled(role)
        return self.take(names[0]) if names else None

    def one(self, role: str) -> str | None:
        """Use the one column of a role that has something in it; two are an error."""
        names = self.filled(role)
        if len(names) > 1:
            raise wrong(
                self.row, f"{names[0]!r} and {names[1]!r} in one row", keys_of(self.value),
                "one of them",
                f"leave one out with --ignore-columns {names[1]}, or say what it is with"
                f" --columns {names[1]}=ROLE",
            )  # fmt: skip
        return self.take(names[0]) if names else None
