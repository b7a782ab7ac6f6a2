"""2:4 linears against dense ``F.linear``, on a CUDA device.

    python -m bench.kernels.linear_2_4   # every shape and number of tokens, appended to results/linear_2_4.csv

The kernels are those that `tune_2_4` chooses, our own or, in a second row, with cuSPARSELt among them. All run in the
same process, by turns: in a CUDA graph (device time) and called plainly (what a Python loop sees); weights rotate among
copies several times the L2 cache, so that they come from memory. Host times are those of issuing a call, the device
never waited for. Times are medians; errors are Frobenius norms against a float64 product. The floor is the larger of
reading the packed weight once at the copy bandwidth measured here, and the operations at twice NVIDIA's dense rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.environment import append_row, environment, require_gpu
from surgeon_kernels.sparse24.linear_2_4 import linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_tune import tune_2_4
from surgeon_kernels.sparse24.pack_2_4 import pack_2_4

DEVICE = "cuda"
SHAPES = [(4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
LIBRARY_TOKENS = 1024  # from here on cuSPARSELt, where it was asked for, takes part
SPARSE_RATE = 2 * 989.5e12  # of the H100 and H200 (SXM), 16 bits, by NVIDIA's datasheet
_ROTATED_BYTES = 200 << 20


def weight_2_4(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    groups = torch.randn(rows, columns // 4, 4, device=DEVICE)
    kept = torch.rand(rows, columns // 4, 4, device=DEVICE).topk(2, dim=2).indices
    weight = torch.zeros_like(groups).scatter(2, kept, groups.gather(2, kept))
    return (weight.view(rows, columns) / columns**0.5).to(dtype)


def median_us(runs: list[Callable[[], object]], calls: int, repetitions: int = 7) -> list[float]:
    """Microseconds a call of each run, one after the other in every repetition: they share clocks and heat."""
    times = []
    for _ in range(repetitions):
        for run in runs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(times[index :: len(runs)]) for index in range(len(runs))]


class Times(NamedTuple):
    """Microseconds a call: in a CUDA graph, called plainly, and on the host."""

    graph: float
    eager: float
    host: float


def measure_calls(contenders: list[list[Callable[[], object]]]) -> list[Times]:
    def run(calls: list[Callable[[], object]]) -> None:
        for call in calls:
            call()

    graphs = []
    for calls in contenders:
        run(calls)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(calls)
        graph.replay()
        graphs.append(graph)
    count = len(contenders[0])
    replayed = median_us([graph.replay for graph in graphs], count)
    eager = median_us([partial(run, calls) for calls in contenders], count)
    issued: list[list[float]] = [[] for _ in contenders]
    for _ in range(10):
        for calls, times in zip(contenders, issued, strict=True):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            run(calls)
            times.append((time.perf_counter() - begun) * 1e6 / count)
    torch.cuda.synchronize()
    return [Times(*each) for each in zip(replayed, eager, map(statistics.median, issued), strict=True)]


def copies(tensor: Tensor) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(max(1, _ROTATED_BYTES // tensor.nbytes)))]


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_us([lambda: target.copy_(source)], 1)[0] * 1e-6)


def measure(
    weight: Tensor, tokens: list[int], copy_rate: float, dtype: torch.dtype, bias: bool = False
) -> Iterable[dict[str, Any]]:
    rows, columns = weight.shape
    dense = copies(weight)
    prepared = prepare_2_4(pack_2_4(weight), cusparselt=not bias)
    packed = [prepared._replace(fragments=data, compressed=None) for data in copies(prepared.fragments)]
    modes = {"own": packed}
    if prepared.compressed is not None:
        modes["cusparselt"] = [prepared._replace(compressed=data) for data in copies(prepared.compressed)]
        tune_2_4(prepared, [n for n in tokens if n >= LIBRARY_TOKENS], keep=False)
    tune_2_4(packed[0], tokens, keep=False)
    b = torch.randn(rows, device=DEVICE).to(dtype) if bias else None
    for n in tokens:
        xs = [torch.randn(n, columns, device=DEVICE).to(dtype) for _ in range(4)]
        names = [name for name in modes if name == "own" or n >= LIBRARY_TOKENS]
        count = max(24, len(packed)) if n < 2048 else 12
        contenders = [[partial(functional.linear, xs[i % 4], dense[i % len(dense)], b) for i in range(count)]]
        for name in names:
            weights = modes[name]
            contenders.append([partial(linear_2_4, xs[i % 4], weights[i % len(weights)], b) for i in range(count)])
        theirs, *ours = measure_calls(contenders)
        exact = functional.linear(xs[0].double(), weight.double(), None if b is None else b.double())
        floor = max(prepared.fragments.nbytes / copy_rate, 2 * n * rows * columns / SPARSE_RATE) * 1e6
        for name, times in zip(names, ours, strict=True):
            yield {
                "rows": rows,
                "columns": columns,
                "tokens": n,
                "dtype": str(dtype).removeprefix("torch."),
                "bias": bias,
                "way": name,
                "dense_us": f"{theirs.graph:.2f}",
                "kernel_us": f"{times.graph:.2f}",
                "speedup": f"{theirs.graph / times.graph:.2f}",
                "dense_eager_us": f"{theirs.eager:.2f}",
                "kernel_eager_us": f"{times.eager:.2f}",
                "eager_speedup": f"{theirs.eager / times.eager:.2f}",
                "dense_host_us": f"{theirs.host:.1f}",
                "kernel_host_us": f"{times.host:.1f}",
                "floor_us": f"{floor:.2f}",
                "floor_percent": f"{100 * floor / times.graph:.0f}",
                "error": f"{error(linear_2_4(xs[0], modes[name][0], b), exact):.2e}",
                "dense_error": f"{error(functional.linear(xs[0], weight, b), exact):.2e}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--out", type=Path, help="where rows are appended, instead of results/")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    about = {**environment(DEVICE), "copy_TB_s": f"{(rate := bandwidth()) / 1e12:.2f}"}
    cases = [(shape, torch.bfloat16, False, TOKENS) for shape in SHAPES]
    cases += [
        ((4096, 4096), torch.float16, True, [1, 16, 100, 2048]),
        ((12288, 4096), torch.bfloat16, True, [1, 3, 17, 100]),
    ]
    for shape, dtype, bias, tokens in cases:
        for row in measure(weight_2_4(*shape, dtype), tokens, rate, dtype, bias):
            print(*row.values(), flush=True)
            append_row(options.out or results / "linear_2_4.csv", {**row, **about})


if __name__ == "__main__":
    main()
