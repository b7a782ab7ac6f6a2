"""Chunked solves and updates on a CUDA device, against float64 and PyTorch's own error."""

import subprocess
import sys

import pytest
import torch

from surgeon_kernels import NotPositiveDefiniteError, chunked_solve, chunked_update
from surgeon_kernels.linalg.chunked_solve import chunked_solve_reference
from surgeon_kernels.linalg.spd_inverse import JITTERS
from surgeon_kernels.runtime import extension
from surgeon_kernels.updates import chunked_update as module
from tests.kernels.dense import with_condition
from tests.kernels.linalg.test_chunked_solve import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OUTSIDE = """
import torch
from surgeon_kernels import chunked_solve
index = torch.arange({size}, device="cuda")
index[{size} // 2] = {index}
offsets = torch.tensor([0, {size}])
S = torch.eye({size}, device="cuda")
arguments = S, S, index.clamp(0, {size} - 1), index, offsets, torch.ones({size}, device="cuda")
try:
    chunked_solve(*arguments)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("refused", error)
"""
OUTSIDE_PENDING = """
import torch
from surgeon_kernels.runtime import extension
from surgeon_kernels.updates import chunked_update as module
assert extension.available()
S, Y = torch.eye(8, device="cuda"), torch.zeros(8, 8, device="cuda")
rows, columns = torch.tensor([2, {row}], device="cuda"), torch.tensor([0, 1], device="cuda")
row_offsets = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2], device="cuda")
offsets, ranges = torch.tensor([0, 2]), torch.tensor([[2, 4]])
arguments = Y, torch.ones(2, 8, device="cuda"), S, S, rows, columns, row_offsets, offsets, ranges, 2
try:
    torch.ops.surgeon_kernels.chunked_sequence_(*arguments)
    torch.cuda.synchronize()
    print("accepted", round(Y[2, 0].item(), 4), round(Y[3, 1].item(), 4))
except RuntimeError as error:
    print("refused", error)
"""
SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 193, 224, 255, 256, 257, 384, 385, 512, 700, 1100]


@pytest.fixture(autouse=True)
def built():
    assert extension.available(), extension.obstacle()


def on_device(arguments):
    """Float32 on the device; offsets stay."""
    G_inv, A_inv, rows, columns, offsets, target = arguments
    return (*(x.float().cuda() for x in (G_inv, A_inv)), rows.cuda(), columns.cuda(), offsets, target.float().cuda())


def residuals(arguments, solution):
    G_inv, A_inv, rows, columns, offsets, target = arguments
    found = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        r, c, w = rows[start:end], columns[start:end], target[start:end].double()
        S = G_inv.double()[r][:, r] * A_inv.double()[c][:, c]
        found.append(float((S @ solution[start:end].double() - w).norm() / w.norm().clamp_min(1e-30)))
    return torch.tensor(found)


def check(arguments):
    """Every residual is at most twice PyTorch's."""
    arguments = on_device(arguments)
    solution, level = chunked_solve(*arguments)
    assert not level.any()
    theirs, _ = chunked_solve_reference(*arguments)
    ratio = residuals(arguments, solution) / residuals(arguments, theirs).clamp_min(2**-22)
    report = torch.stack([arguments[4].diff().double(), ratio], dim=1).tolist()
    assert ratio.max() <= 2, report


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size):
    check(problem([size] * 3, R=60, C=70, seed=size))


