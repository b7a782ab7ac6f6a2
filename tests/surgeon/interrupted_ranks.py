"""Prunings that two processes share, one or both of which are killed at random points, and that are then gone on with.

``python -m tests.surgeon.interrupted_ranks FOLDER POINTS [SEED]`` prints a JSON object: by kind, what was tried and
what was found wrong. The rank that is not killed may end by itself; if it does not, it is ended as by a launcher.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from tests.surgeon.distributed.runs import variables
from tests.surgeon.interrupted_runs import LEFT_BY_A_KILL, PRUNINGS, Runs, prepare

_COUNT = 2
_LOGS = [f"log-{rank}" for rank in range(_COUNT)]
# Seconds that ranks have to notice that another one has gone, before they are sent SIGTERM; then until they are killed.
_NOTICE, _GRACE = 5.0, 30.0


class RankRuns(Runs):
    """Runs of one command by two ranks; a kind of :data:`PRUNINGS`."""

    def __init__(self, kind: str, folder: Path, seed: str) -> None:
        super().__init__(kind, folder, f"ranks {seed}")
        self._empty(old=False)
        begun = time.perf_counter()
        codes = self._end(self._start(self._arguments(overwrite=False, resume=False)))
        assert codes == [0] * _COUNT, self._logs()
        self.seconds = time.perf_counter() - begun
        self.wanted["model.safetensors"] = load_file(self.out / "model.safetensors")  # in another order of sums

    def point(self, number: int, signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)) -> None:
        """A run of which one rank, or both, are killed, at a moment or when the first touches a file; and the next."""
        old, by_event = self.draw.random() < 0.7, number % 2 == 0
        victims = [0] if by_event else self.draw.choice([[0], [1], [0, 1]])
        at = self.draw.randint(1, self.events) if by_event else self.draw.uniform(0.0, self.seconds)
        self._empty(old=old)
        children = self._start(self._arguments(old, False), die=(int(at), signal.SIGKILL) if by_event else None)
        if not by_event:
            time.sleep(at)
            for victim in victims:
                os.kill(children[victim], signal.SIGKILL)
        codes = self._end(children)
        where = (
            f"ranks {victims} killed at {'file event' if by_event else 'second'} {at}, old {old}, exit codes {codes}"
        )
        self.tried["SIGKILL stopped" if any(codes) else "SIGKILL finished"] += 1

        def check(right: bool, what: str) -> None:
            if not right:
                names = sorted(path.name for path in self.work.iterdir())
                self.wrong.append(f"{where}: {what}; {names}; {self._logs()}")

        check(all(codes[rank] in (0, -signal.SIGKILL) for rank in victims), "another exit code")
        others = [code for rank, code in enumerate(codes) if rank not in victims]
        self.tried["others noticed"] += 1 in others
        check(all(code in (0, 1, 128 + signal.SIGTERM) for code in others), "another exit code of a rank that was left")
        check("Traceback" not in self._logs(), "a traceback")
        state = self._state()
        check(state in ({"old", "new"} if old else {"absent", "new"}), f"OUT is {state}")
        check(state == "new" or any(codes), "done without OUT")
        left = {path.name for path in self.work.iterdir()} - {"out", *_LOGS}
        check(all(name.startswith(LEFT_BY_A_KILL) for name in left), "something else is left")
        self.tried["went on from a state"] += any((self.work / ".out.pruning").glob("*.safetensors"))
        resume = (self.work / ".out.pruning").exists()
        codes = self._end(self._start(self._arguments(overwrite=True, resume=resume)))
        check(not any(codes), f"the next run ends with {codes}")
        check(self._state() == "new", "the next run's OUT is not complete")
        check({path.name for path in self.work.iterdir()} == {"out", *_LOGS}, "the next run leaves something")

    def _start(self, arguments: list[str], die: tuple[int, int] | None = None) -> list[int]:
        """Start a command as both ranks, of which the first dies at a file event."""
        children = []
        for own, log in zip(variables(_COUNT), _LOGS, strict=True):
            os.environ |= own
            children.append(self._fork(arguments, die=None if children else die, log_name=log))
            for name in own:
                del os.environ[name]
        return children

    @staticmethod
    def _end(children: list[int]) -> list[int]:
        """Exit codes; where one fails, others are ended."""
        codes: dict[int, int] = {}
        sent: dict[int, float] = {}
        failed = None
        while len(codes) < len(children):
            time.sleep(0.02)
            now = time.monotonic()
            for child in children:
                if child in codes:
                    continue
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    failed = now if codes[child] and failed is None else failed
                elif failed is not None and now > failed + _NOTICE and child not in sent:
                    os.kill(child, signal.SIGTERM)
                    sent[child] = now
                elif child in sent and now > sent[child] + _GRACE:
                    os.kill(child, signal.SIGKILL)
        return [codes[child] for child in children]

    def _logs(self) -> str:
        return "\n".join((self.work / log).read_text()[-2000:] for log in _LOGS if (self.work / log).exists())


def run(folder: Path, points: int, seed: str) -> dict[str, dict[str, Any]]:
    """``points`` of every kind of pruning; see :func:`tests.surgeon.interrupted_runs.run`."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread may hold a lock while a child is forked, who waits for it for ever
    prepare(folder)
    found: dict[str, dict[str, Any]] = {}
    for kind in PRUNINGS:
        runs = RankRuns(kind, folder, seed)
        for number in range(points):
            runs.point(number)
        found[kind] = {"events": runs.events, "seconds": runs.seconds, "tried": runs.tried, "wrong": runs.wrong}
    return found


if __name__ == "__main__":
    result = run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "0")
    print(json.dumps(result, indent=1))
