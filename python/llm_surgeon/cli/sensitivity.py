"""``surgeon sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.cli.options import (
    DATA_HELP,
    Device,
    Model,
    Quiet,
    TextField,
    TrustRemoteCode,
    console,
    progress_bars,
    quiet_libraries,
    require_writable,
)
from llm_surgeon.cli.parameters import examples

app = typer.Typer()


@app.command(
    epilog=examples("surgeon sensitivity model", "surgeon sensitivity model --sparsity 0.6 --json sensitivity.json")
)
def sensitivity(
    model: Model,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Fractions of each layer's weights, repeatable (default: 0.3, 0.5, 0.7).")
    ] = None,
    calibration: Annotated[str, typer.Option(help=f"{DATA_HELP}.")] = "wikitext2",
    text_field: TextField = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window: 2048 or the model's limit.", min=2)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Predict what pruning each layer of MODEL would cost, by decoder block and kind of layer; nothing is pruned."""
    if json_file is not None:
        require_writable(json_file)
    with progress_bars(quiet) as progress:
        progress.phase("loading")
        quiet_libraries()
        from llm_surgeon.cli.views import print_sensitivity
        from llm_surgeon.jobs.sensitivity import SPARSITIES, sensitivity_of_checkpoint

        found = sensitivity_of_checkpoint(
            model,
            sparsity or SPARSITIES,
            calibration=calibration,
            text_field=text_field,
            samples=samples,
            seqlen=seqlen,
            trust_remote_code=trust_remote_code,
            device=device,
            progress=progress,
        )
    if json_file is not None:
        json_file.write_text(found.to_json(), encoding="utf-8")
    if not quiet:
        print_sensitivity(console, found)
