"""2:4 linears against dense `F.linear` on a random sample of shapes and numbers of tokens, on a CUDA device.

    python -m bench.kernels.linear_2_4_sample                        # appended to results/linear_2_4_sample.csv
    python -m bench.kernels.linear_2_4_sample --sample fit --kernels # every kernel that may be the fastest, appended to
                                                                     # results/linear_2_4_kernels.csv

Shapes are linears of well-known models, R and C from 1024 to 28672; numbers of tokens are log-uniform in 1 .. 8192.
Samples are drawn with a fixed seed: `fit`, on which the choice of a kernel is tuned, and `check`, of other shapes, on
which it is judged. An RMS norm comes before each product, on both sides, and its time counts, as in a model. Both sides
are measured in the same process by turns, from CUDA graphs; weights rotate among copies several times the L2 cache. The
kernel is the one that `linear_2_4` chooses by itself. Points are measured shape by shape in the order of the sample,
those in the CSV file already (same commit, device and versions) are not measured again, and none begins after
`--seconds`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.environment import append_row, environment, require_gpu
from surgeon_kernels.runtime import extension
from surgeon_kernels.sparse24.linear_2_4 import Linear24Weight, linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.pack_2_4 import Packed24

DEVICE = "cuda"
SAMPLES = ("fit", "check")
SHAPES, COUNTS = 40, 20  # of a sample, and numbers of tokens for each shape
LEAST, MOST, MOST_TOKENS = 1024, 28672, 8192
# Widths of the residual stream, of all heads' queries, of all heads' keys, and of the MLP, from the models' configs.
MODELS = {
    "SmolLM2-1.7B": (2048, 2048, 2048, 8192),
    "TinyLlama-1.1B": (2048, 2048, 256, 5632),
    "Llama-3.2-1B": (2048, 2048, 512, 8192),
    "Llama-3.2-3B": (3072, 3072, 1024, 8192),
    "Llama-2-7B": (4096, 4096, 4096, 11008),
    "Llama-3.1-8B": (4096, 4096, 1024, 14336),
    "Llama-2-13B": (5120, 5120, 5120, 13824),
    "Llama-3.1-70B": (8192, 8192, 1024, 28672),
    "Qwen2.5-1.5B": (1536, 1536, 256, 8960),
    "Qwen2.5-3B": (2048, 2048, 256, 11008),
    "Qwen2.5-7B": (3584, 3584, 512, 18944),
    "Qwen2.5-32B": (5120, 5120, 1024, 27648),
    "Qwen3-0.6B": (1024, 2048, 1024, 3072),
    "Qwen3-1.7B": (2048, 2048, 1024, 6144),
    "Qwen3-4B": (2560, 4096, 1024, 9728),
    "Qwen3-8B": (4096, 4096, 1024, 12288),
    "Qwen3-14B": (5120, 5120, 1024, 17408),
    "Qwen3-32B": (5120, 8192, 1024, 25600),
    "Gemma-2-2B": (2304, 2048, 1024, 9216),
    "Gemma-2-9B": (3584, 4096, 2048, 14336),
    "Gemma-3-12B": (3840, 4096, 2048, 15360),
    "Gemma-3-27B": (5376, 4096, 2048, 21504),
    "Phi-3-mini": (3072, 3072, 3072, 8192),
    "Phi-4": (5120, 5120, 1280, 17920),
    "Yi-34B": (7168, 7168, 1024, 20480),
    "OPT-1.3B": (2048, 2048, 2048, 8192),
    "OPT-2.7B": (2560, 2560, 2560, 10240),
    "OPT-30B": (7168, 7168, 7168, 28672),
    "Falcon-7B": (4544, 4544, 64, 18176),
    "GPT-2-XL": (1600, 1600, 1600, 6400),
}
BANDS = ((1, 16), (17, 64), (65, 256), (257, 1024), (1025, MOST_TOKENS))
_ROTATED_BYTES = 140 << 20  # of packed weights; an H200 has 60 MB of L2 cache
_REPETITIONS = 5


class Point(NamedTuple):
    """A product of the sample: W is ``[rows, columns]``."""

    rows: int
    columns: int
    tokens: int


def shapes() -> list[tuple[int, int]]:
    """Linears of `MODELS`, R and C, by themselves and merged as inference engines do; ascending."""
    found = set()
    for hidden, queries, keys, mlp in MODELS.values():
        found |= {(queries + 2 * keys, hidden), (queries, hidden), (keys, hidden), (hidden, queries)}
        found |= {(2 * mlp, hidden), (mlp, hidden), (hidden, mlp)}
    return sorted((r, c) for r, c in found if min(r, c) >= LEAST and max(r, c) <= MOST and c % 64 == 0)


def sample(name: str, counts: int = COUNTS) -> list[Point]:
    """The points of a sample, `counts` numbers of tokens for each of its shapes."""
    drawn = shapes()
    random.Random("shapes").shuffle(drawn)
    first = SHAPES * SAMPLES.index(name)
    points = []
    for rows, columns in drawn[first : first + SHAPES]:
        source = random.Random(f"{name} {rows} {columns}")
        tokens: list[int] = []
        while len(tokens) < counts:
            n = round(MOST_TOKENS ** source.random())
            if n not in tokens:
                tokens.append(n)
        points += [Point(rows, columns, n) for n in tokens]
    return points


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(speedups: dict[Point, float]) -> str:
    """A line for all points and for each band of tokens, and the five worst points."""
    lines = []
    for name, least, most in [("all", 1, MOST_TOKENS), *((f"{a}-{b}", a, b) for a, b in BANDS)]:
        values = [speedup for point, speedup in speedups.items() if least <= point.tokens <= most]
        if values:
            mean = geometric_mean(values)
            lines.append(f"{name:>10} tokens: {len(values):4} points, min {min(values):.2f}, geometric mean {mean:.3f}")
    worst = sorted(speedups.items(), key=lambda pair: pair[1])[:5]
    lines.append("worst: " + ", ".join(f"{r} x {c}, {n} tokens: {value:.2f}" for (r, c, n), value in worst))
    return "\n".join(lines)


class Weights(NamedTuple):
    """Copies of one random weight, dense and packed, beyond the L2 cache."""

    dense: list[Tensor]
    packed: list[Linear24Weight]


def weights(rows: int, columns: int) -> Weights:
    values = (torch.randn(rows, columns // 2, device=DEVICE) / columns**0.5).bfloat16()
    pairs = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8, device=DEVICE)  # p_0 + 4 p_1 of pack_2_4
    nibbles = pairs[torch.randint(6, (rows, columns // 4), device=DEVICE)]
    first = prepare_2_4(Packed24(values, nibbles[:, ::2] + 16 * nibbles[:, 1::2]))
    count = max(2, -(-_ROTATED_BYTES // first.fragments.nbytes))
    packed = [first, *(first._replace(fragments=first.fragments.clone()) for _ in range(count - 1))]
    dense = first.unpacked()
    torch.cuda.synchronize()
    return Weights([dense, *(dense.clone() for _ in range(count - 1))], packed)


def graph_of(
    products: Sequence[Callable[[Tensor], Tensor | None]], xs: Sequence[Tensor], pool: Any
) -> torch.cuda.CUDAGraph:
    """An RMS norm and a product by turns, in memory of ``pool``."""
    from surgeon_kernels.block_ops import rms_norm_triton  # needs Triton

    gain = torch.ones(xs[0].shape[-1], device=DEVICE, dtype=xs[0].dtype)

    def run(index: int) -> None:
        # The library's kernel, for rows wider than the library takes, too.
        x = xs[index % len(xs)]
        products[index](rms_norm_triton.forward(x, gain, 1e-6, x.dtype)[0])

    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for index in range(len(products)):
            run(index)
    graph.replay()
    return graph


def by_turns_us(graphs: Sequence[torch.cuda.CUDAGraph], calls: int) -> list[float]:
    """Median microseconds of a call of each graph."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(_REPETITIONS):
        events = []
        for graph in graphs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        for each, (start, end) in zip(times, events, strict=True):
            each.append(1e3 * start.elapsed_time(end) / calls)
    return [statistics.median(each) for each in times]


