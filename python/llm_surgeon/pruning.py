"""Prune a model in memory, or a checkpoint into a new checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.checkpoint import check_output, load_model, save_checkpoint
from llm_surgeon.checks import require_bool
from llm_surgeon.config import PruneConfig
from llm_surgeon.data import Calibration, calibration_windows, choose_seqlen, evaluation_windows, read_text, tokenize
from llm_surgeon.errors import InputError
from llm_surgeon.models import Decoder, check_causal, check_finite, evaluation_mode, find_decoder
from llm_surgeon.offload import copies_in_main_memory
from llm_surgeon.plan import Plan, compute_device, make_plan
from llm_surgeon.progress import Progress
from llm_surgeon.report.schema import LayerReport, PruneReport, collect_versions
from llm_surgeon.resources import choose_device, peak_memory, require_disk, require_memory
from llm_surgeon.select import Selection
from llm_surgeon.shots import ShotLoop
from llm_surgeon.structures.blocks import BlockLoop
from llm_surgeon.structures.loop import GroupLoop
from llm_surgeon.structures.size import model_size
from llm_surgeon.structures.width import WidthLoop

# Options about a GPU's memory alone.
_GPU_OPTIONS = ("offload", "gpu_memory")


def prune(
    model: nn.Module,
    calibration: Any,
    structure: str = "2:4",
    *,
    config: PruneConfig | None = None,
    correction_data: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneReport:
    """Prune the decoder's linear layers of a causal LM in place.

    Args:
        model: a decoder-only Hugging Face causal LM; computed in the dtype and on the device it is in (float32 is
            recommended: bfloat16 weights round every update).
        calibration: a :class:`~llm_surgeon.data.Calibration`, token ids ``[samples, seqlen]``, or a sequence of
            mappings with ``input_ids`` and, optionally, ``attention_mask``.
        structure: ``"2:4"``, any ``"N:M"``, ``"unstructured"``, ``"rows-columns"`` or ``"groups"`` (a smaller model).
        config: every option at once, in place of ``structure`` and ``options``.
        correction_data: what low-rank corrections (``lora_rank``) learn from, given like ``calibration``, which they
            learn from where it is left out.
        progress: receiver of progress; none by default.
        **options: fields of :class:`PruneConfig`.

    Returns:
        The report: what was removed from which layer, and predicted beside measured loss of every shot.

    Raises:
        InputError: the model, the data or an option is at fault; nothing was changed.
        NumericalError: NaN or infinity was met; the model has its original weights again.
    """
    if config is None:
        config = PruneConfig(structure=structure, **options)
    elif options or structure != "2:4":
        raise InputError("give either config or single options, not both")
    windows = Calibration.of(calibration)
    if correction_data is not None and not config.lora_rank:
        raise InputError("data for low-rank corrections mean nothing without lora_rank")
    samples, seqlen = windows.input_ids.shape
    config = dataclasses.replace(config, samples=samples, seqlen=seqlen)
    decoder = find_decoder(model)
    _check_model(model, decoder, config)
    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    device = compute_device(model, config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"before": model_size(model, windows.input_ids)} if config.pattern.coupled else {}
    loops: dict[str, type[ShotLoop]] = {"groups": GroupLoop, "layers": BlockLoop, "width": WidthLoop}
    kind = loops.get(config.pattern.kind, ShotLoop)
    with _memory_capped(config):
        loop = kind(model, decoder, windows, config, progress or Progress())
        if correction_data is not None:
            loop.correction_data = Calibration.of(correction_data)
        with _restored_on_failure(decoder, offload=config.offload == "cpu") as saved:
            loop.run(before_update=saved)
            loop.finish()
    if sizes:
        sizes["after"] = model_size(model, windows.input_ids)
    return PruneReport(
        config=dataclasses.asdict(config),
        versions=collect_versions(),
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        parameters=parameters,
        started=started,
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak_memory(device),
        layers=_layer_reports(decoder, loop.selections),
        shots=loop.reports,
        sizes=sizes,
        custom_code=hasattr(model, "is_pruned"),
    )


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    config: PruneConfig | None = None,
    *,
    calibration: str = "wikitext2",
    lora_data: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneReport:
    """Prune the checkpoint ``source`` (a folder or hub id) into the new folder ``out``.

    Computes on ``device`` (a GPU where there is one): the weights in the checkpoint's own dtype on a GPU and in float32
    elsewhere, everything else in float32. Writes safetensors in the checkpoint's own dtype
    that load in plain ``AutoModelForCausalLM``, with tokenizer, config, a model card, ``surgeon_report.json`` and
    ``report.html``. ``out`` appears only when it is complete.

    Args:
        calibration: ``"wikitext2"``, ``"c4"`` or a path, see :func:`~llm_surgeon.data.read_text`.
        lora_data: the same for what low-rank corrections learn from (left out: the calibration windows).
        overwrite: replace an ``out`` that is not empty.
        trust_remote_code: run model code that comes with the checkpoint.
        **options: fields of :class:`PruneConfig`, where ``config`` is not given.

    Raises:
        InputError: see :func:`prune`; also for what is wrong with ``source``, ``out``, memory or disk.
    """
    if config is not None and options:
        raise InputError("give either config or single options, not both")
    job = CheckpointJob(
        source,
        out,
        config or PruneConfig(**options),
        calibration=calibration,
        lora_data=lora_data,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        device=device,
    )
    return job.run(progress)


class CheckpointJob:
    """A checkpoint loaded and checked, ready to be pruned: everything that can be refused is refused when built."""

    def __init__(
        self,
        source: str | Path,
        out: str | Path,
        config: PruneConfig,
        *,
        calibration: str,
        lora_data: str | None = None,
        overwrite: bool = False,
        trust_remote_code: bool = False,
        device: str | None = None,
    ) -> None:
        require_bool("overwrite", overwrite)  # "no" in quotes, from a YAML file, must not delete anything
        require_bool("trust_remote_code", trust_remote_code)
        self.source, self.out, self.overwrite = str(source), Path(out), overwrite
        check_output(self.out, self.source, overwrite)
        if lora_data is not None and not config.lora_rank:
            raise InputError("lora_data means nothing without lora_rank")
        text = read_text(str(calibration), "calibration")
        lora_text = None if lora_data is None else read_text(str(lora_data), "calibration")
        self.device = choose_device(device)
        # Options that were given and have no effect without a GPU.
        defaults = {} if self.device.type == "cuda" else {name: getattr(PruneConfig, name) for name in _GPU_OPTIONS}
        self.unused = [name for name, default in defaults.items() if getattr(config, name) != default]
        config = dataclasses.replace(config, **defaults)
        # What is offloaded never lies on the GPU as a whole. A CPU computes faster, and no less exactly, in float32.
        home = torch.device("cpu") if config.offload == "cpu" else self.device
        self.model, self.tokenizer, self.dtype = load_model(
            self.source,
            dtype=None if self.device.type == "cuda" else torch.float32,
            device=home,
            trust_remote_code=trust_remote_code,
        )
        self.config = dataclasses.replace(config, seqlen=choose_seqlen(config.seqlen, self.model))
        assert self.config.seqlen is not None
        self.decoder = find_decoder(self.model)
        _check_model(self.model, self.decoder, self.config)
        shape = self.config.samples, self.config.seqlen, self.config.seed
        self.calibration = calibration_windows(tokenize(text, self.tokenizer), *shape)
        self.correction_data = (
            None if lora_text is None else calibration_windows(tokenize(lora_text, self.tokenizer), *shape)
        )

    def plan(self) -> Plan:
        """How the run would go: memory, disk and time."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return make_plan(self.model, self.decoder, self.config, saved_dtype=self.dtype)

    def run(self, progress: Progress | None = None) -> PruneReport:
        """Prune and write ``out``."""
        plan = self.plan()
        held = 0 if self.config.offload == "cpu" else plan.weights_bytes
        require_memory(plan.memory_bytes - held, plan.device)
        if plan.host_bytes:
            loaded = sum(p.nbytes for p in self.model.parameters() if p.device.type == "cpu")
            require_memory(plan.host_bytes - loaded, "cpu")
        require_disk(self.out, plan.disk_bytes)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            report = prune(
                self.model,
                self.calibration,
                config=self.config,
                correction_data=self.correction_data,
                progress=progress,
            )
        write_pruned(self.model, self.tokenizer, self.out, self.dtype, report, self.source, self.overwrite)
        return report


