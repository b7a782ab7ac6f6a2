"""The folder that a checkpoint is written to: claimed by one run, and changed in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_surgeon.checkpoint.output_checks import check_place, check_replaceable, is_folder, left_of, output_path
from llm_surgeon.checks import require_bool
from llm_surgeon.errors import InputError
from llm_surgeon.interrupts import uninterrupted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
# How kernels and filesystems say that they cannot: exchange names, lock files, flush folders.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


@dataclass(frozen=True)
class Output:
    """A folder that is claimed for a checkpoint, see :func:`claimed_output`.

    Attributes:
        given: as the user names it, for messages.
        path: absolute, links followed.
        overwrite: a model that lies there may be replaced.
    """

    given: str | Path
    path: Path
    overwrite: bool


@contextlib.contextmanager
def claimed_output(out: str | Path, overwrite: bool, **inputs: str | Path | None) -> Iterator[Output]:
    """Context manager: ``out``, checked first, is nobody else's until the exit.

    The claim is a lock on the file ``.OUT.lock``, which the kernel gives up with the process: whatever another run left
    beside ``out`` is then nobody's. ``.OUT.partial-*`` is deleted; ``.OUT.previous-*``, the model that an interrupted
    run was replacing, becomes ``out`` again where that is missing or empty, and is deleted where it is not; both are
    logged. On a filesystem without locks they are left alone and named; where locks hold for one machine only (some
    mounts of NFS), several machines must not write one ``out`` at once.

    Raises:
        InputError: also where another run is writing ``out``.
    """
    require_bool("overwrite", overwrite)
    target = output_path(out)
    check_place(out, target, inputs)
    made = [parent for parent in target.parents if not os.path.exists(parent)]
    path, lock = target.with_name(f".{target.name}.lock"), None

    def release() -> None:
        nonlocal lock
        if lock is not None:
            if os.fstat(lock).st_size == 0:  # else a file of somebody's that has the name
                path.unlink(missing_ok=True)  # somebody may have removed the whole folder
            held, lock = lock, None
            os.close(held)
        for parent in made:
            with contextlib.suppress(OSError):  # something was written to it
                parent.rmdir()

    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock, locked = _lock(out, path)
            _clean(target, locked)
        except OSError as error:
            raise InputError(f"output {str(out)!r} cannot be written: {error}") from error
        check_replaceable(out, target, overwrite)
        yield Output(out, target, overwrite)
    finally:
        uninterrupted(release)


def partial_folder(target: Path) -> Path:
    """A path beside ``target`` for what will be moved into its place."""
    return _sibling(target, "partial")


def move_into_place(partial: Path, target: Path, out: str | Path, overwrite: bool) -> None:
    """Let the folder ``partial`` become ``target`` in one step, on disk before that; the folder it replaces is deleted.

    Where ``target`` holds something, the two are exchanged (``renameat2``, which Linux has on its own filesystems).
    Elsewhere there is a moment between two renames without a ``target``: the old one is ``.OUT.previous-*`` then, and
    the next :func:`claimed_output` puts it back.

    Raises:
        InputError: ``target`` has meanwhile come to hold what must not be replaced: ``partial`` is beside it.
    """
    for path in (*partial.rglob("*"), partial):
        to_disk(path)
    try:
        check_replaceable(out, target, overwrite)
    except InputError as error:
        kept = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
        os.rename(partial, kept)
        raise InputError(f"{error}; what was to be written there is in {str(kept)!r}") from error
    if not os.path.exists(target) or not any(target.iterdir()):
        if sys.platform == "win32" and target.exists():
            target.rmdir()
        os.rename(partial, target)
        to_disk(target.parent)
        return
    if not _exchange(partial, target):
        previous = _sibling(target, "previous")
        os.rename(target, previous)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(previous, target)
            raise
        os.rename(previous, partial)  # "previous" is always whole
    to_disk(target.parent)
    try:
        shutil.rmtree(partial)
    except OSError as error:
        _logger.warning("%s is written; the model it replaced is still in %s: %s", out, partial, error)


def _lock(out: str | Path, path: Path) -> tuple[int, bool]:
    """An open file that no other process has locked, and whether this one has: some filesystems know no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return descriptor, False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(f"output {str(out)!r} is being written by another run: wait for it or stop it") from error
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor, False
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, True
        os.close(descriptor)  # the file of a run that ended just now: it is not in the folder any more


def _clean(target: Path, locked: bool) -> None:
    """Delete or put back what interrupted runs left beside ``target``."""
    named = left_of(target)
    left = [path for path in sorted(target.parent.iterdir()) if named.fullmatch(path.name) and is_folder(path)]
    if not locked:
        for path in left:
            _logger.warning("%s lies beside %s: delete it unless another run is writing it", path, target)
        return
    former = [path for path in left if named.fullmatch(path.name)[1] == "previous"]  # type: ignore[index]
    if former and not (target.is_dir() and any(target.iterdir())):
        previous = max(former, key=lambda path: path.stat().st_mtime)
        if target.is_dir():
            target.rmdir()
        os.rename(previous, target)
        left.remove(previous)
        _logger.warning("%s is %s again: a run was interrupted that was replacing it", previous, target)
    for path in left:
        shutil.rmtree(path)
        _logger.warning("deleted %s, which an interrupted run left", path)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; ``False`` where the kernel or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: no crash may leave a folder without them."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some filesystems cannot, for folders
            raise
    finally:
        os.close(descriptor)


def _sibling(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")
