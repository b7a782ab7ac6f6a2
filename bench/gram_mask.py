"""Where to apply a token mask: in the Gram kernel's loop, or in a copy of the rows before it; on a CUDA device.

    python bench/gram_mask.py       # appended to results/gram_mask.csv

The masked kernel is the one of surgeon_kernels/gram_triton.py with both operands masked between the load and the
product (both, because a masked row may hold NaN). They then pass through registers on their way to the tensor cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from gram import DEVICE, Case, device_ms, error, exact_gram, inputs
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from environment import append_row, environment
from surgeon_kernels import SymmetricAccumulator, gram_triton, rows_triton
from surgeon_kernels.gram_plan import choose
from surgeon_kernels.gram_triton import add_block

CASES = [Case(16384, 4096), Case(16384, 11008), Case(16384, 2048), Case(2048, 4096)]


@triton.jit(do_not_specialize=["unit_count", "tokens", "columns"])
def masked_gram_kernel(
    left, right, mask, out, workspace, units, alpha, unit_count, tokens, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for unit in tl.range(tl.program_id(0), unit_count, tl.num_programs(0)):
        row = tl.load(units + unit * 5) * BLOCK_M
        column = tl.load(units + unit * 5 + 1) * BLOCK_N
        first = tl.load(units + unit * 5 + 2)
        last = tl.load(units + unit * 5 + 3)
        slot = tl.load(units + unit * 5 + 4)
        r = row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(first, last):
            t = step * BLOCK_K + tl.arange(0, BLOCK_K)
            real = tl.load(mask + t, mask=t < tokens, other=0) != 0
            x_left = left.load([step * BLOCK_K, row])
            x_right = right.load([step * BLOCK_K, column])
            x_left = tl.where(real[:, None], x_left, 0.0).to(x_left.dtype)
            x_right = tl.where(real[:, None], x_right, 0.0).to(x_right.dtype)
            product = tl.dot(tl.trans(x_left), x_right, product)
        product *= alpha
        if slot == -1:
            add_block(out, r, c, columns, 0, product, True)
        elif slot >= 0:
            part = workspace + slot.to(tl.int64) * (BLOCK_M * BLOCK_N)
            tl.store(part + (r - row)[:, None] * BLOCK_N + (c - column)[None, :], product)


def masked_gram_(out: Tensor, x: Tensor, mask: Tensor, plan: gram_triton.Plan) -> None:
    config = plan.config
    workspace = torch.empty(max(1, plan.workspace), device=x.device)
    left = TensorDescriptor(x, list(x.shape), list(x.stride()), [config.block_k, config.block_m])
    right = TensorDescriptor(x, list(x.shape), list(x.stride()), [config.block_k, config.block_n])
    masked_gram_kernel[(plan.programs,)](
        left, right, mask.view(torch.uint8), out, workspace, plan.units, 1.0, plan.unit_count, *x.shape,
        config.block_m, config.block_n, config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if plan.workspace:
        gram_triton.reduce_kernel[(plan.reduction_count, config.block_m // 2)](
            workspace, out, plan.reductions, plan.splits, x.shape[1], 0,
            config.block_m, config.block_n, 2, plan.parts, True, num_warps=4,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gram_mask.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = {**environment(DEVICE), "triton": triton.__version__}
    major = torch.cuda.get_device_capability()[0]
    for case in CASES:
        xs, mask = inputs(case._replace(masked=True))
        assert mask is not None
        config = choose(case.columns, case.tokens, case.dtype, torch.float32, major, packed=True)
        assert config is not None
        plan = gram_triton.plan(case.columns, case.tokens, case.dtype, True, config, xs[0].device)
        out = SymmetricAccumulator.zeros(case.columns, device=DEVICE, packed=True)

        def copied(x: Tensor, mask: Tensor = mask, out: Tensor = out.storage, plan: gram_triton.Plan = plan) -> None:
            gram_triton.accumulate_(out, rows_triton.gather_rows(x, mask), 1.0, plan)

        ways: dict[str, Callable[[Tensor], object]] = {
            "masked in the kernel": partial(masked_gram_, out.storage, mask=mask, plan=plan),
            "masked copy, then the kernel": copied,
            "the kernel without a mask": partial(gram_triton.accumulate_, out.storage, alpha=1.0, plan=plan),
            "the masked copy alone": partial(rows_triton.gather_rows, mask=mask),
            "torch's plain copy": Tensor.clone,
        }
        for way, run in ways.items():
            out.storage.zero_()
            run(xs[0])
            result = error(out.full(), exact_gram(xs[0], mask, False)) if way.startswith("masked") else None
            row = {
                "tokens": case.tokens,
                "columns": case.columns,
                "way": way,
                "ms": f"{device_ms([partial(run, x) for x in xs]):.4f}",
                "error": "" if result is None else f"{result:.2e}",
                **about,
            }
            print(*list(row.values())[:5], flush=True)
            append_row(options.out, row)


if __name__ == "__main__":
    main()
