"""Clean-up that an interrupt does not stop half-way."""

from __future__ import annotations

from collections.abc import Callable


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
