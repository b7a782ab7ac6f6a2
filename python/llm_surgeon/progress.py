"""Progress of a run: what the pruning loop announces, and a terminal view of it."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Receiver of progress; this one ignores it all (``--quiet``, library use)."""

    def expect(self, seconds: float) -> None:
        """The run is planned to take so many ``seconds`` from now on."""

    def shots(self, total: int) -> None:
        """A run of ``total`` shots begins."""

    def shot(self, index: int) -> None:
        """Shot ``index`` (from 1) begins."""

    def shots_done(self) -> None:
        """The shots are over: phases that follow belong to none."""

    def phase(self, name: str) -> None:
        """A phase of the shot begins; its :meth:`step` calls follow."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """``done`` of ``total`` steps of the phase are finished; ``what`` names the one under way (a layer)."""


class TerminalProgress(Progress):
    """Two live bars on stderr: shots, and the current phase with its layer and the time left. A context manager."""

    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._shots: TaskID | None = None
        self._phase: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def shots(self, total: int) -> None:
        if self._shots is not None:
            self._bars.remove_task(self._shots)
        self._shots = self._bars.add_task("shot", total=total, what="")

    def shot(self, index: int) -> None:
        if self._shots is not None:
            self._bars.update(self._shots, completed=index - 1)

    def shots_done(self) -> None:
        if self._shots is not None:
            self._bars.remove_task(self._shots)
        self._shots = None

    def phase(self, name: str) -> None:
        if self._phase is not None:
            self._bars.remove_task(self._phase)
        self._phase = self._bars.add_task(name, total=None, what="")

    def step(self, done: int, total: int, what: str = "") -> None:
        if self._phase is not None:
            self._bars.update(self._phase, completed=done, total=total, what=what)


class LineProgress(Progress):
    """A line on stderr for every phase, and for a long one every half minute: for logs, where no bar can move.

    They tell the time left: of the run as it was planned, and of a phase as it goes.
    """

    _INTERVAL = 30.0

    def __init__(self) -> None:
        self._shots, self._shot, self._phase = 0, 0, ""
        self._printed = self._begun = time.monotonic()
        self._end: float | None = None  # of the run, as it was planned

    def expect(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def shots(self, total: int) -> None:
        self._shots, self._shot = total, 0

    def shot(self, index: int) -> None:
        self._shot = index

    def shots_done(self) -> None:
        self._shot = 0

    def phase(self, name: str) -> None:
        self._phase = f"shot {self._shot} of {self._shots}: {name}" if self._shot else name
        self._begun = time.monotonic()
        left = 0.0 if self._end is None else self._end - self._begun
        self._print(f"{self._phase}, about {_clock(left)} left in all" if left > 0.0 else self._phase)

    def step(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        if now - self._printed >= self._INTERVAL:
            left = f", about {_clock((now - self._begun) / done * (total - done))} left" if done else ""
            self._print(" ".join(filter(None, (f"{self._phase}: {done} of {total}{left}", what))))

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        print(f"surgeon: {line}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """``150.2`` -> ``"0:02:30"``."""
    return str(timedelta(seconds=round(seconds)))
