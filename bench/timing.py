"""Device times of calls, medians over CUDA events, and the memory that they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_ms(calls: Sequence[Callable[[], object]], repetitions: int = 9) -> float:
    """Milliseconds of one call, the calls replayed one after the other from a CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return eager_ms([graph.replay], repetitions) / len(calls)


def eager_ms(calls: Sequence[Callable[[], object]], repetitions: int = 9) -> float:
    """Milliseconds of one call, the calls made one after the other, their host time included where it shows."""
    events = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / len(calls)


def warm_ms(call: Callable[[], object], repetitions: int = 9) -> float:
    """Milliseconds of a call, after one that warms up."""
    call()
    return eager_ms([call], repetitions)


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak of the device memory that a call allocates."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / eager_ms([lambda: target.copy_(source)]) * 1e3
