"""The adapter that a run keeps: known by its hash, and made again where a run has lost it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from ggft.adapters.adapter import Adapter, AdapterMeta, read_adapter, write_adapter
from ggft.engine.engine import Engine
from ggft.setup.initial import put_initial
from ggft.system.files import atomic_output, sha256_of
from ggft.training.checkpoint import Checkpoint, load_step
from ggft.training.run_directory import RunDirectory


@dataclass(frozen=True)
class KeptAdapter:
    """A run's adapter.gguf.

    Attributes:
        run: The run's files.
        engine: Holds the matrices.
        meta: What the adapter says about itself.
        seed: What new matrices begin with.
        has_initial: Whether the run began with an adapter; `run.initial` is its copy.
    """

    run: RunDirectory
    engine: Engine
    meta: AdapterMeta
    seed: int
    has_initial: bool = False

    def start(self, initial: Adapter | None) -> None:
        """Fill the engine for a new run, and replace the older one in its folder.

        Raises:
            InputError: The adapter changes more than the run trains; nothing is replaced.
            ResourceError: The copy of it cannot be written.
        """
        self.begin(initial)
        if initial is not None or not self.has_initial:
            self.run.begin_with(None if initial is None else initial.path)
        self.run.clear()

    def begin(self, initial: Adapter | None = None) -> None:
        """Fill the engine with what the run begins with: `initial`, or what it began with once."""
        self.engine.init_lora(self.seed)
        if initial is None and self.has_initial and self.run.initial.exists():
            initial = read_adapter(self.run.initial)
        if initial is not None:
            put_initial(self.engine, initial)

    def write(self) -> str:
        """Write the engine's matrices, and return the file's SHA-256.

        Raises:
            NumericError: a value is not finite.
            ResourceError: it cannot be written; an older file is untouched.
        """
        write_adapter(self.run.adapter, self.engine.parameters, self.engine.get, self.meta)
        return sha256_of([self.run.adapter])

    def copy_best(self) -> None:
        """Copy the adapter beside itself, as the one of the best held-out loss."""
        with atomic_output(self.run.best) as temporary:
            shutil.copyfile(self.run.adapter, temporary)

    def mend(
        self, last: Checkpoint, step: int, sha256: str | None, warn: Callable[[str], None]
    ) -> None:
        """Make the adapter of a run that has ended again, if it is missing or another one.

        Args:
            last: The run's last checkpoint, which the engine holds.
            step: The step of the adapter that was kept.
            sha256: Its hash; None if it was not written.
            warn: Told when only the last one can be had.
        """
        if step == last.step:
            sha256 = last.adapter_sha256
        if self.run.adapter.exists() and sha256 in (None, sha256_of([self.run.adapter])):
            return
        if step == 0:
            self.begin()
        elif step != last.step:
            saved = load_step(self.run.checkpoints, step)
            if saved is not None:
                with atomic_output(self.run.adapter) as temporary:
                    shutil.copyfile(saved.path / "adapter.gguf", temporary)
                return
            warn(f"the adapter of step {step}, which was kept, is gone; the last one replaces it")
        self.write()
