"""Windows that a pruning reads of its texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.data.calibration import Calibration, calibration_windows, evaluation_windows, require_room
from llm_surgeon.data.documents import Documents
from llm_surgeon.data.held_out import further, split, spread
from llm_surgeon.data.record import DataRecord, data_record
from llm_surgeon.data.tokens import token_stream
from llm_surgeon.errors import InputError
from llm_surgeon.methods.gradient_steps import HELD_OUT
from llm_surgeon.models.limits import require_fit


@dataclass(frozen=True)
class JobWindows:
    """Token sequences that a run reads of its texts.

    Attributes:
        steps: what the lengths of gradient steps are found on, where they are asked for and the text is long enough.
        correction: what low-rank corrections learn from, where they have a text of their own.
        evaluation: what losses are measured on besides, where there is a text for it.
        text, ids, digest: the calibration text, its tokens ``[tokens]`` and the SHA-256 of its characters.
        apart: bool ``[tokens]``, True at those that are held out.
        records: of the texts, by their use.
    """

    calibration: Calibration
    held_out: Calibration | None
    steps: Calibration | None
    correction: Calibration | None
    evaluation: Calibration | None
    text: Documents
    ids: Tensor
    digest: str
    apart: Tensor
    records: dict[str, DataRecord]

    @property
    def tokens(self) -> int:
        return len(self.ids)


def draw_windows(texts: Mapping[str, Documents], model: nn.Module, tokenizer: Any, config: PruneConfig) -> JobWindows:
    """Draw the windows from the text ``"calibration"`` and, where they are, from ``"lora_data"`` and ``"eval_data"``.

    Raises:
        InputError: a text is too short, or the model lacks tokens or positions.
    """
    shape = config.samples, config.seqlen, config.seed
    require_room(config.samples, config.seqlen)
    streams = {name: token_stream(text, tokenizer) for name, text in texts.items()}
    ids, digest = streams["calibration"]
    calibration, held_out, apart = split(ids, *shape)
    further_samples = config.gradient_samples or max(1, round(HELD_OUT * config.samples))
    steps = further(ids, *shape, further_samples) if config.gradient_steps else None
    found = 0 if steps is None else len(steps.input_ids)
    if config.gradient_samples is not None and found < config.gradient_samples:
        raise InputError(
            f"gradient_samples {config.gradient_samples} need more text: beside the other windows it has {found} of "
            f"{config.seqlen} tokens"
        )
    windows = {"calibration": calibration}
    if "lora_data" in streams:
        more, other = streams["lora_data"]
        # The same text: then nothing that is held out is learned from.
        windows["lora_data"] = calibration if digest == other else calibration_windows(more, *shape)
    if "eval_data" in streams:
        windows["eval_data"] = Calibration(spread(evaluation_windows(streams["eval_data"][0], config.seqlen)))
    records = {}
    for name, each in windows.items():
        require_fit(each.input_ids, model, f"the tokens of {name}")
        stream, its_digest = streams[name]
        records[name] = data_record(texts[name], tokenizer, its_digest, stream, each.input_ids)
    others = windows.get("lora_data"), windows.get("eval_data")
    return JobWindows(calibration, held_out, steps, *others, texts["calibration"], ids, digest, apart, records)