class Timings(NamedTuple):
    """Microseconds of a norm and a product."""

    dense: float
    sparse: list[float]


def measure(point: Point, copies: Weights, products: Sequence[Callable[..., Tensor | None]]) -> Timings:
    """Time the dense product and each of ``products``, functions of x and a packed weight."""
    xs = [torch.randn(point.tokens, point.columns, device=DEVICE).bfloat16() for _ in range(2)]
    count = len(copies.dense)
    calls = max(count, 16 if point.tokens < 1024 else 4)
    pool = torch.cuda.graph_pool_handle()
    graphs = [graph_of([partial(_dense, weight=copies.dense[i % count]) for i in range(calls)], xs, pool)]
    for product in products:
        graphs.append(graph_of([partial(product, weight=copies.packed[i % count]) for i in range(calls)], xs, pool))
    dense, *sparse = by_turns_us(graphs, calls)
    return Timings(dense, sparse)


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


def _chosen(x: Tensor, weight: Linear24Weight) -> Tensor:
    return linear_2_4(x, weight)


def _by_choice(x: Tensor, weight: Linear24Weight, choice: int) -> Tensor | None:
    op = torch.ops.surgeon_kernels.linear_2_4_run
    return op(x, weight.fragments, weight.rows, choice)


class Geometry(NamedTuple):
    """A choice: `kernel` counts those on wgmma.sp, negative on mma.sp; `clusters` of `split` blocks are resident."""

    kernel: int
    tile_rows: int
    tile_tokens: int
    split: int
    clusters: int


