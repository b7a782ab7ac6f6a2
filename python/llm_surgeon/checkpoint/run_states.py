"""States that a run leaves, so that another one goes on from the last of them: written while the run goes on."""

from __future__ import annotations

import copy
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_surgeon.checkpoint.begun import own_paths, read_note, require_same, write_note, write_text
from llm_surgeon.checkpoint.states import Abandoned, State, find_states, read_state, write_state
from llm_surgeon.errors import InputError, first_line
from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.offload import copies_in_main_memory

_logger = logging.getLogger(__name__)

REPORT = "report.json"
_KEPT = 2  # states after shots: the newer one may turn out to be damaged
_NAME = re.compile(r"shot-(\d+)(?:-block-(\d+))?")
_OWN = re.compile(r"(run|report)\.json(\.partial)?|shot-\d+(-block-\d+)?\.(partial|[0-9a-f]{64}\.safetensors)")


class RunStates:
    """Keeper of a run's states: one after every shot, and of a shot under way one of every block that is updated.

    Blocks go by their depth; where a last fit goes through them again, they are counted on.

    This one keeps none.

    Attributes:
        keeps: states that are put are kept: others need not be made.
        nbytes: what lies on disk.
    """

    keeps = False

    def __init__(self) -> None:
        self._layout: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        return 0

    def claim(
        self, run: dict[str, Any], content: Callable[[], dict[str, str | None]], layout: dict[str, Any]
    ) -> dict[str, Any]:
        """Note what the run is begun with, or make sure that it is what an interrupted one was begun with.

        Args:
            run: options by name.
            content: fingerprints of what is read, see :func:`~llm_surgeon.checkpoint.begun.contents`; called in another
                thread, while nothing of it may be written to, until :meth:`settle`.
            layout: what the bits of the result depend on besides.

        Returns:
            The layout to go on with: ``layout``, or that of the interrupted run, in the same process or before.

        Raises:
            InputError: options or content differ; the first that does is named.
        """
        self._layout = layout | self._layout
        return self._layout

    def note_layout(self, layout: dict[str, Any]) -> None:
        """Note that the layout became another one."""
        self._layout = layout

    def last_shot(self) -> State | None:
        """The state after the last whole shot of an interrupted run; ``None``: there is none."""
        return None

    def block(self, depth: int) -> State | None:
        """A block's state in the shot after that, of as many blocks as were updated in it; ``None``: not updated."""
        return None

    def put_shot(self, index: int, state: State) -> None:
        """Keep the state after shot ``index``; its tensors must not change until :meth:`settle`."""

    def put_block(self, depth: int, state: State) -> None:
        """Keep what the shot under way has made of a block; its tensors must not be written to until :meth:`settle`."""

    def put_report(self, report: str) -> None:
        """Keep the report of a run of which only the model is still to be written, as JSON."""

    def settle(self) -> None:
        """Wait until what was put may be written to."""

    def close(self) -> None:
        """Wait for what is being written."""

    def remove(self) -> None:
        """The run is done: nothing of it need be kept."""