@pytest.mark.parametrize("size", [20, 200, 700])
@pytest.mark.parametrize("index", [-1, 5000, 1 << 33])
def test_a_position_outside_the_factors_stops_the_device_before_it_is_read(size, index):
    """In a process of its own, as an assertion that fails on a device ends all work there."""
    command = [sys.executable, "-c", OUTSIDE.format(size=size, index=index)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout[-2000:]
    assert "a position outside the inverse factors" in done.stdout


@pytest.mark.parametrize("row, outside", [(3, False), (1, True), (4, True)])
def test_a_position_outside_the_rows_of_a_block_stops_the_device_before_it_is_read(row, outside):
    command = [sys.executable, "-c", OUTSIDE_PENDING.format(row=row)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert ("refused" in done.stdout and "outside the rows of the targets" in done.stdout) == outside, done.stdout
    assert ("accepted 1.0 1.0" in done.stdout) == (not outside), done.stdout


def test_ragged_chunks():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 700, (60,), generator=generator).tolist()
    check(problem([*sizes, 0, 1, *SIZES, 0], R=60, C=70, seed=1))


@pytest.mark.parametrize("size", [60, 190, 700])
@pytest.mark.parametrize("kind", ["outlier", "deficient"])
def test_kinds_of_factors(size, kind):
    check(problem([size] * 4, R=60, C=70, kind=kind))


@pytest.mark.parametrize("size", [64, 200, 600, 1500])
def test_ill_conditioned_systems(size):
    A_inv = with_condition(size, 1e6, 0)
    columns = torch.cat([torch.randperm(size, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    rows = torch.arange(4).repeat_interleave(size)
    target = torch.randn(4 * size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    G_inv = torch.diag(torch.tensor([1.0, 2.0, 0.3, 1e-3], dtype=torch.float64))
    check((G_inv, A_inv, rows, columns, torch.arange(5) * size, target))


@pytest.mark.parametrize("size", [3, 70, 300])
def test_jitter_and_failures_are_those_of_the_reference(size):
    """Chunk 0 is sound, 1 has an eigenvalue of -5e-5 and needs 1e-4, 2 is beyond repair, 3 holds NaN, 4 infinity."""
    n = 2 * size
    A_inv = torch.eye(n, dtype=torch.float64)
    A_inv[:2, :2] = torch.tensor([[1.0, 1 + 5e-5], [1 + 5e-5, 1.0]])
    G_inv = torch.diag(torch.tensor([1.0, 1.0, -1.0, float("nan"), float("inf")], dtype=torch.float64))
    columns = torch.cat([torch.arange(size, n), torch.arange(size).repeat(4)])
    rows = torch.arange(5).repeat_interleave(size)
    target = torch.randn(5 * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = on_device((G_inv, A_inv, rows, columns, torch.arange(6) * size, target))
    solution, level = chunked_solve(*arguments)
    expected, expected_level = chunked_solve_reference(*arguments)
    assert level.tolist() == expected_level.tolist() == [0, 3, *[len(JITTERS)] * 3]
    assert solution.isfinite().all() and solution[2 * size :].eq(0).all()
    torch.testing.assert_close(solution, expected, rtol=2e-2, atol=1e-3)  # its condition number is 4e4


@pytest.mark.parametrize("size", [64, 200, 257, 1000])
def test_systems_of_rank_one_never_give_nan(size):
    ones = torch.ones(size, size, dtype=torch.float64)
    target = torch.randn(3 * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.zeros(3 * size, dtype=torch.int64)
    arguments = on_device((ones[:1, :1], ones, rows, torch.arange(size).repeat(3), torch.arange(4) * size, target))
    solution, level = chunked_solve(*arguments)
    assert solution.isfinite().all()
    assert (level > 0).all() and (level < len(JITTERS)).all()


def test_the_same_inputs_give_the_same_bits():
    arguments = on_device(problem([1, 64, 100, 200, 256, 300, 900, 1100, 40], R=60, C=70))
    results = [chunked_solve(*arguments)[0] for _ in range(6)]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_decreasing_offsets_are_an_error():
    G_inv, A_inv, rows, columns, _, target = on_device(problem([4, 6], R=60, C=70))
    with pytest.raises(RuntimeError, match="must not decrease"):
        chunked_solve(G_inv, A_inv, rows, columns, torch.tensor([0, 6, 4, 10]), target)


def test_every_solution_is_written():
    arguments = on_device(problem([5, 0, 300, 64], R=60, C=70))
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert chunked_solve(*arguments)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck():
    for sizes in ([3, 0, 5], [300, 20]):
        torch.library.opcheck(torch.ops.surgeon_kernels.chunked_solve.default, on_device(problem(sizes, R=20, C=20)))


def layer(R, C, density, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(R, C, generator=generator, device="cuda")
    inverses = []
    for n in (R, C):
        x = torch.randn(2 * n, n, generator=generator, device="cuda", dtype=torch.float64)
        x = x + x.roll(1, dims=1)
        M = x.T @ x / len(x)
        inverses.append(torch.linalg.inv(M + 0.05 * M.diagonal().mean() * torch.eye(n, device="cuda")))
    return weight, torch.rand(R, C, generator=generator, device="cuda") < density, *inverses


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    ("R", "C", "density", "m"),
    [
        (40, 70, 0.5, 20),
        (60, 601, 0.5, 200),
        (33, 1000, 0.6, 256),
        (70, 130, 0.05, 300),
        (300, 64, 0.02, 100),
        (24, 900, 0.5, 2000),
    ],
)
def test_updates_follow_float64(R, C, density, m, sequential):
    weight, pruned, G_inv, A_inv = layer(R, C, density)
    pruned[R // 2] = False
    exact = chunked_update(weight.double(), pruned, G_inv, A_inv, max_correlated=m, sequential=sequential).delta
    ours, jitter = chunked_update(weight, pruned, G_inv.float(), A_inv.float(), max_correlated=m, sequential=sequential)
    rule, module.uses_extension = module.uses_extension, lambda x: False
    try:
        theirs = chunked_update(weight, pruned, G_inv.float(), A_inv.float(), max_correlated=m, sequential=True).delta
    finally:
        module.uses_extension = rule
    assert jitter == 0.0
    assert torch.equal(ours[pruned], -weight[pruned])
    error = float((ours.double() - exact).norm() / exact.norm())
    assert error < 1e-5
    if sequential:
        assert error <= 2 * float((theirs.double() - exact).norm() / exact.norm())


def test_small_blocks_of_chunks_give_the_same_update(monkeypatch):
    weight, pruned, G_inv, A_inv = layer(40, 300, 0.5)
    arguments = weight, pruned, G_inv.float(), A_inv.float()
    whole = chunked_update(*arguments, max_correlated=64).delta
    monkeypatch.setattr(module, "_PENDING_ROWS", 3)
    split = chunked_update(*arguments, max_correlated=64).delta
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(split, chunked_update(*arguments, max_correlated=64).delta)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_system_beyond_repair_is_an_error(sequential, bad):
    weight, pruned = torch.randn(2, 3, device="cuda"), torch.ones(2, 3, device="cuda").bool()
    with pytest.raises(NotPositiveDefiniteError, match="system of 6 correlated weights"):
        chunked_update(
            weight, pruned, torch.eye(2, device="cuda"), bad * torch.eye(3, device="cuda"), sequential=sequential
        )


def test_the_sequence_op_is_registered_with_a_fake_kernel():
    weight, pruned, G_inv, A_inv = layer(6, 40, 0.5)
    rows, columns = pruned.nonzero(as_tuple=True)
    counts = pruned.sum(dim=1).cpu()
    offsets = module._chunk_offsets(counts.tolist(), 30)
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cuda()
    ranges = module._row_ranges(counts, offsets)
    arguments = torch.zeros_like(weight), weight.clone(), G_inv.float().mT, A_inv.float().mT, rows, columns
    torch.library.opcheck(
        torch.ops.surgeon_kernels.chunked_sequence_.default, (*arguments, row_offsets, offsets, ranges, 0)
    )
