"""Prune a model in memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError
from llm_surgeon.isolation import isolated
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.checks import check_shrinkable
from llm_surgeon.models.decoder import Decoder, check_finite, find_decoder
from llm_surgeon.models.footprint import compare_latencies, copy_in_main_memory, model_size
from llm_surgeon.models.limits import require_fit
from llm_surgeon.models.offload import compute_device
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.state import ModelState
from llm_surgeon.models.wrappers import unwrapped
from llm_surgeon.planning.plan import Plan, make_plan
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.config import check_rank
from llm_surgeon.report.schema import HeldOutLoss, LayerReport, PruneReport, collect_versions
from llm_surgeon.report.warnings import warnings_of
from llm_surgeon.resources import peak_memory
from llm_surgeon.shots.runner import Run, Shots, run_shots


def prune(
    model: nn.Module,
    calibration: Any,
    structure: str = "2:4",
    *,
    config: PruneConfig | None = None,
    correction_data: Any = None,
    held_out: Any = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneReport:
    """Prune the decoder's linear layers of a causal LM in place.

    Autocast, inference mode and no-grad outside do not reach inside, and random states are put back. Of several threads
    that prune or recover, one runs at a time.

    Args:
        model: a decoder-only Hugging Face causal LM; computed in evaluation mode, in the dtype and on the device it is
            in (float32 is recommended: bfloat16 weights round every update). Inside a compiled model, DataParallel or
            DistributedDataParallel it is pruned in place, running eagerly; what is compiled compiles itself anew.
        calibration: a :class:`~llm_surgeon.data.calibration.Calibration`, token ids ``[samples, seqlen]``, or
            a sequence of mappings with ``input_ids`` and, optionally, ``attention_mask``.
        structure: ``"2:4"``, any ``"N:M"``, ``"unstructured"``, ``"rows-columns"`` or ``"groups"`` (a smaller model).
        config: every option at once, in place of ``structure`` and ``options``.
        correction_data: what low-rank corrections (``lora_rank``) learn from, given like ``calibration``, which they
            learn from where it is left out.
        held_out: sequences that pruning does not see, given like ``calibration``: the report's ``held_out`` has the
            losses on them before and after.
        plan: the run's layout, where :func:`~llm_surgeon.planning.plan.make_plan` was asked for it already.
        progress: receiver of progress; none by default.
        **options: fields of :class:`PruneConfig`.

    Failed or interrupted (:class:`KeyboardInterrupt`) it leaves the model, its flags, hooks and configuration as they
    were.

    Returns:
        The report: what was removed from which layer, predicted beside measured loss of every shot, and warnings.

    Raises:
        InputError: the model, the data or an option is at fault; nothing was changed.
        NumericalError: NaN or infinity was met; the model has its original weights again.
    """
    if config is None:
        config = PruneConfig.from_mapping({"structure": structure, **options})
    elif options or structure != "2:4":
        raise InputError("give either config or single options, not both")
    state = ModelState(model)
    try:
        return _prune(model, state, calibration, config, correction_data, held_out, plan, progress)
    except BaseException:
        state.restore()
        raise


@isolated()
def _prune(
    model: nn.Module,
    state: ModelState,
    calibration: Any,
    config: PruneConfig,
    correction_data: Any,
    held_out: Any,
    plan: Plan | None,
    progress: Progress | None,
) -> PruneReport:
    """:func:`prune`, whose caller puts the model's ``state`` back if anything is raised."""
    windows = _own(Calibration.of(calibration))
    if correction_data is not None and not config.lora_rank:
        raise InputError("data for low-rank corrections mean nothing without lora_rank")
    apart = None if held_out is None else _own(Calibration.of(held_out))
    if isinstance(model, nn.parallel.DistributedDataParallel) and config.pattern.coupled:
        raise InputError("DistributedDataParallel keeps the sizes of its parameters: wrap the model once it is pruned")
    model = unwrapped(model)
    samples, seqlen = windows.input_ids.shape
    config = dataclasses.replace(config, samples=samples, seqlen=seqlen)
    decoder = find_decoder(model)
    check_model(model, decoder, config)
    config = dataclasses.replace(config, shots=config.pattern.count_shots(decoder, config))
    corrections = None if correction_data is None else Calibration.of(correction_data)
    for use, each in (("calibration", windows), ("held-out", apart), ("correction", corrections)):
        if each is not None:
            require_fit(each.input_ids, model, f"{use} sequences")
    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    device = compute_device(model, config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"before": model_size(model, windows.input_ids)} if config.pattern.coupled else {}
    with _memory_capped(config), evaluation_mode(model):
        run = Run(
            model,
            decoder,
            windows,
            config,
            plan or make_plan(model, decoder, config),
            progress or Progress(),
            correction_data=None if corrections is None else _own(corrections),
            held_out=apart,
        )
        shots: Shots = config.pattern.shot_class(run)
        saved = state.copy_weights(_written(model, decoder, config), at_once=config.offload == "cpu")
        outcome = run_shots(shots, run, before_update=saved)
        # It has the dense model's sizes, which are what latency is a matter of.
        dense = copy_in_main_memory(model) if sizes else None
        shots.finish()
    peak = peak_memory(device)
    config = dataclasses.replace(config, shots=len(outcome.shots))  # of blocks of several sizes it is known now
    if sizes:
        sizes["after"] = model_size(model, windows.input_ids)
        for when, latency in compare_latencies(dense, model, windows.input_ids).items():
            sizes[when] |= latency
    report = PruneReport(
        config=dataclasses.asdict(config),
        versions=collect_versions(),
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        parameters=parameters,
        started=started,
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak,
        layers=_layer_reports(decoder, shots.selections),
        shots=outcome.shots,
        sizes=sizes,
        custom_code=hasattr(model, "is_pruned"),
    )
    if apart is not None:
        report.held_out = HeldOutLoss(*apart.counts(), *outcome.held_out)
    report.warnings = warnings_of(report, windows.counts()[1])
    return report


