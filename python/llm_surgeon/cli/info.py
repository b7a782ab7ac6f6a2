"""``surgeon info``."""

from __future__ import annotations

import typer

from llm_surgeon.cli.options import console
from llm_surgeon.cli.parameters import examples

app = typer.Typer()


@app.command(epilog=examples("surgeon info", "surgeon info > machine.txt"))
def info() -> None:
    """List the accelerators, compiled parts and versions that were found, and why something is missing."""
    from llm_surgeon.cli.views import print_info

    print_info(console)
