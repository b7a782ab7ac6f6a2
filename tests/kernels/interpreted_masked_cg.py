"""Checks MaskedCG's passes in Triton's interpreter; run by test_masked_cg_interpreted.py in a process of its own."""

import gc
import weakref

import torch

from surgeon_kernels.masked_cg import MaskedCG, product
from surgeon_kernels.masked_cg_triton import Passes

from .dense import factor


def problem(rows: int, columns: int, terms: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    pairs = [
        (factor(rows, "plain", 2 * i).float(), factor(columns, "outlier", 2 * i + 1).float()) for i in range(terms)
    ]
    free = torch.rand(rows, columns) < 0.6
    return pairs, free, torch.randn(rows, columns).masked_fill_(~free, 0.0)


def main() -> None:
    torch.manual_seed(0)
    for rows, columns, terms, block in ((5, 7, 1, 2048), (3, 300, 2, 64), (17, 33, 1, 32), (1, 1, 2, 32)):
        pairs, free, b = problem(rows, columns, terms)
        expected = MaskedCG(pairs, free, b.clone())
        decreases = expected.run(5)
        solver = MaskedCG(pairs, free, b.clone())
        passes = Passes(solver, resident=2, block=block, warps=1)
        passes.begin(5, solver._energy)
        for k in range(5):
            product(pairs, solver.direction, out=solver.image, half=solver.half)
            passes.finish(k)
        for name in ("x", "residual", "direction"):
            actual, reference = getattr(solver, name), getattr(expected, name)
            torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        torch.testing.assert_close(passes.decreases, torch.tensor(decreases, dtype=torch.float64), rtol=1e-3, atol=1e-6)
        assert solver.x[~free].eq(0).all() and solver.residual[~free].eq(0).all()
    # Nothing is left to do: nothing moves, and nothing is divided by zero.
    pairs, free, b = problem(4, 6, 1)
    solver = MaskedCG(pairs, free, torch.zeros_like(b))
    passes = Passes(solver, warps=1)
    passes.begin(2, solver._energy)
    for k in range(2):
        product(pairs, solver.direction, out=solver.image, half=solver.half)
        passes.finish(k)
    assert solver.x.eq(0).all() and passes.decreases.eq(0).all()
    # A solver's memory is free as soon as nobody has it any more.
    gc.disable()
    solver._passes, gone = passes, weakref.ref(solver)
    del solver
    assert gone() is None
    print("agrees")


if __name__ == "__main__":
    main()
