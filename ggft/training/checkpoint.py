"""Saved training state: a folder per checkpoint, complete and durable before it has its name.

`checkpoints/step-000100/` holds `adapter.gguf` (the LoRA matrices, loadable as it is),
`optimizer.gguf` (AdamW's moments) and `state.json` (position in the data, metrics, what the run was
started with, and the SHA-256 of the other two and of itself). It is written under a temporary name,
flushed, and renamed; older checkpoints go only afterwards. One that is found damaged is set aside
as `step-000100.damaged` and counts no longer. Randomness needs no state of its own: order and
dropout are functions of the seed and the position.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggft.adapters.adapter import AdapterMeta, matrix_source, read_adapter, write_adapter
from ggft.gguf.read import dequantize, read_gguf
from ggft.gguf.write import write_gguf
from ggft.system.errors import InputError, ResourceError
from ggft.system.files import flush, sha256_of
from ggft.system.supervisor import tell

if TYPE_CHECKING:
    from ggft.engine.engine import Engine

FORMAT_VERSION = 1
ADAPTER, OPTIMIZER, STATE = "adapter.gguf", "optimizer.gguf", "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums hold; `state` is what `save` was given."""

    path: Path
    step: int
    state: dict[str, Any]
    adapter_sha256: str

    def restore(self, engine: Engine) -> None:
        """Put matrices, moments and the step into an engine of the same shape."""
        engine.set_all("value", read_adapter(self.path / ADAPTER).arrays())
        moments = read_gguf(self.path / OPTIMIZER).tensors
        for which in ("m", "v"):
            arrays = {
                name.removesuffix(f".{which}"): dequantize(tensor)
                for name, tensor in moments.items()
                if name.endswith(f".{which}")
            }
            engine.set_all(which, arrays)
        engine.step = self.step


