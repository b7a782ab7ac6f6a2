"""``surgeon demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.cli.options import Overwrite, Quiet, console, progress_bars, quiet_libraries
from llm_surgeon.cli.parameters import examples

app = typer.Typer()


@app.command(epilog=examples("surgeon demo", "surgeon demo folder --overwrite"))
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder to write.")] = Path("demo-output"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Prune the small model that ships with the package to 2:4 with four methods and compare them."""
    with progress_bars(quiet) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.cli.views import print_demo
        from llm_surgeon.demo import run_demo

        results = run_demo(out, progress, overwrite=overwrite)
    print_demo(console, results, out)
