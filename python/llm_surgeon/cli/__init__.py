"""The ``surgeon`` command."""

from __future__ import annotations

from collections.abc import Sequence

from llm_surgeon.cli.signals import run_answering_signals
from llm_surgeon.cli.streams import lasting_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: :func:`llm_surgeon.cli.app.main`, with answers to signals from the first moment."""

    def command() -> None:
        from llm_surgeon.cli.app import main as run

        run(arguments)

    with lasting_streams():
        run_answering_signals(command)


__all__ = ["main"]
