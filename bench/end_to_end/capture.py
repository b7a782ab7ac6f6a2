"""Time and memory of one curvature pass over a model of Llama-2-7B's shape with random weights.

    python -m bench.end_to_end.capture --grams kernel torch none --batch-sizes 4

``kernel`` is what :func:`llm_surgeon.curvature.estimate.estimate_curvature` does; ``torch`` accumulates dense matrices
with ``torch.mm``; ``none`` leaves the Gram matrices out, which is the forward and backward pass alone. Rows are
appended to results/capture.csv; the peak is that of torch's allocator.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.environment import append_row, environment, require_gpu
from llm_surgeon.curvature import estimate as capture
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import find_decoder
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_

DEVICE = torch.device("cuda")


class DenseAccumulator(SymmetricAccumulator):
    @classmethod
    def zeros(cls, n: int, **options: Any) -> SymmetricAccumulator:
        return SymmetricAccumulator.zeros(n, **{**options, "packed": False})


def dense_gram_(out: SymmetricAccumulator, x: torch.Tensor, **_: Any) -> SymmetricAccumulator:
    rows = x.reshape(-1, x.shape[-1])
    out.storage.add_(torch.mm(rows.T, rows, out_dtype=torch.float32))
    return out


def no_gram_(out: SymmetricAccumulator, x: torch.Tensor, **_: Any) -> SymmetricAccumulator:
    return out


GRAMS: dict[str, tuple[Any, Any]] = {
    "kernel": (SymmetricAccumulator, gram_accumulate_),
    "torch": (DenseAccumulator, dense_gram_),
    "none": (SymmetricAccumulator, no_gram_),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grams", nargs="+", choices=GRAMS, default=list(GRAMS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "capture.csv")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=options.layers, max_position_embeddings=options.seqlen)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder = find_decoder(model)
    ids = torch.randint(config.vocab_size, (options.samples, options.seqlen))
    about = {**environment("cuda"), "triton": triton.__version__}
    for batch_size in options.batch_sizes:
        for grams in options.grams:
            capture.SymmetricAccumulator, capture.gram_accumulate_ = GRAMS[grams]
            # Compiles kernels and fills torch's memory pool.
            how = {"batch_size": batch_size, "checkpoint_activations": options.checkpoint}
            capture.estimate_curvature(model, decoder, Calibration(ids[:batch_size]), **how)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            curvature = capture.estimate_curvature(model, decoder, Calibration(ids), **how)
            torch.cuda.synchronize()
            row = {
                "model": "llama-2-7b shape",
                "layers": options.layers,
                "samples": options.samples,
                "seqlen": options.seqlen,
                "batch_size": batch_size,
                "checkpointed": options.checkpoint,
                "grams": grams,
                "seconds": f"{time.perf_counter() - begun:.2f}",
                "peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.1f}",
                **about,
            }
            del curvature
            print(*row.values(), flush=True)
            append_row(options.out, row)


if __name__ == "__main__":
    main()
