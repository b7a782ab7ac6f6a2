"""Perplexity of pruned models after each of several recoveries of them.

    python -m bench.end_to_end.recover MODEL '{"update": "sequential"}' FOLDER --data wikitext-2.zip --other c4.zip
    python -m bench.end_to_end.recover MODEL '{"method": "sparsegpt"}' --tokens tokens.npz --minutes 1 \
        --trials "learning_rate=3e-4" "learning_rate=3e-4 ema=0.99 block_weight=1"

Every pruned model is a folder, or options of :class:`~llm_surgeon.PruneConfig` as JSON, with which MODEL is pruned
here (128 calibration windows; kept in ``--save`` for later). Every trial recovers a copy of it, by distillation
from MODEL of all its weights. It reads ``name=value name=value ...``: options of
:class:`~llm_surgeon.config.recover.RecoverConfig`, ``teacher=false`` to learn from the tokens alone, and ``share`` of
windows from the stream that is calibrated and held out on, where there are two (left out: as it is long). None takes
longer than ``--minutes`` or sees more than ``--budget`` tokens. One that fails is a row, too, with what went wrong.

``--tokens`` is a file of token ids, arrays ``c4_train`` and ``wt_train`` to train on, ``wt_test`` and ``c4_test`` for
the two perplexities, in non-overlapping windows of 2048, by the protocol of bench/end_to_end/real_model.py, whose
``--save`` keeps folders for this. Otherwise ``--data`` is text with a train and a test part, and all of ``--other`` is
evaluated on, in windows of 1024. The last windows of the stream that is calibrated on, 32 of 512 tokens
(``--held-out``), are held out of the training. The model is evaluated in float32. Rows, with what was trained on, are
appended to results/recover.csv.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.end_to_end.real_model import Protocol
from bench.environment import append_row, environment
from llm_surgeon import PruneConfig, perplexity, prune
from llm_surgeon.checkpoint import load_model
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration, calibration_windows, evaluation_windows
from llm_surgeon.data.documents import read_text
from llm_surgeon.data.tokens import tokenize
from llm_surgeon.data.training import training_windows
from llm_surgeon.errors import SurgeonError
from llm_surgeon.progress import LineProgress
from llm_surgeon.recovery.recover import recover

SAMPLES, HELD_OUT_SEQLEN = 128, 512
TRIALS = ["learning_rate=5e-4", "learning_rate=1e-3", "learning_rate=5e-4 teacher=false", "method=lora"]


@dataclass(frozen=True)
class Text:
    """What is calibrated, trained and evaluated on.

    Attributes:
        streams: token ids to train on, by name; the first is calibrated on and lends the held-out windows.
        tests: windows of the two perplexities.
    """

    streams: dict[str, Tensor]
    tests: tuple[Tensor, Tensor]
    calibration: Calibration

    @classmethod
    def of_tokens(cls, path: Path, seed: int) -> Text:
        arrays = {name: torch.from_numpy(array).long() for name, array in numpy.load(path).items()}
        protocol = Protocol(path, "c4_train", ("wt_test", "c4_test"), SAMPLES, 2048)
        first, second = (evaluation_windows(arrays[name], protocol.seqlen) for name in protocol.evaluation)
        streams = {name: arrays[name] for name in (protocol.calibration, "wt_train")}
        return cls(streams, (first, second), protocol.calibration_windows(seed))

    @classmethod
    def of_files(cls, data: str, other: str, tokenizer: Any, seed: int) -> Text:
        train, seqlen = tokenize(read_text(data, "calibration"), tokenizer), 1024
        tests = [evaluation_windows(tokenize(read_text(t, "evaluation"), tokenizer), seqlen) for t in (data, other)]
        calibration = calibration_windows(train, SAMPLES, seqlen, seed)
        return cls({f"{Path(data).stem} train": train}, (tests[0], tests[1]), calibration)

    def held_out(self, count: int) -> Tensor:
        """The last ``count`` windows of the first stream."""
        return evaluation_windows(self._first()[1][-count * HELD_OUT_SEQLEN :], HELD_OUT_SEQLEN)

    def training(self, config: RecoverConfig, share: float | None, held_out: int) -> tuple[Tensor, str]:
        """Windows of a training, a ``share`` of them from the first stream, and their description."""
        name, first = self._first()
        streams = self.streams | {name: first[: -held_out * HELD_OUT_SEQLEN]}
        total = config.steps * config.batch_size
        shares = {each: len(ids) / sum(map(len, streams.values())) for each, ids in streams.items()}
        if share is not None and len(streams) > 1:
            shares = {each: share if each == name else 1 - share for each in streams}
        windows = [
            training_windows(streams[each], max(1, round(part * total)), config.seqlen, config.seed).input_ids
            for each, part in shares.items()
            if part > 0
        ]
        return torch.cat(windows), ", ".join(f"{each} {part:.2f}" for each, part in shares.items())

    def _first(self) -> tuple[str, Tensor]:
        return next(iter(self.streams.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the dense model")
    parser.add_argument("pruned", nargs="+", help="folders, or options of the pruning as JSON")
    parser.add_argument("--tokens", type=Path, help=".npz of token ids")
    parser.add_argument("--data", help="text with train and test parts (.zip)")
    parser.add_argument("--other", help="text of another kind, evaluated only")
    parser.add_argument("--trials", nargs="*", default=TRIALS)
    parser.add_argument("--minutes", type=float, help="of every training")
    parser.add_argument("--budget", type=int, default=10_000_000, help="tokens of every training")
    parser.add_argument("--held-out", type=int, default=32, help="windows held out of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="folder for models that are pruned here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    if (options.tokens is None) == (options.data is None) or (options.data is None) != (options.other is None):
        parser.error("give either --tokens, or --data and --other")
    dense, tokenizer, _ = load_model(options.model, device=torch.device(options.device))
    if options.tokens is None:
        text = Text.of_files(options.data, options.other, tokenizer, options.seed)
    else:
        text = Text.of_tokens(options.tokens, options.seed)

    def record(pruned: str, trial: str, model: PreTrainedModel, **more: object) -> None:
        figures = ["", ""] if more.get("error") else [f"{perplexity(model, each):.3f}" for each in text.tests]
        row = {
            "model": options.model.name,
            "pruned": pruned,
            "trial": trial,
            "seed": options.seed,
            **{name: more.get(name, "") for name in ("tokens", "trained_on", "held_out_perplexity")},
            **dict(zip(("perplexity", "other_perplexity"), figures, strict=True)),
            **{name: more.get(name, "") for name in ("seconds", "error")},
            **environment(options.device),
        }
        append_row(options.out / "recover.csv", row)
        print(*list(row.values())[:11], sep=" | ", flush=True)

    record("", "dense", dense)
    for index, given in enumerate(options.pruned):
        model = copy.deepcopy(dense) if given.startswith("{") else None
        begun = time.perf_counter()
        if model is None:
            name = Path(given).name
            model = load_model(given, device=torch.device(options.device))[0]
        else:
            name = ", ".join(f"{option} {value}" for option, value in json.loads(given).items())
            prune(model, text.calibration, config=PruneConfig(**{"seed": options.seed} | json.loads(given)))
            if options.save is not None:
                model.save_pretrained(options.save / str(index))
                tokenizer.save_pretrained(options.save / str(index))
        record(name, "pruned", model, seconds=f"{time.perf_counter() - begun:.1f}")
        for trial in options.trials:
            _recover(copy.deepcopy(model), dense, text, trial, options, lambda *a, **m: record(name, *a, **m))  # noqa: B023


def _recover(model: Any, dense: Any, text: Text, trial: str, options: argparse.Namespace, record: Any) -> None:
    """One trial and its row."""
    given: dict[str, Any] = {"method": "full", "seqlen": 512, "seed": options.seed, "minutes": options.minutes}
    for word in trial.split():
        name, _, value = word.partition("=")
        given[name] = _value(value)
    teacher, share = dense if given.pop("teacher", True) else None, given.pop("share", None)
    batch = given.setdefault("batch_size", 32)
    given.setdefault("steps", options.budget // (batch * given["seqlen"]))
    config = RecoverConfig(**given)
    windows, description = text.training(config, share, options.held_out)
    held_out = text.held_out(options.held_out)
    try:
        report = recover(model, windows, held_out, teacher=teacher, config=config, progress=LineProgress())
    except SurgeonError as error:
        record(trial, model, trained_on=description, error=str(error))
        return
    for entry in report.log:
        print("  ", *(f"{name} {value:.5g}" for name, value in entry.items()), flush=True)
    record(
        trial,
        model,
        tokens=report.tokens,
        trained_on=description,
        held_out_perplexity=f"{math.exp(report.loss_after):.3f}",
        seconds=f"{report.seconds:.1f}",
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
