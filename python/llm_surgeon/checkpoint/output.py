"""The folder that a checkpoint is written to: what is refused, who writes it, and how it changes in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from llm_surgeon.checks import require_bool
from llm_surgeon.errors import InputError
from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.resources import nearest_existing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

# What transformers and this package put into a model folder, LICENSE and .gitattributes of a published one included.
_OWN_FILES = re.compile(
    r"""
    .+\.safetensors(\.index\.json)?
    | (config|generation_config)\.json
    | (tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken|normalizer)\.json
    | (preprocessor|processor|image_processor|video_preprocessor|feature_extractor|audio_tokenizer)(_config)?\.json
    | (vocab|merges|special_tokens)\.txt | .+\.tiktoken
    | (tokenizer|spiece|spm|sentencepiece|sentencepiece\.bpe)\.model(\.v\d+)?
    | chat_template\.jinja
    | (README|USE_POLICY)\.md | (LICENSE|LICENCE|NOTICE)(\.\w+)? | \.gitattributes
    | surgeon_\w+\.json | report\.html | modeling_pruned\.py
    """,
    re.VERBOSE,
)
_OWN_FOLDERS = {"additional_chat_templates": re.compile(r".+\.jinja")}
# One of these says that a folder with a config.json is a model, and not some other project's.
_MARKS = re.compile(r".+\.safetensors|surgeon_report\.json")
_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")

# The longest name beside OUT is ".OUT.previous-xxxxxxxx", the longest inside a sharded weight's.
_LONGEST_NAME_BESIDE, _LONGEST_NAME_INSIDE = len(".") + len(".previous-") + 8, 64

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


def output_path(out: str | Path) -> Path:
    """The absolute path that ``out`` means: ``~`` expanded, links followed; :class:`InputError` where it means none."""
    text = os.fspath(out)
    try:
        named = Path(os.path.abspath(os.path.expanduser(text)))
        path = Path(os.path.realpath(named))
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"output {text!r} cannot be written: its path is not valid UTF-8") from error
    except (OSError, ValueError) as error:  # no current folder; a null character
        raise InputError(f"output {text!r} cannot be written: {error}") from error
    for candidate in (named, *named.parents):
        if os.path.islink(candidate) and not os.path.exists(candidate):
            raise InputError(f"output {text!r} cannot be written: {str(candidate)!r} is a link that leads nowhere")
    return path


def check_output(out: str | Path, overwrite: bool, **inputs: str | Path | None) -> None:
    """Raise :class:`InputError` where a checkpoint cannot or must not be written to ``out``.

    ``out`` must not be one of the ``inputs``, inside it or around it, nor a file, a mount point or the current folder;
    its name and its parent must allow it to be written; and with ``overwrite`` it may hold another model and nothing
    else: files that neither transformers nor this package writes are never deleted.

    Args:
        inputs: what is read, by what it is (``model``, ``teacher``, ``config_file`` …); no path, no matter.
    """
    require_bool("overwrite", overwrite)
    target = output_path(out)
    _check_place(out, target, inputs)
    _check_replaceable(out, target, overwrite)


@contextlib.contextmanager
def claimed_output(out: str | Path, overwrite: bool, **inputs: str | Path | None) -> Iterator[Output]:
    """Context manager: ``out``, checked as by :func:`check_output`, is nobody else's until the exit.

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
    _check_place(out, target, inputs)
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
        _check_replaceable(out, target, overwrite)
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
        _to_disk(path)
    try:
        _check_replaceable(out, target, overwrite)
    except InputError as error:
        kept = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
        os.rename(partial, kept)
        raise InputError(f"{error}; what was to be written there is in {str(kept)!r}") from error
    if not os.path.exists(target) or not any(target.iterdir()):
        if sys.platform == "win32" and target.exists():
            target.rmdir()
        os.rename(partial, target)
        _to_disk(target.parent)
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
    _to_disk(target.parent)
    try:
        shutil.rmtree(partial)
    except OSError as error:
        _logger.warning("%s is written; the model it replaced is still in %s: %s", out, partial, error)