def n_bytes(n_parameters: int) -> int:
    """Return about how much a checkpoint takes: matrices and two moments in float32."""
    return 3 * 4 * n_parameters + (1 << 16)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written. Call it under the lock."""
    for path in folder.glob(".step-*"):
        final = folder / path.name[1:].removesuffix(".old")
        if path.name.endswith(".old") and not final.exists():
            # Killed between the two renames of a replacement: the old one is the only one.
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def say_how_to_continue(folder: Path) -> None:
    """Let the parent process say how, should this one be killed."""
    newest = next(iter(_paths(folder)), None)
    if newest is None:
        tell(remedy="there is no checkpoint yet; start again")
    else:
        tell(remedy=f"the last checkpoint is {newest}; continue with --resume")


def save(
    folder: Path,
    engine: Engine,
    meta: AdapterMeta,
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint of the engine and remove all but the newest `keep`.

    Raises:
        ResourceError: it cannot be written; what was there before is untouched.
    """
    final = folder / f"step-{engine.step:06d}"
    temporary = folder / f".step-{engine.step:06d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_adapter(temporary / ADAPTER, engine.parameters, engine.get, meta)
        _write_moments(temporary / OPTIMIZER, engine)
        _write_state(temporary, engine.step, state)
        flush(temporary)
        _replace_folder(temporary, final)
        flush(folder)
    except (OSError, ResourceError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.message if isinstance(error, ResourceError) else error.strerror
        raise ResourceError(
            f"the checkpoint cannot be written: {reason}",
            path=final,
            hint="older checkpoints are intact; make room and continue with --resume",
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in _paths(folder)[keep:]:
        _remove(path)
    say_how_to_continue(folder)
    return final


def _remove(path: Path) -> None:
    """Remove a checkpoint; while that takes its time, it has a name that `sweep` knows."""
    doomed = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _replace_folder(temporary: Path, final: Path) -> None:
    """Rename a folder into place; an older one of the name gives way only then."""
    if not final.exists():
        temporary.rename(final)
        return
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)
    temporary.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _write_moments(path: Path, engine: Engine) -> None:
    sources = [
        matrix_source(f"{name}.{which}", shape, functools.partial(engine.get, name, which))
        for which in ("m", "v")
        for name, shape in engine.parameters.items()
    ]
    write_gguf(path, {"general.type": "ggft.optimizer"}, sources)


def _write_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    body = {
        "format": FORMAT_VERSION,
        "step": step,
        "files": {name: sha256_of([folder / name]) for name in (ADAPTER, OPTIMIZER)},
        "state": dict(state),
    }
    record = {"sha256": _body_sha256(body), **body}
    with (folder / STATE).open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, ensure_ascii=False)
    flush(folder / STATE)


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; None if there is none at all.

    Damaged ones that are newer are named in a warning and set aside, so that they do not count
    among the checkpoints that are kept. Call it under the lock.

    Raises:
        InputError: all are damaged, or the newest was written by a newer ggft.
    """
    problems: dict[Path, str] = {}
    for path in _paths(folder):
        try:
            found = _load(path)
        except _Damaged as damage:
            problems[path] = str(damage)
            continue
        for damaged, problem in problems.items():
            aside = _set_aside(damaged)
            warn(
                f"checkpoint {damaged} is damaged ({problem}), now {aside.name}; falling back to"
                " an older one"
            )
        return found
    if problems:
        raise InputError(
            "no checkpoint is whole",
            path=folder,
            found="; ".join(f"{path.name}: {problem}" for path, problem in problems.items()),
            hint="start again with --overwrite, or choose another directory with --output",
        )
    return None


def load_step(folder: Path, step: int) -> Checkpoint | None:
    """Return the checkpoint of a step if it is there and whole."""
    try:
        return _load(folder / f"step-{step:06d}")
    except _Damaged:
        return None


def _set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is none."""
    aside = path.with_name(path.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except OSError as error:
        raise ResourceError(
            f"a damaged checkpoint cannot be set aside: {error.strerror}",
            path=path,
            hint="remove it, then continue with --resume",
        ) from None
    return aside


class _Damaged(Exception):  # noqa: N818
    """What is wrong with a checkpoint."""


def _load(path: Path) -> Checkpoint:
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"{STATE} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise _Damaged(f"{STATE} is not a checkpoint's state")
    if record["format"] > FORMAT_VERSION:
        raise InputError(
            "the checkpoint was written by a newer ggft",
            path=path,
            found=f"format {record['format']}",
            expected=f"at most {FORMAT_VERSION}",
            hint="update ggft",
        )
    claimed = record.pop("sha256", None)
    if claimed != _body_sha256(record):
        raise _Damaged(f"{STATE} has a wrong checksum")
    for name, expected in record["files"].items():
        try:
            found = sha256_of([path / name])
        except OSError as error:
            raise _Damaged(f"{name} cannot be read: {error.strerror}") from None
        if found != expected:
            raise _Damaged(f"{name} has a wrong checksum")
    return Checkpoint(path, record["step"], record["state"], record["files"][ADAPTER])


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return, for every setting that differs, `name: then → now`.

    A setting that one side does not know, as it is of another version, counts as off.
    """
    return [
        f"{name}: {_short(then.get(name))} → {_short(now.get(name))}"
        for name in sorted({*then, *now})
        if _differs(then.get(name), now.get(name), known=name in then and name in now)
    ]


def _differs(then: Any, now: Any, *, known: bool) -> bool:
    return bool(then != now if known else then or now)


def _short(value: Any) -> str:
    """Return a value as messages show it; of a hash the beginning is enough."""
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return f"{value[:12]}…"
    return repr(value)


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run under other circumstances, naming them.

    Raises:
        InputError: something differs.
    """
    changed = difference(then, now)
    if changed:
        raise InputError(
            "the run cannot be continued, because this changed: " + "; ".join(changed),
            path=path,
            hint="use what it was started with, or start a new run with --overwrite or --output",
        )


def _paths(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    return [folder / name for name in sorted(steps, key=steps.__getitem__, reverse=True)]


def _body_sha256(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
