"""``surgeon bench generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.checks import require_choice
from llm_surgeon.cli.options import DTYPES, Device, Quiet, TrustRemoteCode
from llm_surgeon.cli.parameters import completion, examples
from llm_surgeon.config.decoding import Decoding

app = typer.Typer(help="Measure the speed of a model.", no_args_is_help=True)
_DECODINGS = [way.value for way in Decoding]


@app.callback()
def bench() -> None:
    """Measure the speed of a model."""


@app.command(
    epilog=examples("surgeon bench generate pruned", "surgeon bench generate pruned --packed packed --decoding graph")
)
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a 2:4 model, dense or packed.")],
    packed: Annotated[Path | None, typer.Option(help="MODEL packed; left out, it is packed in memory.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Sequences at once, repeatable (default: 1, 16).", min=1)
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs, of which the median counts.", min=1)] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"{' | '.join(DTYPES)} (default: as stored).", autocompletion=completion(lambda: DTYPES)),
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=completion(lambda: _DECODINGS),
            help="eager; graph (a CUDA graph); fused (few kernels for Llama-like models, in a CUDA graph); compiled "
            "(torch.compile, and a CUDA graph); generate (as transformers' generate runs with a static cache: "
            "compiled, on a GPU). Repeatable (default: generate and fused on a GPU, else eager).",
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse", help="Packed layers that read the same input run as one (merge_packed_linears)."),
    ] = False,
    cusparselt: Annotated[
        bool, typer.Option("--cusparselt", help="Long prompts of the packed model through NVIDIA's library.")
    ] = False,
    fused_parts: Annotated[
        bool,
        typer.Option("--fused-parts", help="Norms, SwiGLU and rotary embeddings as one kernel each, in both models."),
    ] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the figures to this file.")] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Prefill and decode speed of a 2:4 MODEL, dense against packed: tokens per second, memory, bytes on disk."""
    for name in decoding or ():
        require_choice("decoding", name, _DECODINGS)
    from llm_surgeon.cli.generate import measure  # brings torch: see options.py

    measure(
        model,
        packed,
        batch_sizes=batch_size or [1, 16],
        prompt=prompt,
        new_tokens=new_tokens,
        repeats=repeats,
        dtype=dtype,
        decoding=[Decoding(name) for name in decoding or ()],
        fuse=fuse,
        cusparselt=cusparselt,
        fused_parts=fused_parts,
        csv_file=csv_file,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