def check_model(model: Any, decoder: Decoder, config: PruneConfig) -> None:
    """Refuse a model that ``config`` cannot be carried out on.

    Raises:
        InputError: the sizes of a layer, or the model itself, do not fit the structure.
        NumericalError: a weight is NaN or infinite.
    """
    if config.pattern.coupled:
        check_shrinkable(model)
    check_finite(model)
    if config.lora_rank:
        check_rank(decoder, config.lora_rank, "lora_rank")
    # Models that were made smaller here may count their groups of heads where they had no such number.
    checked = config.pattern.coupled and not hasattr(model, "is_pruned")
    for depth, own in enumerate(model.config.per_layer_config if checked else ()):
        heads, groups = (getattr(own, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise InputError(f"the {heads} attention heads of block {depth} do not divide into {groups} groups")
    m = config.pattern.m
    for linear in decoder.linears:
        if m and linear.columns % m:
            raise InputError(
                f"structure {config.structure!r} needs widths divisible by {m}: {linear.name} has {linear.columns}"
            )


def _own(windows: Calibration) -> Calibration:
    """A copy, which backward passes may keep: tensors made under ``torch.inference_mode`` they may not."""
    mask = windows.attention_mask
    return Calibration(windows.input_ids.clone(), None if mask is None else mask.clone())


@contextmanager
def _memory_capped(config: PruneConfig) -> Iterator[None]:
    """PyTorch takes no more of the current GPU's memory than ``config.gpu_memory`` for a while."""
    cap = config.gpu_memory_bytes
    if cap is None or not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _written(model: nn.Module, decoder: Decoder, config: PruneConfig) -> list[nn.Parameter]:
    """Parameters that a run may write in place.

    Those that are moved from main memory are none of them, see :func:`~llm_surgeon.models.offload.offloaded`.
    """
    if config.pattern.whole_model:
        return list(model.parameters())
    parameters = [p for linear in decoder.linears for p in linear.module.parameters(recurse=False)]
    return [p for p in parameters if p.device.type != "cpu"] if config.offload == "cpu" else parameters


def _layer_reports(decoder: Decoder, selections: list[Selection]) -> list[LayerReport]:
    return [
        LayerReport(
            name=linear.name,
            kind=linear.kind,
            depth=linear.depth,
            rows=selection.pruned.shape[0],
            columns=selection.pruned.shape[1],
            weights=selection.pruned.numel(),
            removed=int(selection.pruned.count_nonzero()),
        )
        for linear, selection in zip(decoder.linears, selections, strict=True)
    ]
