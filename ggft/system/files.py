"""Files, whole or not there: atomic output, locks, free space, SHA-256, sweeping of leftovers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ggft.system.errors import InputError, ResourceError
from ggft.system.text import format_bytes

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())
_HINT_PEFT = "an adapter becomes GGUF with ggft convert FOLDER NEW.gguf --base MODEL.gguf"


def require_regular_file(path: Path, *, hint: str = "check the path") -> int:
    """Return the size of a regular file in bytes; `hint` is what to do if there is none.

    Raises:
        InputError: It is missing, a folder, a pipe or a device, or cannot be looked at.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError("no such file", path=path, hint=hint) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot open the file: {reason}", path=path) from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        found = kinds.get(stat.S_IFMT(status.st_mode), "something else")
        is_peft = (path / "adapter_config.json").exists()
        raise InputError(
            "not a regular file", path=path, found=found, expected="a file",
            hint=_HINT_PEFT if is_peft else None,
        )  # fmt: skip
    return status.st_size


_REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space: your share of it is used up",
    errno.EFBIG: "files of this size are not allowed here: see ulimit -f, or use another disk",
}
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_NO_FOLDER_FLUSH = (*_NO_FLUSH, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)
# Bytes left free on the disk after a write that was allowed to start.
_SPARE_BYTES = 16 << 20


@contextmanager
def atomic_output(
    path: str | Path, *, expected_bytes: int = 0, inputs: Sequence[Path] = ()
) -> Iterator[Path]:
    """Give a temporary path beside `path`; at the end flush it and let it take the name.

    On any exception the temporary file is removed and an existing output stays as it was. A
    symbolic link is followed: its target is replaced. Leftovers of killed runs are removed.

    Args:
        path: The output file.
        expected_bytes: Size that will be written, to refuse at once when the disk is too full.
        inputs: Files that are read meanwhile; the output must be none of them.

    Raises:
        InputError: The output is a folder, an input, or cannot be created.
        ResourceError: The disk is too full, or writing failed.
    """
    target = Path(os.path.realpath(path))
    _check_output(Path(path), target, inputs)
    if expected_bytes:
        require_space(target, expected_bytes)
    temporary = target.with_name(f".{target.name}.ggft-{os.getpid()}.tmp")
    sweep(target.parent, rf"\.{re.escape(target.name)}\.ggft-(?P<pid>\d+)\.tmp")
    try:
        with temporary.open("xb"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write here: {error.strerror}",
            path=path,
            hint="choose another output or change the folder's permissions",
        ) from None
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)
    except OSError as error:
        raise ResourceError(
            f"writing failed: {error.strerror}",
            path=path,
            hint=_REMEDIES.get(error.errno or 0),
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_new(path: str | Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that exists, unless it may be replaced, and all that `atomic_output` would.

    Called before any work is done. A symbolic link is followed; one that leads nowhere yet is new.

    Raises:
        InputError: It exists, or cannot be an output.
    """
    target = Path(os.path.realpath(path))
    _check_output(Path(path), target, inputs)
    if target.exists() and not force:
        raise InputError(
            "the output exists already", path=path,
            hint="choose another name for it, or replace it with --force",
        )  # fmt: skip


def require_plain_name(path: str | Path) -> None:
    """Refuse an output whose name would command the terminal that lists it.

    Raises:
        InputError: It holds control characters, or half of one.
    """
    name = Path(path).name
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise InputError(
            "the output's name holds control characters", path=ascii(os.fspath(path))[1:-1],
            hint="choose another name",
        )  # fmt: skip


def _check_output(path: Path, target: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is a folder, special, an input, in no folder, or named badly."""
    require_plain_name(path)
    if target.is_dir():
        raise InputError("the output is a folder", path=path, expected="a file name")
    if target.exists() and not target.is_file():
        raise InputError("the output is not a regular file", path=path, expected="a file name")
    if not target.parent.is_dir():
        raise InputError(
            "the output's folder does not exist", path=path, hint=f"mkdir -p {target.parent}"
        )
    for source in inputs:
        if target.exists() and source.exists() and os.path.samefile(target, source):
            raise InputError(
                "the output is the input", path=path, hint="choose another name for the output"
            )


def require_space(
    path: Path,
    n_bytes: int,
    *,
    spare_bytes: int = _SPARE_BYTES,
    hint: str = "free some space or choose an output on another disk",
) -> None:
    """Refuse to start writing `n_bytes` at `path`, which need not exist, where they cannot fit.

    Raises:
        ResourceError: Too little space is free.
    """
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < n_bytes + spare_bytes:
        raise ResourceError(
            "not enough disk space",
            path=path,
            found=f"{format_bytes(free_bytes)} free",
            expected=f"at least {format_bytes(n_bytes + spare_bytes)}",
            hint=hint,
        )


def sweep(folder: Path, leftover: str) -> None:
    """Remove what processes that are gone left in a folder.

    Args:
        folder: Where to look.
        leftover: Pattern of the names of such files and folders; its group `pid` is the process.
    """
    pattern = re.compile(leftover, re.DOTALL)
    with suppress(OSError):
        for path in folder.iterdir():
            match = pattern.fullmatch(path.name)
            if match and not _is_running(int(match["pid"])):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def flush(path: Path) -> None:
    """Have a file or folder on the disk itself, as far as the file system can.

    Shared folders of virtual machines and some network mounts cannot flush folders, and one that
    may not be listed cannot be opened for it; what was written is whole there all the same.
    """
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in (_NO_FOLDER_FLUSH if path.is_dir() else _NO_FLUSH):
            raise
        _log.info("%s cannot be flushed to the disk: %s", path, error.strerror)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            # fsync leaves data in the drive's cache there.
            import fcntl

            with suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, error: str, *, hint: str) -> list[Path]:
    """Make a folder and those around it; return what was made, innermost first.

    Args:
        folder: The folder, which may be there already.
        error: The message if it cannot be made or written.
        hint: What to do then.

    Raises:
        InputError: As `error` says, with the reason.
    """
    require_plain_name(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as failure:
        reason = failure.strerror
    if reason is not None:
        remove_empty(made)
        raise InputError(f"{error}: {reason}", path=folder, hint=hint)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole or not at all.

    Raises:
        InputError, ResourceError: As `atomic_output`.
    """
    with atomic_output(target, expected_bytes=source.stat().st_size, inputs=[source]) as temporary:
        shutil.copyfile(source, temporary)


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


LOCK = ".lock"


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run directory for this process alone; the system frees it however the process ends.

    Raises:
        ResourceError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise ResourceError(
                "another run is using this directory",
                path=folder,
                found=f"process {holder}",
                hint="wait for it or choose another directory with --output",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)
