"""Prune a checkpoint into a new checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.checkpoint import (
    Output,
    StoredForm,
    check_output,
    checkpoint_bytes,
    claimed_output,
    load_model,
    require_model,
    save_checkpoint,
    weights_bytes,
)
from llm_surgeon.checkpoint.output_checks import output_path
from llm_surgeon.checkpoint.run_states import RunStates, states_left
from llm_surgeon.checks import parse_bytes, require_bool, require_int
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.documents import read_documents
from llm_surgeon.data.record import too_little_text
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.errors import InputError
from llm_surgeon.evaluation.continuation import continuations
from llm_surgeon.jobs.kept_run import finished, kept_run, own_report, require_own, states_folder
from llm_surgeon.jobs.recovery_after import RecoveryAfter, check_minutes
from llm_surgeon.jobs.targets import check_targets
from llm_surgeon.jobs.windows import draw_windows
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.limits import choose_seqlen
from llm_surgeon.planning.plan import Plan, make_plan
from llm_surgeon.progress import Progress
from llm_surgeon.pruning import prune
from llm_surgeon.report.schema import PruneReport, Sample
from llm_surgeon.resources import (
    choose_device,
    gpu_memory_capped,
    human_bytes,
    process_memory,
    require_disk,
    require_memory,
)
from llm_surgeon.shots.checks import checked, require_shareable
from llm_surgeon.shots.resume import require_same_run, states_bytes
from llm_surgeon.shots.run import Run
from llm_surgeon.shots.sensitivity import sparsity_for

_logger = logging.getLogger(__name__)

# Options about a GPU's memory alone.
_GPU_OPTIONS = ("offload", "gpu_memory")
# Continuations that are shown unless their number is given, and at most; tokens of a prompt and of what follows.
_SAMPLES, _MOST_SAMPLES, _PROMPT, _CONTINUATION = 3, 64, 32, 24


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    config: PruneConfig | None = None,
    *,
    calibration: str = "wikitext2",
    lora_data: str | None = None,
    eval_data: str | None = None,
    samples_shown: int | None = None,
    text_field: str | None = None,
    recover_minutes: float | None = None,
    target_size: str | int | None = None,
    target_loss: float | None = None,
    config_file: str | Path | None = None,
    checkpoint: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    device: str | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    **options: Any,
) -> PruneReport:
    """Prune the checkpoint ``source`` (a folder or hub id) into the new folder ``out``.

    Computes on ``device`` (a GPU where there is one): the weights in the checkpoint's own dtype on a GPU and in float32
    elsewhere, everything else in float32, but for ``compute_dtype``. Writes safetensors in the checkpoint's own dtype
    that load in plain ``AutoModelForCausalLM``, with tokenizer, config, a model card, ``surgeon_report.json`` and
    ``report.html``. ``out`` appears only when it is complete. The losses before and after are also measured on windows
    of the calibration text that are held out, see :func:`llm_surgeon.data.held_out.split`.

    Args:
        calibration: ``"wikitext2"``, ``"c4"``, a data set of the hub or a path, see
            :func:`~llm_surgeon.data.documents.read_documents`.
        lora_data: the same for what low-rank corrections learn from (left out: the calibration windows).
        eval_data: the same for a text that the losses are also measured on, up to 16 windows of its test part.
        samples_shown: texts, of what is held out or ``eval_data``, whose continuations before and after are reported
            (left out: 3, with ``offload`` none).
        text_field: the field of their rows to read (left out: chosen by the file's fields).
        recover_minutes: then train what is left, for so many minutes, by distillation from ``source`` on the
            calibration text, without what is held out. ``out`` holds the pruned model until that is done, and if it
            fails.
        target_size: in place of a sparsity, bytes that the weights of a smaller model may take on disk, ``"5GB"`` say.
        target_loss: in place of a sparsity, the most that the loss is predicted to rise by, see
            :func:`~llm_surgeon.shots.sensitivity.sparsity_for`; of single weights without a pattern.
        config_file: the file that options came from, which ``out`` must not replace.
        checkpoint: keep what is done in the folder ``.OUT.pruning`` beside ``out`` until all of it is.
        resume: go on with what an interrupted run left there, if anything, see :func:`prune`.
        overwrite: replace an ``out`` that is not empty.
        trust_remote_code: run model code that comes with the checkpoint.
        command: the command line, word by word, for the report.
        ranks: processes that share the run, see :func:`llm_surgeon.distributed.group.joined`: the first one writes.
        **options: fields of :class:`PruneConfig`, where ``config`` is not given.

    Raises:
        InputError: see :func:`prune`; also for what is wrong with ``source``, ``out``, memory or disk.
    """
    config = PruneConfig.given(config, options)
    data = {"calibration": calibration, "lora_data": lora_data, "eval_data": eval_data}
    inputs = {"model": source, "config_file": config_file, **data}
    _require_resumable(checkpoint, resume)
    chosen = {"sparsity"} if target_size is not None or target_loss is not None else set()
    own = (
        resume and ranks.first and require_own(out, source, config, data, chosen)
    )  # what is to be recovered still, or done
    done = finished(out, recovers=recover_minutes is not None) if own else None
    if (done := ranks.agreed(done)) is not None:
        return done
    with ExitStack() as stack:
        output, states = None, RunStates()
        if ranks.first:
            output = stack.enter_context(claimed_output(out, overwrite or own, **inputs))
            states = stack.enter_context(kept_run(output, resume, checkpoint))
        ranks.agreed(None)  # nobody goes on where the output cannot be had
        job = PruneJob(
            source,
            config,
            calibration=calibration,
            lora_data=lora_data,
            eval_data=eval_data,
            samples_shown=samples_shown,
            text_field=text_field,
            recover_minutes=recover_minutes,
            target_size=target_size,
            target_loss=target_loss,
            trust_remote_code=trust_remote_code,
            device=device,
            ranks=ranks,
        )
        return job.run(output, progress, command, states)


def planned_job(
    source: str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    calibration: str = "wikitext2",
    lora_data: str | None = None,
    eval_data: str | None = None,
    config_file: str | Path | None = None,
    checkpoint: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> tuple[PruneJob, bool]:
    """The job of :func:`prune_checkpoint`, whose arguments these are, and whether it would go on with another run.

    Nothing is written, pruned or cleared up, and what would be refused is.

    Args:
        **options: further ones of :class:`PruneJob`.
    """
    data = {"calibration": calibration, "lora_data": lora_data, "eval_data": eval_data}
    _require_resumable(checkpoint, resume)
    if options.get("target_loss") is not None:
        raise InputError("target_loss takes a pass over the data, which a dry run makes none of: give a sparsity")
    chosen = set() if options.get("target_size") is None else {"sparsity"}
    own = resume and require_own(out, source, config, data, chosen)
    check_output(out, overwrite or own, model=source, config_file=config_file, **data)
    folder = states_folder(output_path(out))
    left = checkpoint and bool(states_left(folder, resume))
    job = PruneJob(source, config, calibration=calibration, lora_data=lora_data, eval_data=eval_data, **options)
    run = job.to_run()  # plans it, which all ranks do together
    if left:
        require_same_run(run, folder)
    return job, left or own


def _require_resumable(checkpoint: bool, resume: bool) -> None:
    require_bool("checkpoint", checkpoint)
    require_bool("resume", resume)
    if resume and not checkpoint:
        raise InputError("resume means nothing without checkpoint")


class PruneJob:
    """A checkpoint loaded and checked, ready to be pruned: everything that can be refused is refused when built.

    Attributes:
        source: the folder or hub id.
        config: the options, all of them resolved.
        ranks: that share it.
        device: where it will run.
        model, tokenizer, form: see :func:`~llm_surgeon.checkpoint.load_model`.
        decoder: of the model.
        windows: the data.
        recovery: the training that follows, where there is one.
    """

    def __init__(
        self,
        source: str | Path,
        config: PruneConfig,
        *,
        calibration: str,
        lora_data: str | None = None,
        eval_data: str | None = None,
        samples_shown: int | None = None,
        text_field: str | None = None,
        recover_minutes: float | None = None,
        target_size: str | int | None = None,
        target_loss: float | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        require_bool("trust_remote_code", trust_remote_code)
        if lora_data is not None and not config.lora_rank:
            raise InputError("lora_data means nothing without lora_rank")
        if samples_shown is not None:
            require_int("samples_shown", samples_shown, 0, _MOST_SAMPLES)
        if text_field is not None and not isinstance(text_field, str):
            raise InputError(f"text_field must be text, not {text_field!r}")
        if recover_minutes is not None:
            check_minutes(recover_minutes, config)
        require_shareable(config, ranks.count)
        check_targets(config, target_size, target_loss, ranks)
        self._target_loss = target_loss
        self.source, self._trust_remote_code = str(source), trust_remote_code
        require_model(self.source)
        sources = {"calibration": calibration, "lora_data": lora_data, "eval_data": eval_data}
        texts = {
            name: read_documents(str(data), "evaluation" if name == "eval_data" else "calibration", text_field)
            for name, data in sources.items()
            if data is not None
        }
        self.ranks, self.device = ranks, ranks.device or choose_device(device)
        self._load(config, trust_remote_code, target_size)
        self.windows = draw_windows(texts, self.model, self.tokenizer, self.config)
        if samples_shown and self.config.offloads:
            raise InputError("samples_shown needs the whole model on one device: leave offload out")
        self._samples_shown = (0 if self.config.offloads else _SAMPLES) if samples_shown is None else samples_shown
        self._dense_bytes = weights_bytes(self.model, self.form)
        self.recovery: RecoveryAfter | None = None
        if recover_minutes is not None:
            windows = self.windows
            self.recovery = RecoveryAfter(
                recover_minutes,
                self.config,
                self.model,
                self.tokenizer,
                text=windows.text,
                sha256=windows.digest,
                ids=windows.ids,
                apart=windows.apart,
                held_out=windows.held_out,
                ranks=ranks,
            )

    def _load(self, config: PruneConfig, trust_remote_code: bool, target_size: str | int | None) -> None:
        """Load the model where ``config`` wants it, and resolve what depends on it."""
        on_gpu = self.device.type == "cuda"
        for name in () if on_gpu else _GPU_OPTIONS:
            default = getattr(PruneConfig, name)
            if getattr(config, name) != default:
                _logger.warning("--%s has no effect: this runs on %s, no GPU", name.replace("_", "-"), self.device)
                config = dataclasses.replace(config, **{name: default})
        # What is offloaded never lies on the GPU as a whole. A CPU computes faster, and no less exactly, in float32.
        self.ranks.meet()  # what one of them has loaded another would not find free
        self.model, self.tokenizer, self.form = load_model(
            self.source,
            dtype=None if on_gpu else torch.float32,
            device=torch.device("cpu") if config.offloads else self.device,
            trust_remote_code=trust_remote_code,
            processes=self.ranks.on_machine,
        )
        config = dataclasses.replace(config, seqlen=choose_seqlen(config.seqlen, self.model))
        if target_size is not None:
            config = dataclasses.replace(config, sparsity=self._sparsity_for(parse_bytes(target_size)))
        self.model, self.decoder, self.config = checked(self.model, config)

    def _sparsity_for(self, size: int) -> float:
        """Share of the decoder's linear weights without which the stored weights take ``size`` bytes."""
        whole, linears = weights_bytes(self.model, self.form), find_decoder(self.model).linears
        weights = [linear.module.get_parameter("weight") for linear in linears]
        parts = sum(weight.numel() for weight in weights) * self.form.main.itemsize
        if not 0 < whole - size < parts:
            least, most = map(human_bytes, (whole - parts, whole))
            raise InputError(
                f"target_size {human_bytes(size)} must lie between {least} and {most}, what the model takes"
            )
        return (whole - size) / parts

    def removal(self) -> str:
        """Say what goes, with the numbers of the run.

        Raises:
            InputError: the model cannot become smaller as asked, as :meth:`run` would.
        """
        return self.config.structure_record.shot_class(self.to_run()).removal()

    def to_run(self) -> Run:
        """The run as its shots would see it at first."""
        windows = self.windows
        return Run(
            self.model,
            self.decoder,
            dataclasses.replace(windows.calibration, ranks=self.ranks),
            self.config,
            self.plan,
            correction_data=windows.correction,
            held_out=windows.held_out,
            step_windows=windows.steps,
            evaluation=windows.evaluation,
        )

    @contextmanager
    def measuring(self, progress: Progress | None = None) -> Iterator[Run]:
        """Context manager of the run on its device, for measurements that change nothing; there is memory for it.

        Raises:
            InputError: there is not.
        """
        self._require_resources(None, RunStates())
        with self._on_device(), gpu_memory_capped(self.config.gpu_memory_bytes):
            yield dataclasses.replace(self.to_run(), progress=progress or Progress())

    @cached_property
    def plan(self) -> Plan:
        """Plan of the run: layout, memory, disk and time."""
        measured = [windows for windows in (self.windows.held_out, self.windows.evaluation) if windows is not None]
        with self._on_device():
            plan = make_plan(
                self.model,
                self.decoder,
                self.config,
                saved_dtype=self.form.main,
                held_out=sum(len(windows.input_ids) for windows in measured) + self._sampled_windows,
                recovery=None if self.recovery is None else self.recovery.config,
                ranks=self.ranks,
            )
        written = 1 if self.recovery is None else 2  # the pruned one until the other is complete
        return dataclasses.replace(plan, disk_bytes=written * checkpoint_bytes(self.model, self.tokenizer, self.form))

    def run(
        self,
        output: Output | None,
        progress: Progress | None = None,
        command: Sequence[str] = (),
        states: RunStates | None = None,
    ) -> PruneReport:
        """Prune, and write to the claimed ``output``, on the first rank; ``states`` keep what is done."""
        states = states or RunStates()
        self._require_resources(output, states)
        if progress is not None:
            progress.expect(self.plan.seconds)
        windows, prompts = self.windows, self._prompts()
        if self._target_loss is not None:
            with self.measuring(progress) as run:
                sparsity, increase = sparsity_for(run, self._target_loss)
            _logger.info("%g%% of the weights are predicted to cost %.3g nats per token", 100 * sparsity, increase)
            self.config = dataclasses.replace(self.config, sparsity=sparsity)
        with self._on_device():
            before = self._continuations(prompts)
            report = prune(
                self.model,
                windows.calibration,
                config=self.config,
                correction_data=windows.correction,
                held_out=windows.held_out,
                step_windows=windows.steps,
                evaluation=windows.evaluation,
                plan=self.plan,
                progress=progress,
                checkpoint=states,
                ranks=self.ranks,
            )
        if windows.held_out is None and windows.evaluation is None:
            report.warnings.append(
                f"No text was held out, as {windows.tokens:,} tokens are fewer than 8 windows of {self.config.seqlen}: "
                "the losses are those on the calibration windows alone."
            )
        report.command = list(command)
        report.data, report.revision = windows.records, getattr(self.model.config, "_commit_hash", None)
        report.warnings += filter(None, map(too_little_text, windows.records.values()))
        report.disk = {"before": self._dense_bytes, "after": weights_bytes(self.model, self.form)}
        if report.config["offload"] == "none":  # which memory may have brought about
            with self._on_device():
                ids = prompts, before, self._continuations(prompts)
            decoded = ([self.tokenizer.decode(row, skip_special_tokens=True) for row in each] for each in ids)
            report.samples = [Sample(*each) for each in zip(*decoded, strict=True)]
        written = None if output is None or not states.keeps else own_report(output.path)
        if written is None and output is not None:
            states.put_report(report.to_json())
            write_pruned(self.model, self.tokenizer, output, self.form, report, self.source)
        report = written or report
        if self.recovery is not None:
            with self._on_device(), gpu_memory_capped(self.config.gpu_memory_bytes):
                told = self.recovery.run(
                    self.source,
                    self.model,
                    self.tokenizer,
                    self.form,
                    output,
                    windows_at_once=self.plan.recovery_windows,
                    device=self.device,
                    trust_remote_code=self._trust_remote_code,
                    evaluation=None
                    if windows.evaluation is None
                    else (windows.records["eval_data"].source, windows.evaluation),
                    progress=progress,
                )
            report.history.append(told)
        return report

    @property
    def _sampled_windows(self) -> int:
        """As many tokens as the passes of continuations go through, in windows."""
        count, tokens = self._prompts().shape
        more = min(_CONTINUATION, self.config.seqlen - tokens)
        return -(-count * more * (tokens + more // 2) // self.config.seqlen)

    def _prompts(self) -> Tensor:
        """Beginnings of windows that are not fitted to, ``[samples_shown, tokens]``."""
        source = self.windows.evaluation or self.windows.held_out
        if source is None:
            return torch.empty(0, 0, dtype=torch.int64)
        return source.input_ids[: self._samples_shown, : min(_PROMPT, self.config.seqlen // 2)]

    def _continuations(self, prompts: Tensor) -> Tensor:
        if not len(prompts):
            return prompts
        return continuations(self.model, prompts, min(_CONTINUATION, self.config.seqlen - prompts.shape[1]))

    @property
    def states_bytes(self) -> tuple[int, int]:
        """Bytes of disk and of main memory that the states of the run take while it goes on, at most."""
        return states_bytes(self.model, self.decoder, self.config)

    def _require_resources(self, output: Output | None, states: RunStates) -> None:
        """Raise :class:`InputError` where memory or disk are too small for the plan."""
        plan, processes = self.plan, self.ranks.on_machine
        held = 0 if self.config.offloads else plan.weights_bytes
        if plan.device.type == "cpu":  # the plan is of the whole process
            held = process_memory()
        self.ranks.meet()  # all have loaded the model
        require_memory(plan.memory_bytes - held, plan.device, processes=processes)
        cap = self.config.gpu_memory_bytes
        if cap is not None and plan.memory_bytes > cap:
            raise InputError(
                f"about {human_bytes(plan.memory_bytes)} of memory are needed on {plan.device} and gpu_memory allows "
                f"{human_bytes(cap)}: {'offload cpu' if self.recovery is None else 'no recover_minutes'} takes less"
            )
        host = 0
        if plan.host_bytes:
            host = plan.host_bytes - sum(p.nbytes for p in self.model.parameters() if p.device.type == "cpu")
            require_memory(host, "cpu", processes=processes)
        if output is None:
            return
        require_disk(output.path, plan.disk_bytes)
        if states.keeps:
            disk, memory = self.states_bytes
            try:
                require_disk(output.path, plan.disk_bytes + disk - states.nbytes)
                of_each = plan.memory_bytes - held if plan.device.type == "cpu" else host
                require_memory(memory + processes * of_each, "cpu")
            except InputError as error:
                raise InputError(f"{error}, with what is kept for --resume: --no-checkpoint does without") from error

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def write_pruned(
    model: nn.Module, tokenizer: Any, output: Output, form: StoredForm, report: PruneReport, base_model: str
) -> None:
    """Write a pruned model with its tokenizer, model card and reports to ``output``, which appears when complete."""
    from llm_surgeon.report.render import render_html, render_model_card  # brings matplotlib: only where it is needed

    files = {
        "README.md": render_model_card(report, base_model),
        "surgeon_report.json": report.to_json(),
        "report.html": render_html(report),
    }
    save_checkpoint(model, tokenizer, output, dtype=form, extra_files=files)
