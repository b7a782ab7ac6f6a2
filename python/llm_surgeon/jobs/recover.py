"""Recover a checkpoint into a new checkpoint."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.checkpoint import claimed_output, load_model, require_model
from llm_surgeon.checkpoint.begun import claim, contents
from llm_surgeon.checkpoint.output_checks import output_path
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration, evaluation_windows, require_room
from llm_surgeon.data.documents import Documents, read_documents
from llm_surgeon.data.record import DataRecord, data_record
from llm_surgeon.data.tokens import token_stream
from llm_surgeon.data.training import MOST_ROUNDS, training_windows
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.errors import InputError
from llm_surgeon.jobs.derived import Derived
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.limits import choose_seqlen
from llm_surgeon.progress import Progress
from llm_surgeon.recovery.recover import RecoveryReport, recover
from llm_surgeon.recovery.state import finished, note_report
from llm_surgeon.report.format import perplexity_of, plural, published_name, two_decimals
from llm_surgeon.resources import choose_device

_logger = logging.getLogger(__name__)

# Of the text at most; there is always one window.
_HELD_OUT_FRACTION = 0.02
# Epochs are usual where a model is trained: more are said to be much.
_USUAL_EPOCHS = MOST_ROUNDS + 1


def recover_checkpoint(
    source: str | Path,
    out: str | Path,
    config: RecoverConfig | None = None,
    *,
    teacher: str | Path | None = None,
    data: str = "wikitext2",
    text_field: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    **options: Any,
) -> RecoveryReport:
    """Recover the checkpoint ``source`` into the new folder ``out``, which appears when it is complete.

    Trains in float32 (bfloat16 products on a GPU) on ``data``'s training part, of which the last fiftieth is held out.
    The state of the training lies beside ``out`` until it is done: after an interruption, ``resume=True`` goes on.

    Args:
        teacher: the dense checkpoint to distil from.
        data, text_field: as for :func:`~llm_surgeon.data.documents.read_documents`.
        ranks: processes that share the training, see :func:`llm_surgeon.distributed.group.joined`: the first one keeps
            its state and writes.
        **options: fields of :class:`RecoverConfig`, where ``config`` is not given.

    Raises:
        InputError: see :func:`recover`; also for what is wrong with ``source``, ``out`` or ``data``.
    """
    if config is not None and options:
        raise InputError("give either config or single options, not both")
    config = config or RecoverConfig.from_mapping(options)
    target = output_path(out)
    state = target.with_name(f".{target.name}.training")
    done = ranks.agreed(finished(state, target) if resume and ranks.first else None)
    if done is not None:
        if ranks.first:
            _logger.warning("the recovery into %r was complete already: its training state is removed", str(out))
            shutil.rmtree(state, ignore_errors=True)  # or by the process that is about to end
            with suppress(InputError), claimed_output(out, True):  # that process may hold the claim
                pass  # what else lies beside OUT is cleared up
        return RecoveryReport.from_json(done)
    with ExitStack() as stack:
        output = None
        if ranks.first:
            output = stack.enter_context(claimed_output(out, overwrite, model=source, teacher=teacher, data=data))
            if state.exists() and not resume:
                raise InputError(
                    f"{str(state)!r} holds an interrupted recovery into {str(out)!r}: pass --resume or delete it"
                )
        ranks.agreed(None)  # nobody goes on where the output cannot be had
        require_model(str(source))
        documents = read_documents(data, "calibration", text_field)
        place = ranks.device or choose_device(device)
        made = Derived.load(source, output, dtype=torch.float32, device=place, trust_remote_code=trust_remote_code)
        dense = None if teacher is None else load_teacher(teacher, made.tokenizer, place, trust_remote_code)
        limit = choose_seqlen(None, made.model)
        config = replace(config, seqlen=choose_seqlen(config.seqlen or min(512, limit), made.model))
        if config.minutes is None:
            require_room(config.steps * config.batch_size, config.seqlen)
        ids, digest = token_stream(documents, made.tokenizer)
        windows, held_out = (Calibration(each, ranks=ranks) for each in _split(ids, config))
        record = training_record(documents, made.tokenizer, digest, ids, windows.input_ids)
        run = {"source": str(source), "teacher": teacher and str(teacher), "data": data, **asdict(config)}
        if ranks.first:
            made.require_disk(_state_bytes(made.model, config, state))
            claim(state, run, contents(model=made.model, teacher=dense, data=ids), "recovery")
        ranks.agreed(None)
        try:
            report = recover(
                made.model, windows, held_out, teacher=dense, config=config, state_folder=state, resume=resume,
                progress=progress,
            )  # fmt: skip
        except BaseException:
            if ranks.first and not any(state.glob("checkpoint-*.pt")):
                shutil.rmtree(state)  # nothing to go on from
            raise
        report = replace(report, data={"training": record})
        if ranks.first:
            note_report(state, report.to_json())
            if progress is not None:
                progress.phase("writing")
            text = recovery_text(config, report, data, run["teacher"])
            made.save("recovered", text, files={"surgeon_recovery.json": report.to_json()})
            shutil.rmtree(state)
    return report


def load_teacher(teacher: str | Path, tokenizer: Any, place: torch.device, trust_remote_code: bool) -> nn.Module:
    """The frozen dense model; :class:`InputError` where its tokenizer is not ``tokenizer``."""
    half = torch.bfloat16 if place.type == "cuda" else torch.float32
    dense, its_own, _ = load_model(teacher, dtype=half, device=place, trust_remote_code=trust_remote_code)
    if its_own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"the teacher {str(teacher)!r} has another tokenizer than the model")
    return dense.requires_grad_(False)


def recovery_text(config: RecoverConfig, report: RecoveryReport, data: str, teacher: str | None) -> str:
    """Section of the model card on what a recovery did; of paths in ``data`` and ``teacher`` the last parts show."""
    before, after = (two_decimals(perplexity_of(loss)) for loss in (report.loss_before, report.loss_after))
    trained = "low-rank corrections were trained and merged" if config.lora else "all weights were trained"
    taught = "" if teacher is None else f", distilling from `{published_name(teacher)}`"
    kept = f"; all {plural(report.zeros, 'zero')} stayed" if report.zeros else ""
    return (
        f"After pruning {trained} for {plural(report.steps, 'step')} on {plural(report.tokens, 'token')} of "
        f"`{published_name(data)}`{taught}{kept}. Perplexity on held-out text of the same source: {before} before the "
        f"recovery, {after} after it. Other figures are of the model before that."
    )


def _state_bytes(model: nn.Module, config: RecoverConfig, state: Path) -> int:
    """Bytes that the training state will still take: three times weights, their best and mean, two moments, float32."""
    trained = sum(parameter.numel() for parameter in model.parameters())
    if config.lora:
        linears = find_decoder(model).linears
        trained = config.rank * sum(linear.rows + linear.columns for linear in linears)
    there = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    return max(0, 3 * (4 + bool(config.ema)) * 4 * trained - there)


def _split(ids: Tensor, config: RecoverConfig) -> tuple[Tensor, Tensor]:
    """Training windows of the stream ``ids``, held-out windows from its end."""
    wanted = max(1, min(config.held_out_windows, int(_HELD_OUT_FRACTION * len(ids)) // config.seqlen))
    cut = len(ids) - wanted * config.seqlen
    if cut < config.seqlen:
        raise InputError(f"the text has {len(ids)} tokens: training and held-out data need {2 * config.seqlen}")
    return windows_for(config, ids[:cut]).input_ids, evaluation_windows(ids[cut:], config.seqlen)


def training_record(documents: Documents, tokenizer: Any, sha256: str, ids: Tensor, windows: Tensor) -> DataRecord:
    """The record of the training windows that :func:`windows_for` gave."""
    return data_record(documents, tokenizer, sha256, ids, windows, passes=_USUAL_EPOCHS)


def windows_for(config: RecoverConfig, ids: Tensor, apart: Tensor | None = None) -> Calibration:
    """Training windows of the stream ``ids``: enough for all steps, or of minutes some rounds to go through again."""
    count, rounds = config.steps * config.batch_size, None if config.minutes is None else MOST_ROUNDS
    return training_windows(ids, count, config.seqlen, config.seed, apart=apart, rounds=rounds)