def geometries() -> dict[int, Geometry]:
    """Those of all choices that run on the device."""
    if not extension.available():
        raise SystemExit("the kernels are in the CUDA extension, which is not there: see `surgeon info`")
    ops = torch.ops.surgeon_kernels
    found = {choice: ops.linear_2_4_geometry(choice, False) for choice in range(ops.linear_2_4_choices() - 1)}
    return {choice: Geometry(*geometry) for choice, geometry in found.items() if geometry}


def rough_us(point: Point, geometry: Geometry, blocks: int) -> float:
    """Rough time of a choice: shared memory's traffic at 128 bytes a cycle, waves, and what a wave adds.

    ``blocks`` of it are resident at a time, without split-K.
    """
    rows, tokens = geometry.tile_rows, geometry.tile_tokens
    tiles = -(-point.rows // rows) * -(-point.tokens // tokens)
    unit = (rows / 64 * tokens * 2 + tokens * 2 + 2.25 * rows) / 1800 * blocks / 132
    units = -(-point.columns // 128)
    memory = point.rows * point.columns * 1.125 / 4.3e6
    if geometry.split == 1:
        return max(memory, -(-tiles // geometry.clusters) * (units * unit + 1.7))
    whole, rest = divmod(tiles, blocks)
    added = 2 + rows * tokens * 8e-5
    waves = -(-rest // geometry.clusters) * (-(-units // geometry.split) * unit + 1.7 + added)
    return max(memory, whole * (units * unit + 1.7) + (whole > 0) * 2.7 + waves)


def candidates(point: Point, known: dict[int, Geometry], most: int = 14) -> dict[int, Geometry]:
    """Choices that may be the fastest: of every kernel the best split by :func:`rough_us`, and the best of the rest."""
    alone = {geometry.kernel: geometry.clusters for geometry in known.values() if geometry.split == 1}
    times: dict[int, float] = {}
    for choice, geometry in known.items():
        tiles = -(-point.rows // geometry.tile_rows) * -(-point.tokens // geometry.tile_tokens)
        if geometry.kernel < 0 and (point.tokens > 64 or (geometry.split > 1 and tiles > 1.1 * geometry.clusters)):
            continue
        if geometry.split > 1 and tiles % alone[geometry.kernel] == 0:
            continue
        times[choice] = rough_us(point, geometry, alone[geometry.kernel])
    ranked = sorted(times, key=times.__getitem__)
    kernels = {known[choice].kernel: choice for choice in reversed(ranked)}  # of each kernel its best
    limit = 1.5 * times[ranked[0]] + 3
    chosen = [choice for choice in ranked if choice in kernels.values() and times[choice] <= limit][:most]
    chosen += [choice for choice in ranked if choice not in chosen][: most - len(chosen)]
    return {choice: known[choice] for choice in chosen}


def measured(path: Path, about: dict[str, str], name: str) -> dict[Point, float]:
    """Speedups in a CSV file that were measured by the same code on the same device."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if {**about, "sample": name}.items() <= row.items()]
    return {
        Point(int(row["rows"]), int(row["columns"]), int(row["tokens"])): float(row["dense_us"]) / float(row["us"])
        for row in rows
    }


def run(name: str, counts: int, seconds: float, out: Path, kernels: bool) -> None:
    """Measure the points of a sample that ``out`` has not, and print what is known of all of them."""
    gc.freeze()  # a CUDA graph collects garbage before every capture
    about = environment(DEVICE)
    begun, points = time.monotonic(), sample(name, counts)
    speedups = {} if kernels else measured(out, about, name)
    known = geometries() if kernels else {}
    copies = Weights([], [])
    for point in points:
        if point in speedups:
            continue
        if time.monotonic() - begun > seconds:
            break
        if not copies.packed or copies.dense[0].shape != point[:2]:
            copies = Weights([], [])  # the last ones are freed first
            copies = weights(point.rows, point.columns)
        about_point = {"sample": name, **point._asdict()}
        if kernels:
            rows = measure_kernels(point, copies, known)
            for row in rows:
                append_row(out, {**about_point, **row, **about})
            speedups[point] = float(rows[0]["dense_us"]) / float(rows[0]["default_us"])
        else:
            dense, (us,) = measure(point, copies, [_chosen])
            row = {"dense_us": f"{dense:.2f}", "us": f"{us:.2f}", "speedup": f"{dense / us:.3f}"}
            append_row(out, {**about_point, **row, **about})
            speedups[point] = dense / us
    print(f"{name}: {sum(point in speedups for point in points)} of {len(points)} points")
    print(summary({point: speedups[point] for point in points if point in speedups}))


def measure_kernels(point: Point, copies: Weights, known: dict[int, Geometry]) -> list[dict[str, Any]]:
    """A row for each kernel and split that may be the fastest; a line says what the default choice takes."""
    x = torch.randn(point.tokens, point.columns, device=DEVICE).bfloat16()
    tried = candidates(point, known)
    tried = {choice: each for choice, each in tried.items() if _by_choice(x, copies.packed[0], choice) is not None}
    products: list[Callable[..., Tensor | None]] = [_chosen]
    products += [partial(_by_choice, choice=choice) for choice in tried]
    dense, (own, *us) = measure(point, copies, products)
    blocks = {geometry.kernel: geometry.clusters for geometry in known.values() if geometry.split == 1}
    times = {"dense_us": f"{dense:.2f}", "default_us": f"{own:.2f}"}
    least, best = min(zip(us, tried.values(), strict=True))
    print(*point, f"dense {dense:.1f} chosen {own:.1f} best {least:.1f}", *best, flush=True)
    return [
        {**geometry._asdict(), "blocks": blocks[geometry.kernel], "us": f"{each:.2f}", **times}
        for each, geometry in zip(us, tried.values(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--sample", choices=SAMPLES, default="check")
    parser.add_argument("--counts", type=int, default=COUNTS, help="numbers of tokens for each shape")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no point begins after them")
    parser.add_argument("--kernels", action="store_true", help="every kernel that may be the fastest, each by itself")
    parser.add_argument("--out", type=Path, help="where rows are appended, instead of results/")
    options = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    file = "linear_2_4_kernels.csv" if options.kernels else "linear_2_4_sample.csv"
    run(options.sample, options.counts, options.seconds, options.out or results / file, options.kernels)


if __name__ == "__main__":
    main()
