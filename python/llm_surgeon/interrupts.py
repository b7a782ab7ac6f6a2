"""Work that an interrupt does not stop half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def uninterrupted(action: Callable[[], object]) -> None:
    """Call ``action``, which may be called again, until it came to its end; an interrupt is raised only then.

    What interrupts are: :class:`KeyboardInterrupt`, and the :class:`SystemExit` that the command line makes of signals.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            action()
            break
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def signals_held() -> Iterator[None]:
    """Context manager in which signals that Python functions answer wait; the first is answered on exit.

    For short work in foreign code that calls back, which has no use for what such a function raises. Of threads only
    the main one is ever interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    former = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in former:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
