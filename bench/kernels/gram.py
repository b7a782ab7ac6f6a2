"""Gram accumulation against ``out.add_(torch.mm(x.T, x, out_dtype=torch.float32))``, on a CUDA device.

    python -m bench.kernels.gram            # every shape, appended to results/gram.csv
    python -m bench.kernels.gram --groups   # the small products of decoder blocks, a call for each, appended to
                                            # results/gram_groups.csv
    python -m bench.kernels.gram --tune     # launch configurations on a few shapes, beside estimates; no rows
    python -m bench.kernels.gram --fit      # the configurations of surgeon_kernels/gram/plan.py, rows appended to
                                            # results/gram_kernels.csv; prints the figures that choose, fitted to these
    python -m bench.kernels.gram --fit FILE # the figures from such rows, without a GPU

Times are medians of CUDA graph replays (device time) and of plain calls (with the launches' host time), the inputs
rotated so that they come from memory, not from L2. Errors are Frobenius norms against a float64 product. The roofline
is the work that has to be done, T C (C + 1) operations, at the vendor's dense rate.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench.environment import append_row, environment, require_gpu
from bench.kernels.gram_fit import Timing, label, read_timings, report
from bench.timing import eager_ms, graph_ms
from surgeon_kernels import GramProduct, SymmetricAccumulator, gram_accumulate_, gram_accumulate_each_
from surgeon_kernels.gram import gram_group_triton, gram_triton
from surgeon_kernels.gram.gram import kernel_config
from surgeon_kernels.gram.plan import CONFIGS as CHOICES
from surgeon_kernels.gram.plan import GramConfig, blocks_in_order, schedule

DEVICE = "cuda"
_ROTATED_BYTES = 256 << 20
# Dense tensor-core rate of the H100 and H200 (SXM) by NVIDIA's datasheet; float32 counted at tf32's, three products.
ROOFLINE = {torch.bfloat16: 989.5e12, torch.float16: 989.5e12, torch.float32: 494.7e12 / 3}


class Case(NamedTuple):
    tokens: int
    columns: int  # of x
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    masked: bool = False
    dense: bool = False


CASES = [
    *(Case(16384, c) for c in (4096, 11008, 5120, 13824, 14336)),
    Case(16384, 11007, bias=True),
    *(Case(t, c) for t, c in ((12345, 11008), (12345, 5120), (3001, 13824))),
    *(Case(t, c) for t in (2048, 4096, 16384) for c in (512, 768, 1024, 1536, 2048, 2560)),
    *(Case(t, c) for t, c in ((2048, 4096), (2048, 11008), (2049, 1536), (2049, 2304), (5000, 3072))),
    *(Case(t, c) for t, c in ((2048, 513), (2048, 1025), (4096, 2051), (16384, 769), (16384, 4095))),
    *(Case(t, c, bias=True) for t, c in ((2048, 512), (2048, 768), (2048, 2048), (16384, 768), (16384, 4096))),
    *(Case(2048, c, masked=True) for c in (768, 2048)),
    Case(16384, 4096, masked=True),
    Case(16384, 4096, bias=True, masked=True),
    Case(2048, 2048, dense=True),
    Case(16384, 4096, dense=True),
    Case(16384, 4096, torch.float16),
    Case(8192, 4096, torch.float32),
    Case(4096, 1024, torch.float32),
    Case(2048, 1536, torch.float32),
    Case(2048, 512, torch.float32),
]
TUNED = [
    *(Case(t, c) for t, c in ((16384, 4096), (16384, 11008), (16384, 2048), (2048, 2048), (2048, 2560), (2048, 3072))),
    *(Case(t, c, torch.float32) for t, c in ((8192, 4096), (4096, 1024))),
]
# Decoder blocks: tokens, width, width of keys and values, width of the MLP where its products are small, biases.
GROUPS = [
    *((tokens, width, width, 0, False) for tokens in (2048, 4096) for width in (512, 768, 1024, 1536)),
    (2048, 576, 192, 1536, False),  # SmolLM2-135M
    (2048, 960, 320, 0, False),  # SmolLM2-360M
    (2048, 896, 128, 0, True),  # Qwen2.5-0.5B
    (2048, 768, 768, 0, True),  # OPT-125M
    (1024, 640, 384, 1920, False),  # of no model
    (3001, 1280, 1280, 0, False),
]
GROUP_CONFIGS = [(64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4)]
FITTED = [
    *(Case(t, c) for t in (1024, 2048, 4096, 16384) for c in (1536, 2048, 2560, 3072, 4096, 5120, 8192, 11008)),
    *(Case(t, c, torch.float32) for t in (1024, 4096) for c in (1024, 2048, 4096, 5120)),
]
_WIDE = GramConfig(128, 256, 64, 8, 3, 1, True, step=0.63)
_SQUARE = GramConfig(128, 128, 64, 8, 4, 1, True, run=16, in_registers=True, step=0.36)
CONFIGS = {
    torch.bfloat16: [
        *(_WIDE._replace(run=run) for run in (64, 128, 256)),
        *(_SQUARE._replace(run=run) for run in (4, 16, 64)),
        _SQUARE._replace(run=128, in_registers=False),
        GramConfig(128, 128, 64, 4, 3, 2, True),
    ],
    torch.float32: [
        GramConfig(128, 64, 32, 4, 3, 2, True, "tf32x3"),
        GramConfig(128, 128, 32, 8, 3, 1, True, "tf32x3"),
        GramConfig(64, 64, 32, 4, 3, 2, True, "tf32x3"),
        GramConfig(128, 128, 32, 8, 2, 1, False, "tf32x3"),
    ],
}


def inputs(case: Case) -> tuple[list[Tensor], Tensor | None]:
    size = case.tokens * case.columns * case.dtype.itemsize
    count = max(2, min(64, -(-_ROTATED_BYTES // size)))
    xs = [torch.randn(case.tokens, case.columns, device=DEVICE).to(case.dtype) for _ in range(count)]
    return xs, torch.rand(case.tokens, device=DEVICE) < 0.9 if case.masked else None


def prepared(x: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """Rows with their ones, zero where the mask is False."""
    if bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return x if mask is None else x.masked_fill(~mask[:, None], 0.0)


def torch_gram_(out: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    x = prepared(x, mask, bias)
    if x.dtype == torch.float32:
        out.addmm_(x.T, x)
    else:
        out.add_(torch.mm(x.T, x, out_dtype=torch.float32))


def exact_gram(x: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    x = prepared(x.double(), mask, bias)
    return x.T @ x


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def measure(case: Case) -> dict[str, Any]:
    xs, mask = inputs(case)
    n = case.columns + case.bias
    theirs = torch.zeros(n, n, device=DEVICE)
    ours = torch.zeros(n, n, device=DEVICE) if case.dense else SymmetricAccumulator.zeros(n, device=DEVICE)
    baseline = [lambda x=x: torch_gram_(theirs, x, mask, case.bias) for x in xs]
    kernel = [lambda x=x: gram_accumulate_(ours, x, mask=mask, ones_column=case.bias) for x in xs]
    baseline[0]()
    kernel[0]()
    exact = exact_gram(xs[0], mask, case.bias)
    full = ours if isinstance(ours, Tensor) else ours.full()
    errors = error(full, exact), error(theirs, exact)
    del exact, full
    times = graph_ms(baseline), graph_ms(kernel), eager_ms(baseline), eager_ms(kernel)
    operations = case.tokens * n * (n + 1)
    target, packed = (ours, False) if isinstance(ours, Tensor) else (ours.storage, ours.packed)
    config = kernel_config(target, xs[0], packed, case.bias)
    return {
        **case._asdict(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "config": label(config) if config else "torch",
        "torch_ms": f"{times[0]:.4f}",
        "kernel_ms": f"{times[1]:.4f}",
        "speedup": f"{times[0] / times[1]:.2f}",
        "torch_eager_ms": f"{times[2]:.4f}",
        "kernel_eager_ms": f"{times[3]:.4f}",
        "eager_speedup": f"{times[2] / times[3]:.2f}",
        "tflops": f"{operations / times[1] / 1e9:.0f}",
        "roofline_percent": f"{100 * operations / ROOFLINE[case.dtype] / times[1] * 1e3:.1f}",
        "error": f"{errors[0]:.2e}",
        "torch_error": f"{errors[1]:.2e}",
    }


def group_inputs(tokens: int, width: int, narrow: int, wide: int, bias: bool) -> list[list[tuple[Tensor, bool]]]:
    """Inputs and output gradients of a block's linears, with a column of ones or without, for several calls."""
    inputs = [(width, bias)] * 3 + [(wide, bias)] * (wide > 0)
    gradients = [(n, False) for n in (width, narrow, narrow, width, width, *[wide] * 2 * (wide > 0))]
    size = 2 * tokens * sum(columns for columns, _ in inputs + gradients)
    return [
        [(torch.randn(tokens, columns, device=DEVICE).bfloat16(), ones) for columns, ones in inputs + gradients]
        for _ in range(max(2, min(16, -(-_ROTATED_BYTES // size))))
    ]


def measure_group(tokens: int, width: int, narrow: int, wide: int, bias: bool) -> dict[str, Any]:
    calls = group_inputs(tokens, width, narrow, wide, bias)
    sizes = [x.shape[1] + ones for x, ones in calls[0]]
    theirs, outs = ([torch.zeros(n, n, device=DEVICE) for n in sizes] for _ in range(2))
    ours = [SymmetricAccumulator(len(out), out) for out in outs]

    def by_torch(call: list[tuple[Tensor, bool]]) -> None:
        for out, (x, ones) in zip(theirs, call, strict=True):
            torch_gram_(out, x, None, ones)

    def by_kernel(call: list[tuple[Tensor, bool]]) -> None:
        gram_accumulate_each_(
            [GramProduct(out, x, ones_column=ones) for out, (x, ones) in zip(ours, call, strict=True)]
        )

    by_torch(calls[0])
    by_kernel(calls[0])
    exact = [exact_gram(x, None, ones) for x, ones in calls[0]]
    errors = [
        max(error(out, truth) for out, truth in zip(found, exact, strict=True))
        for found in ([out.full() for out in ours], theirs)
    ]
    del exact
    baseline, kernel = ([partial(by, call) for call in calls] for by in (by_torch, by_kernel))
    times = graph_ms(baseline), graph_ms(kernel), eager_ms(baseline), eager_ms(kernel)
    operations = sum(tokens * n * (n + 1) for n in sizes)
    return {
        "tokens": tokens,
        "widths": " ".join(map(str, sizes)),
        "bias": bias,
        "torch_ms": f"{times[0]:.4f}",
        "kernel_ms": f"{times[1]:.4f}",
        "speedup": f"{times[0] / times[1]:.2f}",
        "torch_eager_ms": f"{times[2]:.4f}",
        "kernel_eager_ms": f"{times[3]:.4f}",
        "eager_speedup": f"{times[2] / times[3]:.2f}",
        "tflops": f"{operations / times[1] / 1e9:.0f}",
        "error": f"{errors[0]:.2e}",
        "torch_error": f"{errors[1]:.2e}",
    }


def tune_group(tokens: int, width: int, narrow: int, wide: int, bias: bool) -> None:
    calls = group_inputs(tokens, width, narrow, wide, bias)
    outs = [torch.zeros(x.shape[1] + ones, x.shape[1] + ones, device=DEVICE) for x, ones in calls[0]]
    times = [
        graph_ms(
            [
                partial(gram_group_triton.accumulate_, outs, *map(list, zip(*call, strict=True)), 1.0, config)
                for call in calls
            ]
        )
        for config in GROUP_CONFIGS
    ]
    print(tokens, width, narrow, wide, bias, *(f"{c}: {ms:.4f}" for c, ms in zip(GROUP_CONFIGS, times, strict=True)))


def tune(case: Case) -> None:
    xs, _ = inputs(case)
    out = torch.zeros(case.columns, case.columns, device=DEVICE)
    base = graph_ms([partial(torch_gram_, out, x, None, False) for x in xs])
    print(f"{case.tokens} x {case.columns} {case.dtype}: torch {base:.4f} ms", flush=True)
    packed = SymmetricAccumulator.zeros(case.columns, device=DEVICE, packed=True).storage
    for config in CONFIGS[case.dtype]:
        plan = gram_triton.plan(case.columns, case.tokens, case.dtype, True, config, xs[0].device)
        ms = graph_ms([partial(gram_triton.accumulate_, packed, x, 1.0, plan) for x in xs])
        programs = config.programs_per_sm * torch.cuda.get_device_properties(DEVICE).multi_processor_count
        estimate = schedule(case.columns, -(-case.tokens // config.block_k), config, programs).time / 1e3
        print(f"    {tuple(config)}: {ms:.4f} ms (estimated {estimate:.4f}), {base / ms:.2f}x", flush=True)


def work(columns: int, tokens: int, config: GramConfig, programs: int) -> tuple[int, int, int]:
    """Steps and units of the program with the most, and bytes of partial sums: what times are estimated from."""
    steps = -(-tokens // config.block_k)
    split = schedule(columns, steps, config, programs)
    whole = -(-(len(blocks_in_order(columns, config)) - len(split.reductions)) // programs)
    parts = len(split.reductions) * split.splits
    shared = -(-parts // programs)
    return (
        whole * steps + shared * -(-steps // split.splits),
        whole * -(-steps // config.longest) + shared,
        4 * parts * config.block_m * config.block_n,
    )


def fit_from_device(out: Path) -> list[Timing]:
    """Rows of every configuration of this device on every shape, appended to ``out``."""
    properties, about = torch.cuda.get_device_properties(DEVICE), {**environment(DEVICE), "triton": triton.__version__}
    timings = []
    for case in FITTED:
        xs, _ = inputs(case)
        packed = SymmetricAccumulator.zeros(case.columns, device=DEVICE, packed=True).storage
        for config in CHOICES.get((properties.major, case.dtype), []):
            plan = gram_triton.plan(case.columns, case.tokens, case.dtype, True, config, xs[0].device)
            us = 1000 * graph_ms([partial(gram_triton.accumulate_, packed, x, 1.0, plan) for x in xs])
            programs = config.programs_per_sm * properties.multi_processor_count
            timings.append(
                Timing(
                    case.tokens,
                    case.columns,
                    str(case.dtype).removeprefix("torch."),
                    label(config),
                    *work(case.columns, case.tokens, config, programs),
                    us,
                )
            )
            append_row(out, {**timings[-1]._asdict(), "us": f"{us:.2f}", **about})
        print(*case[:3], len(timings), flush=True)
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time launch configurations instead")
    parser.add_argument("--groups", action="store_true", help="time the small products of decoder blocks instead")
    parser.add_argument(
        "--fit", nargs="?", type=Path, const=Path(), metavar="FILE", help="fit the times that choose a configuration"
    )
    parser.add_argument("--out", type=Path, help="where rows are appended, instead of results/")
    options = parser.parse_args()
    if options.fit is not None and options.fit != Path():
        print(report(read_timings(options.fit)))
        return
    require_gpu()
    torch.manual_seed(0)
    results = Path(__file__).parents[1] / "results"
    if options.fit is not None:
        print(report(fit_from_device(options.out or results / "gram_kernels.csv")))
        return
    if options.tune:
        for group in GROUPS:
            tune_group(*group)
        for case in TUNED:
            tune(case)
        return
    about = {**environment(DEVICE), "triton": triton.__version__}
    if options.groups:
        for group in GROUPS:
            row = {**measure_group(*group), **about}
            print(*list(row.values())[:12], flush=True)
            append_row(options.out or results / "gram_groups.csv", row)
        return
    for case in CASES:
        row = {**measure(case), **about}
        print(*list(row.values())[:17], flush=True)
        append_row(options.out or results / "gram.csv", row)


if __name__ == "__main__":
    main()
