"""The receipt of a merge: what share of the fine-tune survived, per tensor and in the loss.

For a delta D, the old weights W0 (dequantized) and the new ones W1, *kept* is the share of D that
is in W1 − W0, ⟨W1 − W0, D⟩ / ⟨D, D⟩: 0 when nothing of it is left, 1 when all of it is; codes that
barely resolve it can also exaggerate it. *noise* is what else changed, ‖W1 − W0 − D‖ / ‖W0‖.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ggft.system.text import format_bytes


@dataclass
class TensorReceipt:
    """What became of one changed tensor; shares as in the module's description.

    Attributes:
        kept_before: Share that the base's type would have kept, on sample rows.
        delta: ‖D‖ / ‖W0‖.
    """

    name: str
    base_type: str
    type: str
    kept_before: float
    kept: float = 0.0
    noise: float = 0.0
    delta: float = 0.0

    @property
    def promoted(self) -> bool:
        """Whether the tensor got another type."""
        return self.type != self.base_type


@dataclass(frozen=True)
class Losses:
    """Mean loss on held-out rows, nats per token: of the base, with the adapter, merged."""

    base: float
    tuned: float
    merged: float

    @property
    def survived(self) -> float | None:
        """Return the share of the fine-tune's gain that the merged file has; None without gain."""
        gain = self.base - self.tuned
        return (self.base - self.merged) / gain if gain > 0 else None


@dataclass
class MergeReport:
    """What `merge` did."""

    output: Path
    n_bytes: int
    base_bytes: int
    tensors: list[TensorReceipt] = field(default_factory=list)
    losses: Losses | None = None

    @property
    def kept(self) -> float:
        """Return the kept share over all tensors, each weighted by its relative delta, squared."""
        weights = [t.delta**2 for t in self.tensors]
        total = sum(weights)
        if not total:
            return 1.0
        return sum(w * t.kept for w, t in zip(weights, self.tensors, strict=True)) / total


def to_json(report: MergeReport) -> str:
    """Return the receipt for programs."""
    record = {
        "output": str(report.output),
        "n_bytes": report.n_bytes,
        "base_bytes": report.base_bytes,
        "kept": report.kept,
        "losses": None if report.losses is None else asdict(report.losses),
        "tensors": [asdict(tensor) for tensor in report.tensors],
    }
    return json.dumps(record, indent=2)


def render(report: MergeReport) -> str:
    """Return the receipt as lines for a terminal: by kind of tensor, and the worst one."""
    lines = [f"{'':12} {'tensors':>7}  {'type':18} {'delta':>7} {'kept':>6} {'noise':>7}"]
    groups: dict[tuple[str, str, str], list[TensorReceipt]] = {}
    for receipt in report.tensors:
        short = receipt.name.removesuffix(".weight").split(".")[-1]
        groups.setdefault((short, receipt.base_type, receipt.type), []).append(receipt)
    for (short, base_type, new_type), members in groups.items():
        kind = base_type if base_type == new_type else f"{base_type} → {new_type}"
        delta, kept, noise = (
            sum(getattr(m, what) for m in members) / len(members)
            for what in ("delta", "kept", "noise")
        )
        lines.append(
            f"{short:12} {len(members):7}  {kind:18} {delta:7.2%} {kept:6.0%} {noise:7.2%}"
        )
    promoted = [t for t in report.tensors if t.promoted]
    if promoted:
        before = sum(t.kept_before for t in promoted) / len(promoted)
        lines.append(
            f"{len(promoted)} of {len(report.tensors)} tensors got another type: their own would "
            f"have kept {before:.0%} of the delta"
        )
    worst = min(report.tensors, key=lambda t: t.kept)
    lines.append(f"kept over all: {report.kept:.0%}; least: {worst.kept:.0%} of {worst.name}")
    if report.losses is not None:
        losses, share = report.losses, report.losses.survived
        gained = "the adapter gains nothing here" if share is None else f"{share:.0%} of the gain"
        lines.append(
            f"held-out loss: base {losses.base:.4f}, with adapter {losses.tuned:.4f}, "
            f"merged {losses.merged:.4f}: {gained}"
        )
    lines.append(
        f"wrote {report.output}, {format_bytes(report.n_bytes)} "
        f"(the base has {format_bytes(report.base_bytes)})"
    )
    return "\n".join(lines)