def write_pruned(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    dtype: torch.dtype,
    report: PruneReport,
    base_model: str,
    overwrite: bool,
) -> None:
    """Write a pruned model with its tokenizer, model card and reports to ``out``, which appears when complete."""
    from llm_surgeon.report.render import render_html, render_model_card  # brings matplotlib: only where it is needed

    save_checkpoint(
        model,
        tokenizer,
        out,
        dtype=dtype,
        extra_files={
            "README.md": render_model_card(report, base_model),
            "surgeon_report.json": report.to_json(),
            "report.html": render_html(report),
        },
        overwrite=overwrite,
    )


def load_for_evaluation(
    source: str,
    data: str,
    seqlen: int | None,
    device: str | None,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Tensor]:
    """The checkpoint ``source``, dense or packed, and the windows of ``data``'s test part, for :func:`perplexity`."""
    text = read_text(data, "evaluation")
    model, tokenizer, _ = load_model(
        source, dtype, choose_device(device), trust_remote_code=trust_remote_code, packed=True
    )
    with evaluation_mode(model):
        check_causal(model)
    return model, evaluation_windows(tokenize(text, tokenizer), choose_seqlen(seqlen, model))


def _check_model(model: Any, decoder: Decoder, config: PruneConfig) -> None:
    check_finite(decoder)
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


@contextmanager
def _restored_on_failure(decoder: Decoder, *, offload: bool) -> Iterator[Callable[[], object]]:
    """Copies of the weights, kept in main memory, are put back if anything is raised.

    They are made while the first pass over the data runs: call what this yields before any weight is changed. With
    ``offload`` they are made before anything else, for weights are about to be moved; what is moved from main memory
    needs none, see :func:`~llm_surgeon.offload.offloaded`.
    """
    parameters = [p for linear in decoder.linears for p in linear.module.parameters(recurse=False)]
    if offload:
        parameters = [parameter for parameter in parameters if parameter.device.type != "cpu"]
    with ThreadPoolExecutor(1) as executor:
        originals = executor.submit(copies_in_main_memory, [parameter.detach() for parameter in parameters])
        if offload:
            originals.result()
        try:
            yield originals.result
        except BaseException:
            for parameter, original in zip(parameters, originals.result(), strict=True):
                parameter.data.copy_(original)
            raise


def _layer_reports(decoder: Decoder, selections: list[Selection]) -> list[LayerReport]:
    return [
        LayerReport(
            name=linear.name,
            kind=linear.kind,
            depth=linear.depth,
            rows=selection.pruned.shape[0],
            columns=selection.pruned.shape[1],
            weights=selection.pruned.numel(),
            removed=int(selection.pruned.sum()),
        )
        for linear, selection in zip(decoder.linears, selections, strict=True)
    ]
