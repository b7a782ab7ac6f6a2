"""``surgeon compact``."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_surgeon.cli.options import (
    Out,
    Overwrite,
    Quiet,
    TrustRemoteCode,
    console,
    progress_bars,
    quiet_libraries,
)
from llm_surgeon.cli.parameters import examples
from llm_surgeon.errors import printable

app = typer.Typer()


@app.command(epilog=examples("surgeon compact pruned smaller", "surgeon compact recovered smaller --overwrite"))
def compact(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id of a model with zero rows and columns.")
    ],
    out: Out,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Take zero rows and columns (--structure rows-columns) out of MODEL's matrices: smaller and faster."""
    with progress_bars(quiet) as progress:
        progress.phase("compacting")
        quiet_libraries()
        from llm_surgeon.jobs.compact import compact_checkpoint
        from llm_surgeon.report.format import percent, size_table

        found = compact_checkpoint(model, out, overwrite=overwrite, trust_remote_code=trust_remote_code)
    if not quiet:
        table = "\n".join(" ".join(f"{cell:>12}" for cell in row) for row in size_table(found.sizes))
        console.print(
            f"{found.after:,} of {found.before:,} weights left ({percent(found.after / found.before)}): "
            f"{found.neurons:,} neurons removed, {found.linears} linears gather inputs or outputs\n{table}\n"
            f"written to {printable(str(out))}; load it with trust_remote_code=True, or with this package",
            soft_wrap=True,
        )
