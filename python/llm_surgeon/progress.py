"""Progress of a run: what the pruning loop announces, and a terminal view of it."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Receiver of progress; this one ignores it all (``--quiet``, library use)."""

    def shots(self, total: int) -> None:
        """A run of ``total`` shots begins."""

    def shot(self, index: int) -> None:
        """Shot ``index`` (from 1) begins."""

    def phase(self, name: str) -> None:
        """A phase of the shot begins; its :meth:`step` calls follow."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """``done`` of ``total`` steps of the phase are finished; ``what`` names the one under way (a layer)."""


class TerminalProgress(Progress):
    """Two live bars: shots, and the current phase with its layer and the time left. A context manager."""

    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
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

    def phase(self, name: str) -> None:
        if self._phase is not None:
            self._bars.remove_task(self._phase)
        self._phase = self._bars.add_task(name, total=None, what="")

    def step(self, done: int, total: int, what: str = "") -> None:
        if self._phase is not None:
            self._bars.update(self._phase, completed=done, total=total, what=what)
