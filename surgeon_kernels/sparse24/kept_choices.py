"""Choices of :func:`~surgeon_kernels.tune_2_4` on disk, one JSON file for a kind of device and a table of kernels.

Files are in ``$XDG_CACHE_HOME/surgeon-kernels`` (``~/.cache`` where the variable is not set), and may be deleted at any
time. What cannot be read or written is named by one warning a process; choices are measured then.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path


def kept_path(device: str, numbered_by: Sequence[object]) -> Path:
    """The file of a device's name and of all that determines which kernels there are and what their numbers mean."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(folder) if os.path.isabs(folder) else Path("~/.cache")  # a relative one is invalid by XDG
    digest = hashlib.sha256(json.dumps([device, *numbered_by]).encode()).hexdigest()[:16]
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return parent / "surgeon-kernels" / f"linear-2-4-{name}-{digest}.json"


def read_kept(path: Path) -> dict[str, int]:
    """Choices by size; none where there is no file or it cannot be read."""
    try:
        kept = json.loads(path.expanduser().read_bytes())
        if not isinstance(kept, dict) or not all(type(choice) is int for choice in kept.values()):
            raise ValueError("it is no JSON object of whole numbers")
        return kept
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        _warn(f"choices of 2:4 kernels in {path} are ignored, and measured again: {error}")
        return {}


def add_kept(path: Path, choices: Mapping[str, int]) -> None:
    """Write ``choices`` beside those of the file, which is replaced in one step.

    Of two processes that write at once, one may lose what it adds.
    """
    try:
        path = path.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**read_kept(path), **choices}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except (OSError, RuntimeError) as error:
        _warn(f"choices of 2:4 kernels are not kept in {path}: {error}")


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