def _check_apart(out: str | Path, target: Path, kind: str, given: str) -> None:
    """Raise :class:`InputError` where ``target`` is an input, inside it or around it, a link in its folder followed."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{kind} {given!r} cannot be used: its path is not valid UTF-8") from error
    try:
        path = Path(os.path.expanduser(given))
        if not os.path.exists(path):
            return
        origin = Path(os.path.realpath(path))
        inside = [Path(os.path.realpath(entry)) for entry in (path.iterdir() if path.is_dir() else ())]
    except (OSError, ValueError):  # whoever reads it will say so
        return
    ours = _left_of(target)
    for place in (origin, *origin.parents):
        if place.parent == target.parent and ours.fullmatch(place.name):
            raise InputError(f"the {kind} {given!r} is what an interrupted run left of {str(out)!r}: rename it first")
    if target == origin or origin in target.parents or any(target in place.parents for place in (origin, *inside)):
        raise InputError(f"output {str(out)!r} overlaps the {kind} {given!r}: choose another folder")


def _check_place(out: str | Path, target: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse what :func:`check_output` does whatever ``target`` holds."""
    for kind, given in inputs.items():
        if given is not None:
            _check_apart(out, target, kind.replace("_", " "), os.fspath(given))
    if os.path.exists(target) and not os.path.isdir(target):
        raise InputError(f"output {str(out)!r} is a file: choose a folder")
    if os.path.ismount(target):
        raise InputError(f"output {str(out)!r} is a mount point: choose a folder inside it")
    with contextlib.suppress(FileNotFoundError):  # a current folder that was deleted
        current = Path.cwd()
        if target == current or target in current.parents:
            raise InputError(f"output {str(out)!r} is or holds the current folder: choose another one")
    parent = nearest_existing(target.parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r} cannot be written: {str(parent)!r} is not a writable folder")
    if os.path.isdir(target) and not os.access(target, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r} cannot be replaced: it is not a writable folder")
    if not hasattr(os, "pathconf"):
        return
    names = [len(os.fsencode(name)) for name in target.relative_to(parent).parts]
    names[-1] += _LONGEST_NAME_BESIDE
    too_long = max(names) > os.pathconf(parent, "PC_NAME_MAX")
    length = len(os.fsencode(target)) + _LONGEST_NAME_BESIDE + _LONGEST_NAME_INSIDE
    if too_long or length > os.pathconf(parent, "PC_PATH_MAX"):
        raise InputError(f"output {str(out)!r} cannot be written: its name is too long")


def _check_replaceable(out: str | Path, target: Path, overwrite: bool) -> None:
    """Raise :class:`InputError` unless ``target`` is missing, empty or, with ``overwrite``, a model and no more."""
    try:
        names = sorted(os.listdir(target)) if os.path.isdir(target) else []
    except OSError as error:
        raise InputError(f"output {str(out)!r} cannot be read: {error}") from error
    if not names:
        return
    if not overwrite:
        raise InputError(f"output {str(out)!r} is not empty: choose another folder or pass --overwrite")
    if not (target / "config.json").is_file() or not any(map(_MARKS.fullmatch, names)):
        raise InputError(f"output {str(out)!r} holds something other than a model: choose another folder")
    foreign = _foreign(target, names)
    if foreign:
        named = ", ".join(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(
            f"output {str(out)!r} holds what is no part of a model and would be deleted: {named}; choose another folder"
        )


def _foreign(folder: Path, names: list[str]) -> list[str]:
    """Names in a model folder that neither transformers nor this package puts there."""
    code = _code_of(folder)
    foreign = []
    for name in names:
        path = folder / name
        if _is_folder(path):
            own = _OWN_FOLDERS.get(name)
            if own is None:
                foreign.append(name)
            else:
                foreign += [
                    f"{name}/{p.name}" for p in sorted(path.iterdir()) if p.is_dir() or not own.fullmatch(p.name)
                ]
        elif not _OWN_FILES.fullmatch(name) and name not in code:
            foreign.append(name)
    return foreign


def _code_of(folder: Path) -> set[str]:
    """Names of the model code in a folder: what its configurations name by ``auto_map``, and what that imports."""
    files: set[Path] = set()
    for name in _CODE:
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8"))["auto_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # names no code
            continue
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in value if isinstance(value, list) else [value]:
                path = folder / f"{str(reference).split('.')[0]}.py"
                if path.is_file() and path.parent == folder:
                    files.add(path)
                    with contextlib.suppress(OSError, ValueError):  # what it imports is not there, or it is no text
                        files.update(map(Path, get_relative_import_files(str(path))))
    return {path.name for path in files if path.parent == folder}


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
    named = _left_of(target)
    left = [path for path in sorted(target.parent.iterdir()) if named.fullmatch(path.name) and _is_folder(path)]
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


def _left_of(target: Path) -> re.Pattern[str]:
    """The names that :func:`_sibling` makes, and their purposes."""
    return re.compile(rf"\.{re.escape(target.name)}\.(partial|previous)-[0-9a-f]{{8}}")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


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


def _to_disk(path: Path) -> None:
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
