"""``surgeon bench generate``."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel

from llm_surgeon.checkpoint import load_model
from llm_surgeon.cli.options import Device, Quiet, TrustRemoteCode, console, parse_dtype
from llm_surgeon.errors import InputError
from llm_surgeon.fused import fused
from llm_surgeon.packed import fuse_linears, pack_model, unpack_model, use_cusparselt
from llm_surgeon.packed.checkpoint import model_bytes
from llm_surgeon.packed.decoding import Decoding
from llm_surgeon.packed.speed import Speed, measure_speed
from llm_surgeon.report.schema import collect_versions
from llm_surgeon.report.text import MISSING
from llm_surgeon.resources import choose_device, human_bytes

bench_app = typer.Typer(help="Measure the speed of a model.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measure the speed of a model."""


@bench_app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a 2:4 model, dense or packed.")],
    packed: Annotated[Path | None, typer.Option(help="MODEL packed; left out, it is packed in memory.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Sequences at once, repeatable (default: 1, 16).", min=1)
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs, of which the median counts.", min=1)] = 3,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 (default: as stored).")] = None,
    decoding: Annotated[
        list[Decoding] | None,
        typer.Option(
            help="eager; graph (a CUDA graph); compiled (torch.compile, and a CUDA graph); generate (as transformers' "
            "generate runs with a static cache: compiled, on a GPU). Repeatable (default: generate and graph on a GPU, "
            "else eager)."
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Packed layers that read the same input run as one (see fuse_linears).")
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
    place, number = choose_device(device), None if dtype is None else parse_dtype(dtype)
    ways = decoding or ([Decoding.GENERATE, Decoding.GRAPH] if place.type == "cuda" else [Decoding.EAGER])
    if csv_file is not None and not csv_file.absolute().parent.is_dir():
        raise InputError(f"{str(csv_file)!r} cannot be written: there is no folder {str(csv_file.parent)!r}")
    causal_lm = _load(model if packed is None else str(packed), number, trust_remote_code)
    if packed is not None and not _is_packed(causal_lm):
        raise InputError(f"{str(packed)!r} is not packed: make it with surgeon pack")
    if not _is_packed(causal_lm):
        pack_model(causal_lm)
    rows: list[tuple[str, int, Speed]] = []
    for name in ("packed", "dense"):
        if name == "dense" and packed is not None:
            del causal_lm  # before the other takes its memory
            causal_lm = _load(model, number, trust_remote_code)
        if name == "dense" and _is_packed(causal_lm):
            unpack_model(causal_lm)
        disk = model_bytes(causal_lm)
        causal_lm.to(place)
        if name == "packed" and cusparselt and not use_cusparselt(causal_lm):
            needs = "it needs an NVIDIA GPU, and layers without a bias whose sides are divisible by 16"
            print(f"surgeon: --cusparselt has no effect on this model on {place}: {needs}", file=sys.stderr)
        if name == "packed" and fuse:
            fuse_linears(causal_lm)
        for way, size in itertools.product(ways, batch_size or [1, 16]):
            if not quiet:
                console.print(f"{name}, {way.value}, batch size {size} …", highlight=False)
            with fused(causal_lm) if fused_parts else contextlib.nullcontext():
                speed = measure_speed(
                    causal_lm, batch_size=size, prompt=prompt, new_tokens=new_tokens, repeats=repeats, decoding=way
                )
            rows.append((name, disk, speed))
    rows.sort(key=lambda row: row[0])
    chosen = {
        "packed with linears fused": fuse,
        "packed with cuSPARSELt": cusparselt,
        "both with fused parts": fused_parts,
    }
    how = "; ".join(words for words, given in chosen.items() if given)
    for way in ways:
        console.print(_table(model, [row for row in rows if row[2].decoding is way], how, place))
    if csv_file is not None:
        _write_csv(csv_file, model, rows, how, place)


def _load(model: str, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    return load_model(model, dtype, trust_remote_code=trust_remote_code, packed=True)[0]


def _is_packed(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _table(model: str, rows: list[tuple[str, int, Speed]], how: str, device: torch.device) -> Table:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    first = rows[0][2]
    table = Table(
        title=f"{model}, {first.prompt} + {first.new_tokens} tokens on {where}, tokens per second, decoding: "
        f"{first.decoding.value}",
        title_justify="left",
        caption=how or None,
        caption_justify="left",
    )
    for column in ("", "batch", "prefill", "decode", "weights", "peak", "on disk"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    dense = {speed.batch_size: speed for name, _, speed in rows if name == "dense"}
    for name, disk, speed in rows:
        base = dense[speed.batch_size]
        prefill, decode = f"{speed.prefill_rate:,.0f}", f"{speed.decode_rate:,.1f}"
        if name == "packed":
            prefill += f"  {speed.prefill_rate / base.prefill_rate:.2f}×"
            decode += f"  {speed.decode_rate / base.decode_rate:.2f}×"
        peak = human_bytes(speed.peak_bytes) if speed.peak_bytes else MISSING
        table.add_row(
            name, str(speed.batch_size), prefill, decode, human_bytes(speed.weight_bytes), peak, human_bytes(disk)
        )
    return table


def _write_csv(path: Path, model: str, rows: list[tuple[str, int, Speed]], how: str, device: torch.device) -> None:
    about = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)}
    about |= {name: str(version) for name, version in collect_versions().items()}
    records = [
        {"model": model, "options": how, "weights": name, **speed_record(speed), "disk_bytes": disk, **about}
        for name, disk, speed in rows
    ]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error}") from error


def speed_record(speed: Speed) -> dict[str, object]:
    return {
        **dataclasses.asdict(speed),
        "decoding": speed.decoding.value,
        "prefill_seconds": f"{speed.prefill_seconds:.6g}",
        "decode_seconds": f"{speed.decode_seconds:.6g}",
        "prefill_tokens_per_s": f"{speed.prefill_rate:.6g}",
        "decode_tokens_per_s": f"{speed.decode_rate:.6g}",
    }
