"""``surgeon pack``."""

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
    show,
)
from llm_surgeon.cli.parameters import examples
from llm_surgeon.errors import printable

app = typer.Typer()


@app.command(epilog=examples("surgeon pack pruned packed", "surgeon pack pruned packed --overwrite"))
def pack(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id of a 2:4 model, as `surgeon prune` writes it.")
    ],
    out: Out,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Pack a 2:4 MODEL into OUT: the same values in 9/16 of the bytes, faster on NVIDIA GPUs.

    OUT loads with AutoModelForCausalLM after `import llm_surgeon`.
    """
    with progress_bars(quiet) as progress:
        progress.phase("packing")
        quiet_libraries()
        from llm_surgeon.jobs.pack import pack_checkpoint

        report = pack_checkpoint(
            model, out, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress.step
        )
    if not quiet:
        show(report.summary())
        console.print(f"written to {printable(str(out))}; load it after `import llm_surgeon`", soft_wrap=True)
