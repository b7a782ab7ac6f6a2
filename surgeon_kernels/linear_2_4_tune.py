"""The fastest kernel of :func:`~surgeon_kernels.linear_2_4`, found by measurement instead of by rule."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from surgeon_kernels.linear_2_4 import Linear24Weight

_REPETITIONS = 5
_LIBRARY_ALGORITHMS = 32  # of cuSPARSELt, at most; those that do not exist do not run


def tune_2_4(weight: Linear24Weight, tokens: Iterable[int] = (1, 8, 16, 32, 64, 128, 256, 512, 1024)) -> dict[int, int]:
    """Time every kernel that can run and keep the fastest, per weight size, dtype, device and power of two of tokens.

    Without it a rule measured on an H200 chooses (csrc/linear_2_4.cpp); other devices gain from a measurement. The
    choice holds for the process, costs about 40 ms a number of tokens, and must not be made while a CUDA graph is
    captured. Equal inputs give equal bits as long as the choice stays; two choices may differ in rounding.

    Args:
        weight: one weight of the size in question, with its CUDA kernel (otherwise nothing is done).
        tokens: each stands for all numbers down to the next lower power of two, exclusive.

    Returns:
        The number of the chosen kernel for each number of tokens.
    """
    if not weight.kernel:
        return {}
    device = weight.fragments.device
    ops = torch.ops.surgeon_kernels
    with torch.cuda.device(device):
        # Written before every timed call, so that the weight comes from memory as it does in a model.
        flush = torch.empty(
            4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device
        )
        chosen = {}
        for n in tokens:
            x = torch.randn(n, weight.columns, device=device).to(weight.dtype)
            times = {}
            library = weight.compressed is not None
            for choice in range(ops.linear_2_4_choices() + library * _LIBRARY_ALGORITHMS):
                if ops.linear_2_4_run(x, weight.fragments, weight.rows, choice, weight.compressed) is not None:
                    times[choice] = _time(x, weight, choice, flush)
            chosen[n] = min(times, key=times.__getitem__)
            ops.linear_2_4_pin(x, weight.fragments, weight.rows, chosen[n], library)
    return chosen


def _time(x: Tensor, weight: Linear24Weight, choice: int, flush: Tensor) -> float:
    """Milliseconds of one call, the median of a few."""
    events = []
    for _ in range(_REPETITIONS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.ops.surgeon_kernels.linear_2_4_run(x, weight.fragments, weight.rows, choice, weight.compressed)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
