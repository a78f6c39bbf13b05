"""The directory of a run: who may write it, what it holds, and its log of metrics.

`adapter.gguf` is the best adapter so far, `initial.gguf` a copy of the one that the run began with,
if it began with one, `checkpoints/` what it continues from, `config.yaml` the settings,
`metrics.jsonl` a line per step and evaluation, `report.html` and `report.json` the outcome.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ggft.data.sources.find import absolute
from ggft.settings.option import to_record, to_yaml
from ggft.settings.training import FinetuneConfig
from ggft.system.errors import InputError, ResourceError
from ggft.system.files import (
    LOCK,
    atomic_output,
    copy_file,
    make_folder,
    remove_empty,
    require_space,
    run_lock,
)
from ggft.training.checkpoint import say_how_to_continue, sweep

ADAPTER = "adapter.gguf"
BEST = "adapter-best-validation.gguf"
INITIAL = "initial.gguf"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
REPORT_HTML = "report.html"
REPORT_JSON = "report.json"
_OURS = (ADAPTER, BEST, INITIAL, CHECKPOINTS, CONFIG, METRICS, REPORT_HTML, REPORT_JSON)
# Left free beside what the run is expected to write.
_SPARE_BYTES = 64 * 2**20


class RunDirectory:
    """A run's files; use `open_run` to get one that is locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / ADAPTER
        self.best = path / BEST
        self.initial = path / INITIAL
        self.checkpoints = path / CHECKPOINTS
        self.config = path / CONFIG
        self.report_html = path / REPORT_HTML
        self.report_json = path / REPORT_JSON
        self._metrics_path = path / METRICS
        self._metrics: Any = None

    def holds_run(self) -> bool:
        """Return whether anything of a run is there."""
        return any((self.path / name).exists() for name in _OURS)

    def was_begun(self) -> bool:
        """Return whether a run has begun here and not come to its end."""
        return self.config.exists() and not self.report_json.exists()

    def can_be_resumed(self) -> bool:
        """Return whether there are checkpoints."""
        return any(self.checkpoints.glob("step-*"))

    def clear(self) -> None:
        """Remove an older run, all but the adapters that it has and began with.

        The new run replaces these by its own.
        """
        for name in _OURS:
            path = self.path / name
            if name in (ADAPTER, INITIAL):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def begin_with(self, adapter: Path | None) -> None:
        """Keep a copy of the adapter that the run begins with, for when it is resumed."""
        if adapter is None:
            self.initial.unlink(missing_ok=True)
        elif adapter.resolve() != self.initial.resolve():
            copy_file(adapter, self.initial)

    def write_text(self, path: Path, text: str) -> None:
        """Write a file whole or not at all."""
        with atomic_output(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def open_metrics(self, keep_bytes: int) -> None:
        """Open the log for appending after its first `keep_bytes`."""
        handle = self._metrics_path.open("ab")
        try:
            if handle.tell() > keep_bytes:
                handle.truncate(keep_bytes)
                handle.seek(0, os.SEEK_END)
        except BaseException:
            handle.close()
            raise
        self._metrics = handle

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to the metrics.

        Raises:
            ResourceError: the disk is full or gone.
        """
        try:
            self._metrics.write(json.dumps(record).encode() + b"\n")
            self._metrics.flush()
        except OSError as error:
            raise ResourceError(
                f"the metrics cannot be written: {error.strerror}", path=self._metrics_path,
                hint="make room and continue with --resume",
            ) from None  # fmt: skip

    @property
    def metrics_bytes(self) -> int:
        """Length of the log so far."""
        return int(self._metrics.tell())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all lines of the log; a torn one is skipped."""
        records = []
        for line in self._metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
        return records

    def write_settings(self, config: FinetuneConfig, model: Path) -> None:
        """Write the settings of the run, with paths that hold from any folder."""
        record = to_record(config)
        record["model"] = os.path.abspath(model)
        record["data"] = [absolute(source) for source in config.data]
        if config.mix not in ("auto", "none"):
            record["mix"] = os.path.abspath(config.mix)
        if config.init_adapter is not None:
            record["init_adapter"] = os.path.abspath(config.init_adapter)
        self.write_text(self.config, to_yaml(record))

    def close(self) -> None:
        """Close the log."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def settings_to_resume(given: Mapping[str, Any]) -> Path | None:
    """Return the settings of the run that is to be resumed, if there is one.

    Args:
        given: The settings that the user gave, by name.
    """
    run = RunDirectory(Path(str(given.get("output", "results"))))
    return run.config if given.get("resume") and run.config.is_file() else None


def check_output(path: Path) -> None:
    """Refuse an output directory that cannot be made or written, before any work is done.

    Raises:
        InputError: it is a file, or its permissions forbid writing.
    """
    place = Path(os.path.abspath(path))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(
            "the output directory cannot be made here", path=path,
            found=f"{place} is not a directory", hint="choose another directory with --output",
        )  # fmt: skip
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            "the output directory cannot be written", path=path,
            found=f"no permission to write in {place}",
            hint="choose another directory with --output",
        )  # fmt: skip


def check_free(run: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuse to start when the disk cannot hold what the run will write.

    One checkpoint more than are kept exists for a moment, and an adapter beside its successor.

    Raises:
        ResourceError: too little space.
    """
    require_space(
        run, checkpoint_bytes * (keep + 2), spare_bytes=_SPARE_BYTES,
        hint="free some space, or use a smaller --rank or --keep-checkpoints 1",
    )  # fmt: skip


@contextlib.contextmanager
def open_run(path: Path, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """Make, lock and give a run directory.

    Raises:
        InputError: it holds a run that is neither to be continued nor replaced.
        ResourceError: another run is using it.
    """
    run = RunDirectory(path)
    made = make_folder(
        path, "the output directory cannot be used", hint="choose another directory with --output"
    )
    try:
        with run_lock(path):
            if run.holds_run() and not resume and not overwrite:
                raise InputError(
                    "the output directory holds a run", path=path,
                    hint="continue it with --resume, replace it with --overwrite, "
                    "or choose another directory with --output",
                )  # fmt: skip
            sweep(run.checkpoints)
            say_how_to_continue(run.checkpoints)
            try:
                yield run
            finally:
                run.close()
                if made and not run.holds_run():
                    # Nothing came of it; leave no empty directory behind.
                    with contextlib.suppress(OSError):
                        (path / LOCK).unlink()
    finally:
        remove_empty(made)
