"""A signal is one line and an exit code; handlers of others stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from llm_surgeon.cli import main
from llm_surgeon.cli.signals import run_answering_signals
from tests.surgeon.jobs.test_interrupts import environment

EXIT_CODES = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "terminated"), "SIGHUP": (129, "hung up")}


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and fork are POSIX's")


@pytest.fixture
def usual_handlers() -> Any:
    former = {name: signal.getsignal(getattr(signal, name)) for name in EXIT_CODES}
    for name in EXIT_CODES:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    yield
    for name, handler in former.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", EXIT_CODES)
@pytest.mark.parametrize("converted", [False, True])
def test_a_signal_is_one_line_and_an_exit_code(
    name: str, converted: bool, capsys: pytest.CaptureFixture[str], usual_handlers: None
) -> None:
    cleaned: list[str] = []
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))

    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            cleaned.append("never")
        except BaseException as error:
            if converted:  # as an extension does that is interrupted while it is imported
                raise ImportError("initialization failed") from error
            raise
        finally:
            cleaned.append("up")

    with pytest.raises(SystemExit) as exit:
        run_answering_signals(command)
    code, word = EXIT_CODES[name]
    assert (exit.value.code, cleaned, capsys.readouterr().err) == (code, ["up"], f"surgeon: {word}\n")
    assert signal.getsignal(number) == before


def test_a_signal_that_meets_a_finalizer_is_not_lost(usual_handlers: None) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def command() -> None:
        Finalized()
        time.sleep(60)

    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as exit:
        run_answering_signals(command)
    assert exit.value.code == 143 and sys.unraisablehook is hook


def test_ignored_signals_and_handlers_of_others_stay(usual_handlers: None) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))

    def command() -> None:
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        seen.append(0)

    run_answering_signals(command)
    assert sorted(seen) == [0, signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    threads: list[str] = []  # which cannot install handlers
    thread = threading.Thread(target=run_answering_signals, args=[lambda: threads.append("ran")])
    thread.start()
    thread.join()
    assert threads == ["ran"]


def test_errors_and_exit_codes_pass_without_a_signal(capsys: pytest.CaptureFixture[str], usual_handlers: None) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_answering_signals(fail)
    for code in (0, 1, 2):
        with pytest.raises(SystemExit) as exit:
            run_answering_signals(lambda code=code: sys.exit(code))  # type: ignore[misc]
        assert exit.value.code == code
    with pytest.raises(SystemExit) as exit:
        main(["no-such-command"])
    assert exit.value.code == 2 and "interrupted" not in capsys.readouterr().err


def test_the_package_installs_no_handlers() -> None:
    code = (
        "import signal; names = ['SIGINT', 'SIGTERM', 'SIGHUP']\n"
        "before = [signal.getsignal(getattr(signal, name)) for name in names]\n"
        "import llm_surgeon.cli.app\n"
        "assert before == [signal.getsignal(getattr(signal, name)) for name in names]"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
