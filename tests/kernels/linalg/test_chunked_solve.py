"""The gathered systems: the reference against float64, what is reported, the rule of dispatch and the op's schema."""

import pytest
import torch

from surgeon_kernels import NotPositiveDefiniteError, chunked_solve
from surgeon_kernels.linalg.chunked_solve import chunked_solve_reference, largest_jitter, uses_extension
from surgeon_kernels.linalg.spd_inverse import JITTERS
from tests.kernels.dense import factor, relative_error

NAMES = "G_inv", "A_inv", "rows", "columns", "offsets", "target"


def problem(sizes, R=5, C=9, seed=0, kind="plain"):
    """Factors, ragged chunks of distinct positions in any order, and right sides, in float64."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.randperm(R * C, generator=generator)[:size] for size in sizes])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    target = torch.randn(len(positions), generator=generator, dtype=torch.float64)
    return factor(R, kind, seed + 1), factor(C, kind, seed + 2), positions // C, positions % C, offsets, target


def by_dense_systems(G_inv, A_inv, rows, columns, offsets, target):
    solutions = [
        torch.linalg.solve(G_inv[r][:, r] * A_inv[c][:, c], w)
        for r, c, w in zip(*(x.tensor_split(offsets[1:-1]) for x in (rows, columns, target)), strict=True)
    ]
    return torch.cat(solutions)


@pytest.mark.parametrize("sizes", [[1], [7], [1, 45, 0, 3, 20, 1], [0], [0, 0, 2]])
@pytest.mark.parametrize("kind", ["plain", "outlier", "deficient"])
def test_ragged_chunks_against_dense_systems(sizes, kind):
    arguments = problem(sizes, kind=kind)
    solution, level = chunked_solve(*arguments)
    assert relative_error(solution, by_dense_systems(*arguments)) < 1e-9
    assert level.dtype == torch.int32 and level.tolist() == [0] * len(sizes)


def test_only_the_system_that_needs_it_gets_jitter_of_its_own_diagonal():
    """Its mean diagonal is its own, also when it is padded to the size of a larger one."""
    A_inv = torch.eye(6, dtype=torch.float64) * 100
    A_inv[:2, :2] = 100.0
    columns = torch.tensor([2, 3, 4, 5, 0, 1, 2])
    offsets = torch.tensor([0, 4, 6, 7])
    target = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 6.0], dtype=torch.float64)
    solution, level = chunked_solve(torch.ones(1, 1).double(), A_inv, columns * 0, columns, offsets, target)
    assert level.tolist() == [0, 1, 0]
    system = A_inv[:2, :2] + JITTERS[1] * 100 * torch.eye(2)
    assert relative_error(solution[4:6], torch.linalg.solve(system, target[4:6])) < 1e-6
    assert torch.equal(solution[[0, 1, 2, 3, 6]], target[[0, 1, 2, 3, 6]] / 100)
    assert largest_jitter(level, offsets) == JITTERS[1]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_system_beyond_repair_is_reported_and_the_others_are_solved(bad):
    G_inv, A_inv, rows, columns, offsets, target = problem([4, 6, 3])
    G_inv = torch.block_diag(G_inv, torch.full((1, 1), bad, dtype=torch.float64))
    rows[4:10] = 5
    solution, level = chunked_solve(G_inv, A_inv, rows, columns, offsets, target)
    assert level.tolist() == [0, len(JITTERS), 0]
    assert solution[4:10].eq(0).all() and solution.isfinite().all()
    for part in (slice(0, 4), slice(10, 13)):
        whole = torch.tensor([0, part.stop - part.start])
        good = by_dense_systems(G_inv, A_inv, rows[part], columns[part], whole, target[part])
        assert relative_error(solution[part], good) < 1e-9
    with pytest.raises(NotPositiveDefiniteError, match="system of 6 correlated weights"):
        largest_jitter(level, offsets)


def test_no_chunks():
    empty = torch.zeros(0, dtype=torch.int64)
    solution, level = chunked_solve(torch.eye(2), torch.eye(3), empty, empty, torch.zeros(1).long(), torch.zeros(0))
    assert solution.shape == level.shape == (0,) and largest_jitter(level, torch.zeros(1).long()) == 0.0


def test_the_dispatch_rule(monkeypatch):
    assert not uses_extension(torch.zeros(1))
    monkeypatch.setattr("surgeon_kernels.runtime.extension.available", lambda device=None: True)
    assert not uses_extension(torch.zeros(1))  # the CPU, whatever there is


def test_offsets_and_lengths_must_agree():
    G_inv, A_inv, rows, columns, offsets, target = problem([4, 6])
    with pytest.raises(ValueError, match="offsets"):
        chunked_solve(G_inv, A_inv, rows, columns, offsets[:-1], target)
    with pytest.raises(ValueError, match="offsets"):
        chunked_solve(G_inv, A_inv, rows, columns, offsets[:0], target)
    with pytest.raises(ValueError, match="must not decrease"):
        chunked_solve(G_inv, A_inv, rows, columns, torch.tensor([0, 6, 4, 10]), target)
    with pytest.raises(ValueError, match="one length"):
        chunked_solve(G_inv, A_inv, rows[:-1], columns, offsets, target)


@pytest.mark.parametrize("which", ["rows", "columns"])
@pytest.mark.parametrize("index", [-1, 9, 1 << 40])
def test_positions_outside_the_factors_are_refused(which, index):
    arguments = dict(zip(NAMES, problem([4, 6], R=9, C=9), strict=True))
    arguments[which][7] = index
    with pytest.raises(ValueError, match=f"{which} must be from 0 to 8"):
        chunked_solve(**arguments)


def test_what_cannot_be_gathered_is_refused_by_name():
    arguments = dict(zip(NAMES, problem([4, 6]), strict=True))
    for name, wrong, error, message in (
        ("G_inv", torch.zeros(5, 6).double(), ValueError, "G_inv must be a square matrix"),
        ("A_inv", arguments["A_inv"].float(), TypeError, "one dtype"),
        ("rows", arguments["rows"].int(), TypeError, "rows must be int64"),
        ("offsets", arguments["offsets"].int(), TypeError, "offsets must be int64"),
        ("rows", arguments["rows"].to("meta"), ValueError, "one device"),
        ("target", torch.zeros(10).long(), TypeError, "dtype"),
    ):
        with pytest.raises(error, match=message):
            chunked_solve(**{**arguments, name: wrong})


def test_the_op_is_registered_with_a_fake_kernel():
    arguments = problem([3, 0, 5])
    torch.library.opcheck(torch.ops.surgeon_kernels.chunked_solve.default, arguments)
    expected = chunked_solve_reference(*arguments)
    for actual, value in zip(torch.ops.surgeon_kernels.chunked_solve(*arguments), expected, strict=True):
        assert torch.equal(actual, value)
    assert "Tensor(a!) Y" in str(torch.ops.surgeon_kernels.chunked_sequence_.default._schema)
