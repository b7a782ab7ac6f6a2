"""Commands that are killed at random points, one process each: forked from one in which all is imported already.

``python -m tests.surgeon.interrupted_runs FOLDER POINTS [SEED]`` prints a JSON object: by command, what was tried and
what was found wrong. Half of the points are moments of a run, and half the n-th time that it touches a file at OUT.
With ``kill`` as a fourth argument prunings of all kinds are killed, each so often, and gone on with.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from llm_surgeon.cli.app import main
from llm_surgeon.cli.signals import run_answering_signals
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import build

_WINDOWS = ["--samples", "4", "--seqlen", "16"]
# By kind, the command and its options.
KINDS: dict[str, tuple[str, list[str]]] = {
    "prune": ("prune", ["--method", "magnitude", "--samples", "2", "--seqlen", "16"]),
    "shots": ("prune", [*_WINDOWS, "--structure", "unstructured", "--shots", "2"]),
    "recover": ("recover", ["--steps", "2", "--seqlen", "16", "--batch-size", "2", "--eval-every", "1", "--rank", "2"]),
    "pack": ("pack", []),
    "compact": ("compact", []),
}
PRUNINGS: dict[str, tuple[str, list[str]]] = {
    "2:4": ("prune", [*_WINDOWS]),
    "unstructured": ("prune", [*_WINDOWS, "--structure", "unstructured", "--shots", "3"]),
    "joint": ("prune", [*_WINDOWS, "--update", "joint", "--shots", "3", "--gradient-steps", "1"]),
    "rows-columns": ("prune", [*_WINDOWS, "--structure", "rows-columns", "--sparsity", "0.2", "--shots", "3"]),
    "groups": ("prune", [*_WINDOWS, "--structure", "groups", "--shots", "3"]),
    "width": ("prune", [*_WINDOWS, "--structure", "width", "--sparsity", "0.25", "--shots", "2"]),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_LONGEST = 240  # seconds of a run
_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "ctypes.dlsym"}
_STATES = {"prune": ".out.pruning", "recover": ".out.training"}
LEFT_BY_A_KILL = (".out.lock", ".out.partial-", ".out.previous-", *_STATES.values())


class Runs:
    """Runs of one command in ``folder``, which holds ``in``, ``words.txt`` and, while a run lasts, ``work/out``."""

    def __init__(self, kind: str, folder: Path, seed: str) -> None:
        verb, self.options = (KINDS | PRUNINGS)[kind]
        self.verb, self.draw = verb, random.Random(f"{kind} {seed}")
        self.source, self.old, self.work = folder / f"in-{verb}", folder / "old", folder / "work"
        self.out, self.text = self.work / "out", folder / "words.txt"
        self.inputs = _digest(self.source), _digest(self.text)
        self.tried: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._empty(old=False)
        with contextlib.suppress(SystemExit):
            main(self._arguments(overwrite=False, resume=False))  # what it imports is there for all children
        self.wanted = {
            path.name: load_file(path) if path.suffix == ".safetensors" else {} for path in self.out.iterdir()
        }
        self._empty(old=True)
        begun = time.perf_counter()
        counter = self.work / "events"
        assert self._wait(self._fork(self._arguments(True, False), count_to=counter)) == 0
        self.seconds, self.events = time.perf_counter() - begun, int(counter.read_text())

    def point(self, number: int, signals: tuple[signal.Signals, ...] = SIGNALS) -> None:
        """One run that a signal meets, what it leaves, and for kills the next run, which is killed, too, at times."""
        sent, old = signals[number % len(signals)], self.draw.random() < 0.7
        by_event = number // len(signals) % 2 == 0
        at = self.draw.randint(1, self.events) if by_event else self.draw.uniform(0.0, self.seconds)
        self._empty(old=old)
        arguments = self._arguments(overwrite=old, resume=False)
        child = self._fork(arguments, die=(int(at), sent) if by_event else None)
        if not by_event:
            time.sleep(at)
            os.kill(child, sent)
        code = self._wait(child)
        where = (
            f"{self.verb}: {sent.name} at {'file event' if by_event else 'second'} {at}, old {old}, exit code {code}"
        )
        self.tried[f"{sent.name} {'finished' if code == 0 else 'stopped'}"] += 1

        def check(right: bool, what: str) -> None:
            if not right:
                log = (self.work / "log").read_text()[-2000:]
                self.wrong.append(f"{where}: {what}; {sorted(path.name for path in self.work.iterdir())}; {log}")

        check(code in (0, -sent if sent == signal.SIGKILL else 128 + sent), "another exit code")
        state = self._state()
        check(state in ({"old", "new"} if old else {"absent", "new"}), f"OUT is {state}")
        check(state == "new" or code != 0, "done without OUT")
        left = {path.name for path in self.work.iterdir()} - {"out", "log"}
        if sent == signal.SIGKILL:
            check(all(name.startswith(LEFT_BY_A_KILL) for name in left), "something else is left")
            while self.verb == "prune" and self.draw.random() < 0.3:
                child = self._fork(self._arguments(overwrite=True, resume=True))
                time.sleep(self.draw.uniform(0.0, self.seconds))
                os.kill(child, sent)
                self._wait(child)
            resume = any((self.work / name).exists() for name in _STATES.values())
            self.tried["went on from a state"] += any((self.work / ".out.pruning").glob("*.safetensors"))
            code = self._wait(self._fork(self._arguments(overwrite=True, resume=resume)))
            check(code == 0, f"the next run ends with {code}")
            check(self._state() == "new", "the next run's OUT is not complete")
            check({path.name for path in self.work.iterdir()} == {"out", "log"}, "the next run leaves something")
        else:
            check(left <= {_STATES.get(self.verb)}, "something is left")
            log = (self.work / "log").read_text()
            kept = self.verb == "prune" and bool(left)
            check("Traceback" not in log and (code == 0 or len(log.splitlines()) == 1 + kept), "other lines on stderr")
            check("with --resume goes on" in log or not kept, "does not say how to go on")
        check((_digest(self.source), _digest(self.text)) == self.inputs, "the inputs changed")

    def _arguments(self, overwrite: bool, resume: bool) -> list[str]:
        text = {"prune": ["--calibration", str(self.text)], "recover": ["--data", str(self.text)]}.get(self.verb, [])
        more = ["--quiet"] + ["--overwrite"] * overwrite + ["--resume"] * resume
        return [self.verb, str(self.source), str(self.out), *self.options, *text, *more]

    def _empty(self, *, old: bool) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if old:
            shutil.copytree(self.old, self.out)

    def _state(self) -> str:
        """State of OUT: absent, old, new or damaged."""
        if not self.out.exists():
            return "absent"
        if _digest(self.out) == _digest(self.old):
            return "old"
        return "new" if self._is_new() else "damaged"

    def _is_new(self) -> bool:
        """True where OUT has all its files, with the weights of an undisturbed run (of recovered ones: their sizes)."""
        if {path.name for path in self.out.iterdir()} != set(self.wanted):
            return False
        for name, tensors in self.wanted.items():
            found = load_file(self.out / name) if tensors else {}
            if found.keys() != tensors.keys() or any(found[key].shape != tensors[key].shape for key in tensors):
                return False
            if self.verb != "recover" and any(not torch.equal(found[key], tensors[key]) for key in tensors):
                return False
        AutoModelForCausalLM.from_pretrained(self.out, trust_remote_code=True)
        return True

    def _fork(
        self,
        arguments: list[str],
        *,
        die: tuple[int, int] | None = None,
        count_to: Path | None = None,
        log_name: str = "log",
    ) -> int:
        """Run a command in a child; let it count its file events, and at one of them die."""
        ready, tell = os.pipe()
        child = os.fork()
        if child:  # goes on once the other answers to signals
            os.close(tell)
            os.read(ready, 1)
            os.close(ready)
            return child
        code = 99
        try:
            log = os.open(self.work / log_name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(_LONGEST, exit=True, file=log)  # one that hangs says where
            counted = _watch(str(self.work), die)
            run_answering_signals(lambda: (os.write(tell, b"."), main(arguments)))
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0
            if count_to is not None:
                count_to.write_text(str(counted()))
        finally:
            sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def _wait(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watch(folder: str, die: tuple[int, int] | None) -> Callable[[], int]:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or (event != "ctypes.dlsym" and not str(arguments[0]).startswith(folder)):
            return
        count += 1
        if die is not None and count == die[0]:
            os.kill(os.getpid(), die[1])

    sys.addaudithook(hook)
    return lambda: count


def _digest(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def prepare(folder: Path) -> None:
    """Models to read, one for each command, and text."""
    (folder / "words.txt").write_text(" ".join(f"w{i % 61 + 1}" for i in range(2000)))
    save_folder(folder / "old", build("opt"))
    for verb in dict.fromkeys(verb for verb, _ in KINDS.values()):
        model = build("llama")
        with torch.no_grad():
            for block in model.model.layers:
                if verb in ("recover", "pack"):
                    block.mlp.up_proj.weight.view(-1, 4)[:, :2] = 0.0
                if verb == "compact":
                    block.mlp.up_proj.weight[:16] = 0.0
        save_folder(folder / f"in-{verb}", model)


def run(folder: Path, points: int, seed: str, kill: bool = False) -> dict[str, dict[str, Any]]:
    """``points`` of every command; by kind, how often it was stopped by what, and what was wrong."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread may hold a lock while a child is forked, who waits for it for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let background jobs ignore
    prepare(folder)
    found: dict[str, dict[str, Any]] = {}
    for kind in PRUNINGS if kill else KINDS:
        runs = Runs(kind, folder, seed)
        for number in range(-(-points // 5) if kind == "shots" else points):
            runs.point(number, (signal.SIGKILL,) if kill or kind == "shots" else SIGNALS)
        found[kind] = {"events": runs.events, "seconds": runs.seconds, "tried": runs.tried, "wrong": runs.wrong}
    return found


if __name__ == "__main__":
    result = run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "0", "kill" in sys.argv[4:])
    print(json.dumps(result, indent=1))
