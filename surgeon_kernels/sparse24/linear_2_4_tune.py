"""The fastest kernel of :func:`~surgeon_kernels.linear_2_4`, found by measurement instead of by rule."""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from surgeon_kernels.sparse24.kept_choices import add_kept, kept_path, read_kept
from surgeon_kernels.sparse24.linear_2_4 import Linear24Weight

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_MOST_COPIES = 15  # besides the weight itself (an estimate): a small weight would need very many to leave the cache
_ROUNDS = 2  # through all copies, in a timed graph
_GAIN = 0.95  # of the present choice's time: a smaller gain may be noise (an estimate)
_LIBRARY_ALGORITHMS = 32  # of cuSPARSELt, at most; those that do not exist do not run
_wrong: set[tuple[int, str]] = set()  # kernels that a warning has named, and their devices


def tune_2_4(weight: Linear24Weight, tokens: Iterable[int] = TOKENS, *, keep: bool = True) -> dict[int, int]:
    """Time every kernel that can run and keep the fastest, per weight size, dtype, device and power of two of tokens.

    The kernel that would run anyway, by a rule measured on an H200 (csrc/sparse24/linear_2_4.cpp), stays unless another
    is at least 5 % faster; other devices gain more from a measurement. The choice holds for the process, costs some
    tenths of a second a number of tokens and, meanwhile, memory for copies of the weight (twice the L2 cache), and must
    not be made while a CUDA graph is captured. Equal inputs give equal bits as long as the choice stays; two may differ
    in rounding.

    What was measured is kept on disk (:mod:`surgeon_kernels.sparse24.kept_choices`) and found by later processes with
    the same name of the device, kernels and versions of this package, torch and cuSPARSELt.

    Every kernel's result is first compared with that of the kernel that would run anyway, both written over NaN::

        |y - y₀| ≤ 2 eps (|y₀| + rms(y₀))        eps of the weight's dtype, every element

    One that differs is neither timed nor kept, and a warning names it, once a process. Where ``y₀`` is not finite (a
    weight is not, or the sums overflow), nothing can be compared and the choice stays as it is.

    Args:
        weight: one weight of the size in question, with its CUDA kernel (otherwise nothing is done).
        tokens: each stands for all numbers down to the next lower power of two, exclusive.
        keep: take choices from disk where they are there, and keep new ones; else measure all.

    Returns:
        The number of the chosen kernel for each number of tokens.

    Raises:
        ValueError: a number of tokens is not positive.
    """
    tokens = list(tokens)
    if min(tokens, default=1) < 1:
        raise ValueError(f"tokens must be positive, not {min(tokens)}")
    if not weight.kernel:
        return {}
    device = weight.fragments.device
    ops = torch.ops.surgeon_kernels
    library = weight.compressed is not None
    dtype = str(weight.dtype).removeprefix("torch.")
    names = {
        n: f"{weight.rows} x {weight.columns} {dtype}, {n} tokens{', cuSPARSELt' if library else ''}" for n in tokens
    }
    chosen, measured = {}, {}
    with torch.cuda.device(device):
        path = _path(device) if keep else None
        kept = {} if path is None else read_kept(path)
        for n in tokens:
            x = torch.empty(n, weight.columns, device=device, dtype=weight.dtype)
            if names[n] in kept and ops.linear_2_4_pin(x, weight.fragments, weight.rows, kept[names[n]], library):
                chosen[n] = kept[names[n]]
        if len(chosen) == len(set(tokens)):
            return chosen
        # Copies beyond the L2 cache, taken in turn: the weight comes from memory as it does in a model.
        beyond = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        count = min(max(1, beyond // max(1, weight.fragments.nbytes)), _MOST_COPIES)
        weights = [weight, *(_copy(weight) for _ in range(count))]
        for n in tokens:
            if n in chosen:
                continue
            x = torch.randn(n, weight.columns, device=device).to(weight.dtype)
            present = ops.linear_2_4_choice(x, weight.fragments, weight.rows, library)
            right = _run(x, weight, present, poisoned=True)
            if right is None or not right.isfinite().all():
                chosen[n] = present
                continue
            times, quickest = {}, float("inf")
            # The present choice first: it is timed whatever its time.
            every = range(ops.linear_2_4_choices() + library * _LIBRARY_ALGORITHMS)
            for choice in sorted(every, key=lambda choice: choice != present):
                y = _run(x, weight, choice, poisoned=True)
                if y is None:
                    continue
                if not _agrees(y, right):
                    _say_wrong(choice, present, weight, n)
                    continue
                once = _time([functools.partial(_run, x, weights[1], choice)] * 3)  # the host's time is in it
                quickest = min(quickest, once)
                if once < 2 * quickest:
                    calls = [functools.partial(_run, x, each, choice) for each in weights * _ROUNDS]
                    times[choice] = _time([_graph(calls)] * 5) / len(calls)
            best = min(times, key=times.__getitem__, default=present)
            chosen[n] = best if times.get(best, 0.0) <= _GAIN * times.get(present, float("inf")) else present
            if not ops.linear_2_4_pin(x, weight.fragments, weight.rows, chosen[n], library):
                raise ValueError(f"2:4 linears have no kernel of number {chosen[n]}")
            measured[names[n]] = chosen[n]
    if path is not None and measured:
        add_kept(path, measured)
    return {n: chosen[n] for n in tokens}


def _path(device: torch.device) -> Path:
    """Where choices for the current device are kept."""
    ops = torch.ops.surgeon_kernels
    kernels = [list(ops.linear_2_4_geometry(choice)) for choice in range(ops.linear_2_4_choices())]
    try:
        version = importlib.metadata.version("surgeon-kernels")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        version = ""
    numbered_by = [version, torch.__version__, ops.cusparselt_version(), kernels]
    return kept_path(torch.cuda.get_device_name(device), numbered_by)


def _copy(weight: Linear24Weight) -> Linear24Weight:
    compressed = None if weight.compressed is None else weight.compressed.clone()
    return weight._replace(fragments=weight.fragments.clone(), compressed=compressed)


def _run(x: Tensor, weight: Linear24Weight, choice: int, *, poisoned: bool = False) -> Tensor | None:
    """The product by one kernel, or None where that does not run; if `poisoned`, unwritten elements are NaN."""
    op = torch.ops.surgeon_kernels.linear_2_4_run
    return op(x, weight.fragments, weight.rows, choice, weight.compressed, poisoned)


def _agrees(y: Tensor, right: Tensor) -> bool:
    """True if two products differ by no more than the order of their fp32 sums and a rounding each."""
    eps, right = torch.finfo(y.dtype).eps, right.float()
    bound = 2 * eps * (right.abs() + right.square().mean().sqrt())
    return bool(((y.float() - right).abs() <= bound).all())  # false for NaN


def _say_wrong(choice: int, present: int, weight: Linear24Weight, tokens: int) -> None:
    device = torch.cuda.get_device_name(weight.fragments.device)
    if (choice, device) not in _wrong:
        _wrong.add((choice, device))
        warnings.warn(
            f"2:4 kernel {choice} is not used on {device}: its product of {tokens} tokens with {weight.rows} rows of "
            f"{weight.columns} columns is not that of kernel {present}",
            RuntimeWarning,
            stacklevel=3,
        )


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The calls as one CUDA graph: back to back, as in a captured model."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # torch.cuda.graph would collect garbage first, every time; other threads may be loading weights meanwhile.
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for call in calls:
            call()
        graph.capture_end()
    graph.replay()
    return graph.replay


def _time(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds of one call, their median."""
    events = []
    for call in calls:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
