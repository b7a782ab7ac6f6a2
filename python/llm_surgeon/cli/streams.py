"""Standard streams that are closed, full, gone or of few letters end no run: what was worked out matters more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Let the block write to ``sys.stdout`` and ``sys.stderr`` whatever they are.

    Closed ones become the null device: else the next file that is opened, a model perhaps, would get their number, and
    whatever libraries print. What cannot be written to stderr, a log on a full disk or a terminal that is gone, is
    dropped. Letters that the encoding of stdout lacks are printed as their escapes, as they are on stderr.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    former = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = former[0] or nowhere
        sys.stderr = _Dropping(former[1] or nowhere)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = former


class _Dropping:
    """The text stream ``stream``, without what cannot be written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
