"""What of llama.cpp's architectures can be trained, measured on tiny models: docs/architectures.md.

`make architectures` proves every architecture on two tiny models, each in a child of its own, and
writes the table; given names, it replaces their lines alone. tests/native/test_every_architecture
holds the table to what the engine does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ggft.system.errors import InputError
from tests.support.architectures import ARCHITECTURES, NOT_CAUSAL, UNTRIED, Tiny
from tests.support.proofs import BARS, Proof, prove

PATH = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
NAMES = tuple(sorted((*ARCHITECTURES, *NOT_CAUSAL, *UNTRIED)))
NOT_TRIED = "not tried: tests/support/architectures.py makes no tiny model of it"
HEAD = """# Architectures

Written by `make architectures`: what of the architectures of the pinned llama.cpp ggft trains,
measured on tiny random models of each. One is as simple as the architecture allows, the other
has grouped heads, three blocks, a window of 8 and YaRN; the worse figure of the two is shown.
Matrices are in F32, adapters of rank 4 stand wherever llama.cpp applies them, those of experts
excepted. Keeping internals instead of recomputing them must not change a bit of the gradient.

| column | what it says | bar |
|---|---|---|
| forward | NMSE of the logits against llama.cpp's, the adapter loaded in both | {forward:.0e} |
| gradient | difference from a float64 reference that runs llama.cpp's graph on complex numbers, relative, root mean square over the adapter's matrices, worst of three directions | {gradient:.0e} |
| slopes | difference from central differences of llama.cpp's own loss with the adapter loaded, relative, worst of four directions | {slopes:.0e} |
| packed | difference of two packed examples' gradient from the sum of each alone, relative | {packed:.0e} |
| saved | difference of llama.cpp's loss with the saved adapter from the engine's, relative | {saved:.0e} |
| fell | loss after twenty steps, of what it was | {fell:g} |

"""  # noqa: E501


@dataclass(frozen=True)
class Line:
    """What is known of an architecture: figures, or why there are none."""

    arch: str
    figures: dict[str, float] | None = None
    reason: str = ""

    def text(self) -> str:
        """Return the line of the table."""
        if self.figures is None:
            return f"| {self.arch} | no | | | | | | {self.reason} |"
        cells = [f"{self.figures[name]:.0e}" for name in BARS if name not in ("kept", "fell")]
        return f"| {self.arch} | yes | {' | '.join(cells)} | {self.figures['fell']:.2f} |"


def in_child(work: Callable[[], str]) -> str:
    """Return what a function says in a child process, which llama.cpp may abort."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, work().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or json.dumps("llama.cpp aborts")


def measure(arch: str, *, hard: bool) -> Proof | str:
    """Return the figures of one tiny model, or why there are none."""

    def work() -> str:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return json.dumps(vars(prove(Tiny(arch, hard=hard), Path(folder))))
            except (InputError, AssertionError) as error:
                return json.dumps(error.message if isinstance(error, InputError) else str(error))

    said = json.loads(in_child(work))
    return said if isinstance(said, str) else Proof(**said)


def line_of(arch: str) -> Line:
    """Measure an architecture."""
    if arch in UNTRIED:
        return Line(arch, reason=NOT_TRIED)
    plain, hard = (measure(arch, hard=hard) for hard in (False, True))
    if isinstance(plain, str):
        return Line(arch, reason=plain)
    proofs = [plain] if isinstance(hard, str) else [plain, hard]
    figures = {name: max(getattr(p, name) for p in proofs) for name in BARS}
    failed = sorted({name for proof in proofs for name in proof.failures()})
    if failed:
        return Line(arch, reason=", ".join(f"{name} is {figures[name]:.0e}" for name in failed))
    return Line(arch, figures)


def read() -> dict[str, str]:
    """Return the lines of the table by architecture."""
    if not PATH.exists():
        return {}
    lines = PATH.read_text(encoding="utf-8").split("\n## ")[-1].splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    return {row.split("|")[1].strip(): row for row in rows}


def write(lines: dict[str, str]) -> None:
    """Write the table."""
    n_trained = sum(row.split("|")[2].strip() == "yes" for row in lines.values())
    text = HEAD.format(**BARS)
    text += f"## {n_trained} of {len(lines)} train\n\n"
    text += "| architecture | trains | forward | gradient | slopes | packed | saved | fell |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    text += "".join(lines[arch] + "\n" for arch in sorted(lines))
    PATH.write_text(text, encoding="utf-8")


def main(names: Iterable[str]) -> None:
    """Measure and write."""
    lines = read()
    for arch in tuple(names) or NAMES:
        lines[arch] = line_of(arch).text()
        sys.stdout.write(lines[arch] + "\n")
        sys.stdout.flush()
        write(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; all without")
    main(parser.parse_args().names)