class FolderStates(RunStates):
    """Keeps the states in a folder, to which nobody else writes.

    Copies are made, and written, by other threads. Where a state cannot be written, a line says so, and the run goes on
    without. Of the states after shots the two newest stay.
    """

    keeps = True

    def __init__(self, folder: Path, resume: bool) -> None:
        """Look at what an interrupted run left in ``folder``, and forget it where that is no whole state.

        Raises:
            InputError: see :func:`states_left`.
        """
        super().__init__()
        self.folder, self._shot = folder, 0
        self._left = states_left(folder, resume)
        if not self._left:
            clear_states(folder)
        self._begun: tuple[dict[str, Any], dict[str, str | None]] | None = None
        self._copying, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._copied: list[Future[None]] = []
        # Set where states that are not written yet need not be: any more, those of the blocks of a shot that is done.
        self._all_done, self._shot_done = threading.Event(), threading.Event()
        self._failed = False

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*"))

    @property
    def kept(self) -> bool:
        """True where there is something to go on from."""
        return bool(find_states(self.folder))

    def claim(
        self, run: dict[str, Any], content: Callable[[], dict[str, str | None]], layout: dict[str, Any]
    ) -> dict[str, Any]:
        self._drain()
        noted, self._shot, self._left = read_note(self.folder), 0, find_states(self.folder)
        if noted is None:
            layout = layout | self._layout
            self._tried(lambda: self.folder.mkdir(parents=True, exist_ok=True))

            def note() -> None:
                self._begun = run, content()
                write_note(self.folder, *self._begun, layout=layout)

            if not self._failed:
                self._copied.append(self._copying.submit(partial(self._tried, note)))
            return layout
        self._begun = run, content()
        require_same(self.folder, noted, *self._begun, "run")
        return layout | noted["layout"] | self._layout  # which could not be noted, it may be

    def note_layout(self, layout: dict[str, Any]) -> None:
        self.settle()
        self._layout = layout
        if not self._failed:
            assert self._begun is not None
            self._tried(partial(write_note, self.folder, *self._begun, layout=layout))

    def last_shot(self) -> State | None:
        found = None
        for index in sorted({shot for shot, block in map(_numbers, self._left) if block is None}, reverse=True):
            found = self._read(f"shot-{index}")
            if found is not None:
                self._shot = index
                break
        self._forget(lambda shot, block: block is not None and shot != self._shot + 1)
        return found

    def block(self, depth: int) -> State | None:
        state = self._read(f"shot-{self._shot + 1}-block-{depth}")
        if state is None:  # what comes after it was made of what it was
            self._forget(lambda shot, block: block is not None and block > depth)
        return state

    def put_shot(self, index: int, state: State) -> None:
        self._shot, self._left = index, {}
        self._shot_done.set()
        self._drain()  # no second state of a shot in memory
        self._shot_done = threading.Event()
        self._put(f"shot-{index}", state, self._all_done, lambda: self._tidy(index))

    def put_block(self, depth: int, state: State) -> None:
        self._put(f"shot-{self._shot + 1}-block-{depth}", state, self._shot_done)

    def put_report(self, report: str) -> None:
        self._tried(partial(write_text, self.folder / REPORT, report))

    def settle(self) -> None:
        while self._copied:
            wait(self._copied[:1])
            self._copied.pop(0).result()

    def close(self) -> None:
        uninterrupted(self._close)

    def remove(self) -> None:
        self._all_done.set()
        self._shot_done.set()
        self.close()
        uninterrupted(partial(clear_states, self.folder))

    def _close(self) -> None:
        self._copying.shutdown()
        self._writing.shutdown()
        if not self.kept:  # nothing to go on from
            with suppress(OSError):
                clear_states(self.folder)

    def _read(self, name: str) -> State | None:
        for path in self._left.get(name, []):
            state = read_state(path)
            if state is not None:
                return state
            _logger.warning("the state %r is damaged and not gone on from", str(path))
            path.unlink(missing_ok=True)
        return None

    def _forget(self, outdated: Callable[[int, int | None], bool]) -> None:
        """Delete states that were left, told by the numbers of their shot and block."""
        for name in [name for name in self._left if outdated(*_numbers(name))]:
            _delete(self._left.pop(name))

    def _drain(self) -> None:
        """Wait until all that was put is written."""
        self.settle()
        self._writing.submit(lambda: None).result()

    def _put(
        self, name: str, state: State, abandoned: threading.Event, then: Callable[[], object] = lambda: None
    ) -> None:
        if self._failed:
            return
        note = copy.deepcopy(state.note)
        # What lies in main memory may be on its way there still.
        event = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None

        def copy_tensors() -> None:
            try:
                if event is not None:
                    event.synchronize()
                copied = State(_copies(state.tensors), note)
            except Exception as error:
                self._give_up(error)
            else:
                self._writing.submit(self._write, name, copied, abandoned, then)

        self._copied.append(self._copying.submit(copy_tensors))

    def _write(self, name: str, state: State, abandoned: threading.Event, then: Callable[[], object]) -> None:
        def write() -> None:
            with suppress(Abandoned):
                write_state(self.folder, name, state, abandoned)
                then()

        self._tried(write)

    def _tried(self, action: Callable[[], object]) -> None:
        """Carry out what writes, and give up keeping where that fails."""
        try:
            action()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Neither a full disk nor too little memory for a copy ends a run of hours."""
        if not self._failed:
            _logger.warning("the run goes on without being kept: %r: %s", str(self.folder), first_line(error))
        self._failed = True

    def _tidy(self, index: int) -> None:
        """Delete what nobody will go on from, once the state after shot ``index`` is written."""
        for name, paths in find_states(self.folder).items():
            shot, block = _numbers(name)
            if shot <= index - (_KEPT if block is None else 0):
                _delete(paths)


def states_left(folder: Path, resume: bool) -> dict[str, list[Path]]:
    """The states in ``folder`` of an interrupted run, by their names, as they are found.

    Raises:
        InputError: there is a state and no wish to ``resume``, or something that is no part of a run, or ``folder`` is
            none that can be written to.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)):
        raise InputError(f"{str(folder)!r} is to hold states of the run and is no writable folder: delete or rename it")
    foreign = sorted(path.name for path in own_paths(folder) if not _OWN.fullmatch(path.name))
    if foreign:
        raise InputError(f"{str(folder)!r} holds {foreign[0]!r}, which is no part of an interrupted run")
    left = find_states(folder)
    if left and not resume:
        raise InputError(f"{str(folder)!r} holds an interrupted run: pass --resume to go on with it, or delete it")
    return left


def clear_states(folder: Path) -> None:
    """Delete the states of a run that is done; a kill meanwhile leaves what says so until the last.

    Names that begin with a dot are somebody else's: they stay, and the folder with them.
    """
    for path in sorted(own_paths(folder), key=lambda path: (path.name == REPORT, path.suffix == ".json")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _numbers(name: str) -> tuple[int, int | None]:
    """Numbers of the shot, and of the block where it is a block's, of a state by its name."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), None if match[2] is None else int(match[2])


def _delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


@contextmanager
def kept_states(checkpoint: str | Path | RunStates | None, resume: bool) -> Iterator[RunStates]:
    """Context manager of the states of a run: in the folder ``checkpoint``, which goes once all is done, or nowhere.

    Those of somebody else are left to them. On exit nothing is copied any more.
    """
    if isinstance(checkpoint, RunStates):
        try:
            yield checkpoint
        finally:
            uninterrupted(checkpoint.settle)
        return
    states = RunStates() if checkpoint is None else FolderStates(Path(checkpoint), resume)
    try:
        yield states
        states.remove()
    finally:
        states.close()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    on_gpu = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
    others = {name: tensor.clone() for name, tensor in tensors.items() if name not in on_gpu}
    return others | dict(zip(on_gpu, copies_in_main_memory(list(on_gpu.values())), strict=True))
