"""Checks FusedCG in Triton's interpreter; run by test_interpreted.py in a process of its own."""

import gc
import weakref
from unittest import mock

import torch

from surgeon_kernels import joint_update
from surgeon_kernels.linalg.kron_product import scaled_parts_reference
from surgeon_kernels.linalg.kron_product_triton import scaled_parts_rows, scaled_rows
from surgeon_kernels.linalg.low_rank import leading_vectors, low_rank_correction
from surgeon_kernels.linalg.masked_cg import FusedCG, MaskedCG
from surgeon_kernels.updates import joint_update as module
from tests.kernels.dense import factor, random_mask, random_weight


class InSingle(FusedCG):
    """The kernels around a product in float32, which the reference can be compared with closely."""

    operands = torch.float32

    def _multiply(self) -> None:
        if len(self._terms) > 1:
            return super()._multiply()
        (L, M), (g, a) = self._terms[0], self._scales
        self._image.zero_()
        self._inside(self._image).copy_((g[:, None] * L * g) @ self._inside(self._direction) @ (a[:, None] * M * a))


def problem(rows: int, columns: int, terms: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    pairs = [
        (factor(rows, "plain", 2 * i).float(), factor(columns, "outlier", 2 * i + 1).float()) for i in range(terms)
    ]
    free = torch.rand(rows, columns) < 0.6
    return pairs, free, torch.randn(rows, columns).masked_fill_(~free, 0.0)


def the_iterations() -> None:
    for rows, columns, terms, block in ((5, 7, 1, 2048), (3, 300, 2, 64), (17, 33, 1, 32), (1, 1, 2, 32)):
        pairs, free, b = problem(rows, columns, terms)
        expected = MaskedCG(pairs, free, b.clone())
        solver = InSingle(pairs, free, b.clone(), resident=2, block=block, warps=1)
        solver._image.fill_(torch.nan)
        solver._half.fill_(torch.nan)
        for iterations in (3, 2):
            decreases = torch.tensor(solver.run(iterations))
            torch.testing.assert_close(decreases, torch.tensor(expected.run(iterations)), rtol=1e-3, atol=1e-6)
        for name in ("x", "residual"):
            actual, reference = getattr(solver, name), getattr(expected, name)
            torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
        assert solver.x[~free].eq(0).all() and solver.residual[~free].eq(0).all()
    # With a correction, of the dual of the same operator.
    for rows, columns, block in ((20, 33, 32), (5, 40, 64), (1, 1, 32)):
        pairs, free, b = problem(rows, columns, 1)
        correction = low_rank_correction(*(leading_vectors(torch.linalg.inv(M), M) for M in pairs[0]), free)
        expected = MaskedCG(pairs, free, b.clone(), correction)
        solver = InSingle(pairs, free, b.clone(), correction, resident=2, block=block, warps=1)
        for iterations in (2, 1):
            decreases = torch.tensor(solver.run(iterations))
            torch.testing.assert_close(decreases, torch.tensor(expected.run(iterations)), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(solver.x, expected.x, rtol=1e-3, atol=1e-4 * float(expected.x.abs().max()))
        assert solver.x[~free].eq(0).all() and solver.residual[~free].eq(0).all()
    # Nothing is left to do: nothing moves, and nothing is divided by zero.
    pairs, free, b = problem(4, 6, 1)
    solver = FusedCG(pairs, free, torch.zeros_like(b), warps=1)
    assert solver.run(2) == [0.0, 0.0] and solver.x.eq(0).all()
    # A solver's memory is free as soon as nobody has it any more.
    gc.disable()
    gone = weakref.ref(solver)
    del solver
    assert gone() is None


def in_half_precision() -> None:
    """Whole solves with float16 operands end within the tolerance of the optimum in float64's eyes."""
    # The weights' scale is that of the operands, which must fit the range of float16.
    for kinds, scale in ((("plain", "outlier"), 1e-6), (("outlier", "deficient"), 1e4)):
        W, pruned = random_weight(12, 16, 0), random_mask(12, 16, "random", 1)
        G, A = factor(12, kinds[0], 2), factor(16, kinds[1], 3)
        inputs = [W, pruned, G, A, torch.linalg.inv(G), torch.linalg.inv(A)]
        best = joint_update(*inputs, tolerance=1e-6, max_iterations=2000).objective[-1]
        half = [x if x.dtype == torch.bool else x.float() for x in inputs]
        half[0] = half[0] * scale
        with mock.patch.object(module, "masked_cg", FusedCG):
            result = joint_update(*half)
        delta = result.delta.double() / scale
        true = 0.5 * float((delta * (G @ delta @ A)).sum())
        assert result.gap <= 0.01 and best * (1 - 1e-4) <= true <= 1.015 * best, (kinds, scale, true / best)


def the_parts() -> None:
    x, rows, columns = torch.randn(3, 2100)[:, ::2], torch.rand(3), torch.rand(1050)
    for parts in (1, 2):
        expected = scaled_parts_reference(x, rows, columns, parts)
        torch.testing.assert_close(scaled_parts_rows(x, rows, columns, parts)[0], expected[0], rtol=2e-3, atol=1e-7)
    expected = x * rows[:, None] * columns
    torch.testing.assert_close(scaled_rows(x, rows, columns, torch.empty(3, 1050)), expected)
    own = x.contiguous()
    torch.testing.assert_close(scaled_rows(own, rows, columns, own), expected)
    hi, lo = scaled_parts_rows(x, rows, columns, 2).double()
    torch.testing.assert_close(hi + lo / 2**11, x.double() * rows[:, None] * columns, rtol=2**-21, atol=1e-9)


def main() -> None:
    torch.manual_seed(0)
    the_iterations()
    in_half_precision()
    the_parts()
    print("agrees")


if __name__ == "__main__":
    main()
