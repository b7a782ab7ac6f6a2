"""Prune a checkpoint into a new checkpoint."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_surgeon.checkpoint import (
    StoredForm,
    check_output,
    checkpoint_bytes,
    claimed_output,
    load_model,
    require_model,
    save_checkpoint,
)
from llm_surgeon.checks import require_bool
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import calibration_windows, require_room, token_stream
from llm_surgeon.data.documents import read_documents
from llm_surgeon.data.held_out import split
from llm_surgeon.data.record import data_record, too_little_text
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.limits import choose_seqlen, require_fit
from llm_surgeon.planning.plan import make_plan
from llm_surgeon.planning.result import Plan
from llm_surgeon.progress import Progress
from llm_surgeon.pruning import check_model, prune
from llm_surgeon.report.schema import PruneReport
from llm_surgeon.resources import choose_device, human_bytes, process_memory, require_disk, require_memory
from llm_surgeon.shots.runner import Run

# Options about a GPU's memory alone.
_GPU_OPTIONS = ("offload", "gpu_memory")


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    config: PruneConfig | None = None,
    *,
    calibration: str = "wikitext2",
    lora_data: str | None = None,
    text_field: str | None = None,
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
    ``report.html``. ``out`` appears only when it is complete. The losses before and after are also measured on windows
    of the calibration text that are held out, see :func:`llm_surgeon.data.held_out.split`.

    Args:
        calibration: ``"wikitext2"``, ``"c4"``, a data set of the hub or a path, see
            :func:`~llm_surgeon.data.documents.read_documents`.
        lora_data: the same for what low-rank corrections learn from (left out: the calibration windows).
        text_field: the field of both's rows to read (left out: chosen by the file's fields).
        overwrite: replace an ``out`` that is not empty.
        trust_remote_code: run model code that comes with the checkpoint.
        **options: fields of :class:`PruneConfig`, where ``config`` is not given.

    Raises:
        InputError: see :func:`prune`; also for what is wrong with ``source``, ``out``, memory or disk.
    """
    if config is not None and options:
        raise InputError("give either config or single options, not both")
    with claimed_output(out, overwrite, model=source, calibration=calibration, lora_data=lora_data):
        job = CheckpointJob(
            source,
            out,
            config or PruneConfig.from_mapping(options),
            calibration=calibration,
            lora_data=lora_data,
            text_field=text_field,
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
        config_file: str | Path | None = None,
        text_field: str | None = None,
        overwrite: bool = False,
        trust_remote_code: bool = False,
        device: str | None = None,
    ) -> None:
        require_bool("trust_remote_code", trust_remote_code)
        self.source, self.out, self.overwrite = str(source), Path(out), overwrite
        self.command: list[str] = []  # the command line, where there is one, for the report
        self._inputs = {
            "model": self.source, "calibration": calibration, "lora_data": lora_data, "config_file": config_file,
        }  # fmt: skip
        check_output(self.out, overwrite, **self._inputs)
        if lora_data is not None and not config.lora_rank:
            raise InputError("lora_data means nothing without lora_rank")
        if text_field is not None and not isinstance(text_field, str):
            raise InputError(f"text_field must be text, not {text_field!r}")
        require_model(self.source)
        sources = {"calibration": calibration} | ({} if lora_data is None else {"lora_data": lora_data})
        texts = {name: read_documents(str(data), "calibration", text_field) for name, data in sources.items()}
        self.device = choose_device(device)
        # Options that were given and have no effect without a GPU.
        defaults = {} if self.device.type == "cuda" else {name: getattr(PruneConfig, name) for name in _GPU_OPTIONS}
        self.unused = [name for name, default in defaults.items() if getattr(config, name) != default]
        config = dataclasses.replace(config, **defaults)
        # What is offloaded never lies on the GPU as a whole. A CPU computes faster, and no less exactly, in float32.
        home = torch.device("cpu") if config.offload == "cpu" else self.device
        self.model, self.tokenizer, self.form = load_model(
            self.source,
            dtype=None if self.device.type == "cuda" else torch.float32,
            device=home,
            trust_remote_code=trust_remote_code,
        )
        self.config = dataclasses.replace(config, seqlen=choose_seqlen(config.seqlen, self.model))
        self.decoder = find_decoder(self.model)
        check_model(self.model, self.decoder, self.config)
        shots = self.config.pattern.count_shots(self.decoder, self.config)
        self.config = dataclasses.replace(self.config, shots=shots)
        assert self.config.seqlen is not None
        shape = self.config.samples, self.config.seqlen, self.config.seed
        require_room(self.config.samples, self.config.seqlen)
        streams = {name: token_stream(text, self.tokenizer) for name, text in texts.items()}
        ids, digest = streams["calibration"]
        self.tokens = len(ids)
        self.calibration, self.held_out = split(ids, *shape)
        windows, self.correction_data = {"calibration": self.calibration}, None
        if lora_data is not None:
            more, other = streams["lora_data"]
            # The same text: then nothing that is held out is learned from.
            self.correction_data = self.calibration if digest == other else calibration_windows(more, *shape)
            windows["lora_data"] = self.correction_data
        self.data = {}
        for name, each in windows.items():
            require_fit(each.input_ids, self.model, f"the tokens of {name}")
            stream, digest = streams[name]
            self.data[name] = data_record(texts[name], self.tokenizer, digest, stream, each.input_ids)

    def removal(self) -> str:
        """What goes, in words, the numbers those of the run.

        Raises:
            InputError: the model cannot become smaller as asked, as :meth:`run` would.
        """
        run = Run(self.model, self.decoder, self.calibration, self.config, self.plan)
        return self.config.pattern.shot_class(run).removal()

    @cached_property
    def plan(self) -> Plan:
        """How the run would go: memory, disk and time."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            held_out = 0 if self.held_out is None else len(self.held_out.input_ids)
            plan = make_plan(self.model, self.decoder, self.config, saved_dtype=self.form.main, held_out=held_out)
        return dataclasses.replace(plan, disk_bytes=checkpoint_bytes(self.model, self.tokenizer, self.form))

    def run(self, progress: Progress | None = None) -> PruneReport:
        """Prune and write ``out``."""
        with claimed_output(self.out, self.overwrite, **self._inputs):
            return self._run(progress)

    def _run(self, progress: Progress | None) -> PruneReport:
        plan = self.plan
        held = 0 if self.config.offload == "cpu" else plan.weights_bytes
        if plan.device.type == "cpu":  # the plan is of the whole process
            held = process_memory()
        require_memory(plan.memory_bytes - held, plan.device)
        cap = self.config.gpu_memory_bytes
        if cap is not None and plan.memory_bytes > cap:
            raise InputError(
                f"about {human_bytes(plan.memory_bytes)} of memory are needed on {plan.device} and gpu_memory allows "
                f"{human_bytes(cap)}: offload 'cpu' takes less"
            )
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
                held_out=self.held_out,
                plan=plan,
                progress=progress,
            )
        if self.held_out is None:
            report.warnings.append(
                f"No text was held out, as {self.tokens:,} tokens are fewer than 8 windows of {self.config.seqlen}: "
                "the losses are those on the calibration windows alone."
            )
        report.command = self.command
        report.data, report.revision = self.data, getattr(self.model.config, "_commit_hash", None)
        report.warnings += filter(None, map(too_little_text, self.data.values()))
        write_pruned(self.model, self.tokenizer, self.out, self.form, report, self.source, self.overwrite)
        return report


def write_pruned(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    form: StoredForm,
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
        dtype=form,
        extra_files={
            "README.md": render_model_card(report, base_model),
            "surgeon_report.json": report.to_json(),
            "report.html": render_html(report),
        },
        overwrite=overwrite,
    )
