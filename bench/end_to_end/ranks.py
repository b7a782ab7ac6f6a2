"""One run on one GPU and on several, side by side: a model of Llama-2-7B's shape with random bfloat16 weights.

    python -m bench.end_to_end.ranks --gpus 1 2                      # the default update, 2:4, one shot
    python -m bench.end_to_end.ranks --gpus 1 2 --run 2:4+joint      # runs as of bench.end_to_end.prune

Every process makes the same model and the same random tokens, and prunes a model of one block first, so that kernels
are compiled. Rows are appended to results/ranks.csv: seconds by phase, the most memory of a rank, the factors that a
rank keeps, its share of those of one GPU, and how much faster the run was than on the first number of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.end_to_end.prune import PHASES, build, parse
from bench.environment import append_row, environment, require_gpu
from llm_surgeon import PruneConfig, prune
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.distributed import Ranks
from llm_surgeon.distributed.group import joined
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.shots import run as shots_run

OTHERS = ("peak_gb", "factors_gb", "factors_share", "speedup", "loss_after")
COLUMNS = ("model", "layers", "samples", "seqlen", "run", "options", "gpus", "seconds", *PHASES, *OTHERS)


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Prune on this rank; the figures of all."""
    device = "cuda" if ranks.device is None else str(ranks.device)
    config = parse(options.run, options)
    warm_up(options, config, ranks, device)
    model = build(options.layers, options.seqlen, device)
    ids = tokens(model.config.vocab_size, options.samples, options.seqlen)
    kept = [0]
    estimate = shots_run.estimate_curvature

    def noted(model: Any, decoder: Decoder, *arguments: Any, **more: Any) -> Curvature:
        found = estimate(model, decoder, *arguments, **more)
        sums = [*found._inputs.values(), *found._gradients.values()]
        kept.append(sum(each.nbytes for each in sums))
        return found

    shots_run.estimate_curvature = noted
    ranks.agreed(None)  # begin together
    begun = time.perf_counter()
    try:
        report = prune(model, ids, config=config, ranks=ranks)
    finally:
        shots_run.estimate_curvature = estimate
    seconds = time.perf_counter() - begun
    phases = {phase: sum(shot.seconds.get(phase, 0.0) for shot in report.shots) for phase in PHASES}
    return {
        "seconds": max(ranks.everyones(seconds)),
        **phases,
        "peak_gb": max(ranks.everyones(report.peak_memory_bytes)) / 1e9,
        "factors_gb": max(ranks.everyones(max(kept))) / 1e9,
        "loss_after": report.shots[-1].loss_before + (report.shots[-1].measured_increase or 0.0),
    }


def warm_up(options: argparse.Namespace, config: PruneConfig, ranks: Ranks, device: str) -> None:
    model = build(1, options.seqlen, device)
    prune(model, tokens(model.config.vocab_size, max(8, ranks.count), options.seqlen), config=config, ranks=ranks)
    del model
    torch.cuda.empty_cache()


def tokens(vocabulary: int, samples: int, seqlen: int) -> torch.Tensor:
    return torch.randint(vocabulary, (samples, seqlen), generator=torch.Generator().manual_seed(0))


def launch(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run of so many processes, of which this one is none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        words = [sys.executable, "-m", "bench.end_to_end.ranks", "--figures", str(file), "--run", options.run]
        for name in ("layers", "samples", "seqlen", "options"):
            words += [f"--{name}", str(getattr(options, name))]
        common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            subprocess.Popen(words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"processes ended with {codes}")
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--run", default="2:4", help="As of bench.end_to_end.prune.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--options", default="{}", help="More fields of PruneConfig, as JSON.")
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)  # of a process that was launched
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "ranks.csv")
    options = parser.parse_args()
    if options.figures is not None:
        with joined() as ranks:
            found = measure(options, ranks)
            if ranks.first:
                options.figures.write_text(json.dumps(found))
        return
    require_gpu("cuda")
    about, first = environment("cuda"), None
    for count in options.gpus:
        found = launch(count, options)
        first = first or found
        shares = {
            "factors_share": found["factors_gb"] / first["factors_gb"] if first["factors_gb"] else 0.0,
            "speedup": first["seconds"] / found["seconds"],
        }
        figures = {name: f"{value:.3f}" for name, value in (found | shares).items()}
        row = dict.fromkeys(COLUMNS, "") | {
            "model": "llama-2-7b shape", "layers": options.layers, "samples": options.samples,
            "seqlen": options.seqlen, "run": options.run, "options": options.options, "gpus": count,
        } | figures | about  # fmt: skip
        print(*row.values(), flush=True)
        append_row(options.out, row)


if __name__ == "__main__":
    main()
