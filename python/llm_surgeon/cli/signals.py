"""SIGINT, SIGTERM and SIGHUP end a command as an error does, cleaning up, with one line and their own exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}


def run_answering_signals(command: Callable[[], object]) -> None:
    """Run ``command``; a signal raises in it, and is then the exit code ``128 + signal`` (130, 143, 129).

    Signals that the process was started to ignore (``nohup``) stay ignored, and those of others' handlers theirs.
    """
    received: list[signal.Signals] = []

    def answer(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        # Libraries know KeyboardInterrupt, and typer makes SystemExit of it.
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def send_again(lost: Any) -> None:
        """Python drops what is raised in a finalizer: there it must be raised once more, a moment later."""
        if received and isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
            threading.Timer(0.02, os.kill, (os.getpid(), received[0])).start()
        else:
            hook(lost)

    usual, hook = {signal.SIG_DFL, signal.default_int_handler}, sys.unraisablehook
    own = [number for name in _WORDS if (number := getattr(signal, name, None)) and signal.getsignal(number) in usual]
    former = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in own:
                former[number] = signal.signal(number, answer)
            sys.unraisablehook = send_again
        command()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else None
        if isinstance(error, KeyboardInterrupt) or code == 130:
            received.append(signal.SIGINT)
        if not received or code == 0:  # it was done by the time
            raise
        with contextlib.suppress(OSError):  # a terminal that is gone
            if not getattr(error, "told", False):  # by another rank of a run, of which a launcher ends the others
                print(f"surgeon: {_WORDS[received[0].name]}", file=sys.stderr)
        raise SystemExit(128 + received[0]) from None
    finally:
        sys.unraisablehook = hook
        for number, handler in former.items():
            signal.signal(number, handler)
