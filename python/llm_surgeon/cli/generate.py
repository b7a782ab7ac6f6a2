"""Measurements of ``surgeon bench generate``, and the tables and file that show them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import sys
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedModel

from llm_surgeon.checkpoint import load_model
from llm_surgeon.cli.options import console, parse_dtype, quiet_libraries, require_writable
from llm_surgeon.config.decoding import Decoding
from llm_surgeon.errors import InputError, printable
from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.inference import merge_packed_linears, pack_model, unpack_model, use_cusparselt
from llm_surgeon.inference.fusible import unfused_part
from llm_surgeon.inference.speed import Speed, measure_speeds
from llm_surgeon.jobs.pack import model_bytes
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.report.format import MISSING
from llm_surgeon.report.schema import collect_versions
from llm_surgeon.resources import available_memory, choose_device, human_bytes


def measure(
    model: str,
    packed: Path | None,
    *,
    batch_sizes: list[int],
    prompt: int,
    new_tokens: int,
    repeats: int,
    dtype: str | None,
    decoding: list[Decoding],
    fuse: bool,
    cusparselt: bool,
    fused_parts: bool,
    csv_file: Path | None,
    device: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Measure ``model`` dense and packed and print a table for every way of decoding.

    Raises:
        InputError: there is no GPU and no ``device`` was asked for, or anything asked for cannot be measured.
    """
    quiet_libraries()
    if device is None and not torch.cuda.is_available():
        raise InputError(
            "no NVIDIA GPU was found, on which packed layers are fast: --device cpu measures both models here"
        )
    place, number = choose_device(device), None if dtype is None else parse_dtype(dtype)
    modes = decoding or ([Decoding.GENERATE, Decoding.FUSED] if place.type == "cuda" else [Decoding.EAGER])
    if csv_file is not None:
        require_writable(csv_file)
    held = {"packed": _load_packed(model, packed, number, trust_remote_code)}
    together = _has_room(held["packed"], place)
    rows: list[tuple[str, int, Speed]] = []
    for names in [("dense", "packed")] if together else [("packed",), ("dense",)]:
        if "dense" in names:
            if not together and packed is not None:
                held.clear()  # before the other takes its memory
            dense = held.pop("packed") if "packed" in held and not together else _load(model, number, trust_remote_code)
            if _is_packed(dense):
                unpack_model(dense)
            held["dense"] = dense
            del dense
        disk = {name: model_bytes(held[name]) for name in names}
        for name in names:
            held[name].to(place)
        if "packed" in names and cusparselt and not use_cusparselt(held["packed"]):
            needs = "it needs an NVIDIA GPU, and layers without a bias whose sides are divisible by 16"
            print(f"surgeon: --cusparselt has no effect on this model on {place}: {needs}", file=sys.stderr)
        if "packed" in names and fuse:
            merge_packed_linears(held["packed"])
        for mode, size in itertools.product(modes, batch_sizes):
            if not quiet:
                console.print(f"{' and '.join(names)}, {mode.value}, batch size {size} …")
            with contextlib.ExitStack() as stack:
                for name in names if fused_parts else ():
                    stack.enter_context(fused_pointwise(held[name]))
                speeds = measure_speeds(
                    [held[name] for name in names],
                    batch_size=size,
                    prompt=prompt,
                    new_tokens=new_tokens,
                    repeats=repeats,
                    decoding=mode,
                )
            rows += [(name, disk[name], speed) for name, speed in zip(names, speeds, strict=True)]
    rows.sort(key=lambda row: row[0])
    own = unfused_part(held["dense"], prompt + new_tokens) if Decoding.FUSED in modes else None
    how = _caption(place, together, own, fuse=fuse, cusparselt=cusparselt, fused_parts=fused_parts)
    for mode in modes:
        console.print(_table(model, [row for row in rows if row[2].decoding is mode], how, place))
    if csv_file is not None:
        _write_csv(csv_file, model, rows, how, place)


def _caption(
    place: torch.device, together: bool, unfused: str | None, *, fuse: bool, cusparselt: bool, fused_parts: bool
) -> str:
    """How the models ran, for below the tables; ``unfused`` is what kept them from fused passes."""
    on_gpu = place.type == "cuda"
    words = {
        "packed with linears fused": fuse,
        "packed with cuSPARSELt": cusparselt,
        "both with fused parts": fused_parts,
        f"fused: the models' own passes, because of {unfused}": unfused is not None,
        "dense after packed, as both have no room together: what else the machine did may differ": (
            on_gpu and not together
        ),
        "without a GPU packed layers run as dense ones, so nothing is compared": not on_gpu,
    }
    return "; ".join(said for said, holds in words.items() if holds)


def _load_packed(
    model: str, packed: Path | None, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The packed model of the folder ``packed``, or ``model``, packed here if it is not."""
    causal_lm = _load(model if packed is None else str(packed), dtype, trust_remote_code)
    if not _is_packed(causal_lm):
        if packed is not None:
            raise InputError(f"{str(packed)!r} is not packed: make it with surgeon pack")
        pack_model(causal_lm)
    return causal_lm


def _load(model: str, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    return load_model(model, dtype, trust_remote_code=trust_remote_code, packed=True)[0]


def _has_room(packed: PreTrainedModel, place: torch.device) -> bool:
    """True where the dense model has room beside the ``packed`` one, which is in main memory, and both can run."""
    dense = packed.num_parameters() * packed.dtype.itemsize
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    dense += sum(layer.in_features * layer.out_features for layer in layers) * packed.dtype.itemsize
    if available_memory("cpu") < 1.5 * dense:
        return False
    return place.type == "cpu" or available_memory(place) >= 2.5 * dense


def _is_packed(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _table(model: str, rows: list[tuple[str, int, Speed]], how: str, device: torch.device) -> Table:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    first = rows[0][2]
    what = f"{first.prompt} + {first.new_tokens} tokens on {where}"
    table = Table(
        title=f"{printable(model)}, {what}, tokens per second, decoding: {first.decoding.value}",
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
        if name == "packed" and device.type == "cuda":
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
