"""How the joint update gets there: its start, its trace, its estimate of the gap and when it stops."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import chunked_update, damp, joint_update

from . import dense
from .dense import (
    assert_exactly_zero,
    assert_never_increases,
    build,
    problems,
    random_mask,
    random_weight,
    relative_error,
    repeatable,
    typical,
    zeroing,
)

# The package exports a function under the module's name.
module = importlib.import_module("surgeon_kernels.joint_update")

INF, NAN = float("inf"), float("nan")


def power_law(n, power, seed, damping):
    """A damped factor whose eigenvalues fall as those of real layers do."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(x).Q
    return damp((Q * torch.arange(1, n + 1) ** -power) @ Q.T, damping)


@pytest.mark.parametrize("started", [False, True])
def test_the_trace_is_the_true_objective_of_every_iterate(started):
    W, pruned, G, A = typical()
    start = random_weight(8, 12, 9) if started else None
    full = joint_update(W, pruned, G, A, start=start, tolerance=0.0, max_iterations=25).objective
    assert len(full) == 26
    assert_never_increases(full)
    assert full[0] > 1.5 * full[-1]
    for k in (0, 1, 2, 5, 12, 25):
        result = joint_update(W, pruned, G, A, start=start, tolerance=0.0, max_iterations=k)
        assert result.objective == full[: k + 1]
        assert dense.objective(result.delta, G, A) == pytest.approx(full[k], rel=1e-10)
        assert_exactly_zero(W, pruned, result.delta)


def test_without_a_start_it_begins_at_zeroing():
    W, pruned, G, A = typical()
    result = joint_update(W, pruned, G, A, max_iterations=0)
    assert torch.equal(result.delta, zeroing(W, pruned))
    assert result.objective == [pytest.approx(dense.objective(result.delta, G, A), rel=1e-12)]
    assert result.gap == INF


@repeatable
@given(problems, st.sampled_from([1.0, -1.0, 1e-6, 1e6]))
def test_the_start_is_scaled_by_its_exact_line_search(problem, factor_of_start):
    W, pruned, G, A = build(problem)
    start = factor_of_start * random_weight(*W.shape, problem[-1] + 7)
    result = joint_update(W, pruned, G, A, start=start, max_iterations=0)
    base, step = zeroing(W, pruned), start.masked_fill(pruned, 0.0)
    # ½ (b + s d)ᵀ F (b + s d) is least at s = - dᵀ F b / dᵀ F d.
    F, b, d = dense.kron(G, A), base.flatten(), step.flatten()
    curvature = float(d @ F @ d)
    scale = -float(d @ F @ b) / curvature if curvature else 0.0
    assert relative_error(result.delta, base + scale * step) < 1e-7
    best = dense.objective(base + scale * step, G, A)
    assert result.objective[0] == pytest.approx(best, rel=1e-7, abs=1e-10 * dense.objective(base, G, A))
    around = [dense.objective(base + s * scale * step, G, A) for s in torch.linspace(0, 2, 21).tolist()]
    assert result.objective[0] <= min(around) * (1 + 1e-9)


def test_the_start_at_pruned_weights_is_ignored():
    W, pruned, G, A = typical()
    start = random_weight(8, 12, 5)
    expected = joint_update(W, pruned, G, A, start=start, max_iterations=3)
    before = start.masked_fill(pruned, NAN)
    result = joint_update(W, pruned, G, A, start=before, max_iterations=3)
    assert torch.equal(result.delta, expected.delta) and result.objective == expected.objective
    assert torch.equal(before.isnan(), pruned)


def test_a_zero_start_is_no_start():
    W, pruned, G, A = typical()
    plain = joint_update(W, pruned, G, A, max_iterations=4)
    zero = joint_update(W, pruned, G, A, start=torch.zeros_like(W), max_iterations=4)
    assert torch.equal(plain.delta, zero.delta) and plain.objective == zero.objective


def test_a_chunked_start_is_never_made_worse_and_saves_iterations():
    W, pruned, G, A = typical(R=16, C=24)
    start = chunked_update(W, pruned, torch.linalg.inv(G), torch.linalg.inv(A), max_correlated=24).delta
    plain = joint_update(W, pruned, G, A, max_iterations=10, tolerance=0.0)
    started = joint_update(W, pruned, G, A, start=start, max_iterations=10, tolerance=0.0)
    assert started.objective[0] <= dense.objective(start, G, A)
    assert started.objective[0] < 0.75 * plain.objective[0]
    assert started.objective[-1] < plain.objective[-1]


def test_the_optimum_as_start_stays():
    W, pruned, G, A = typical()
    best = dense.update(W, pruned, G, A)
    result = joint_update(W, pruned, G, A, start=best, tolerance=1e-3)
    assert result.gap <= 1e-3
    assert relative_error(result.delta, best) < 1e-6


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("tolerance", [0.05, 0.01, 0.001])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_tolerance_bounds_the_true_gap(power, tolerance, started):
    """Spectra from easy to hard: the reported gap is within a factor of a few of the true one."""
    for seed in range(2):
        W = random_weight(16, 24, seed)
        G, A = power_law(16, power, seed + 1, 0.1), power_law(24, power, seed + 2, 0.01)
        pruned = random_mask(16, 24, "random", seed + 3)
        start = None
        if started:
            G_inv, A_inv = torch.linalg.inv(G), torch.linalg.inv(A)
            start = chunked_update(W, pruned, G_inv, A_inv, max_correlated=16, sequential=False).delta
        result = joint_update(W, pruned, G, A, start=start, tolerance=tolerance, max_iterations=1000)
        best = dense.optimum(W, pruned, G, A)
        gap = (dense.objective(result.delta, G, A) - best) / best
        assert result.gap <= tolerance
        assert gap <= 2 * tolerance
        assert result.gap / 30 < gap + 1e-12 and gap < 3 * result.gap + 1e-12
        assert 8 <= len(result.objective) - 1 < 300


def test_a_smaller_tolerance_takes_more_iterations():
    W, pruned, G, A = typical(R=16, C=24)
    lengths = [len(joint_update(W, pruned, G, A, tolerance=t).objective) for t in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert lengths == sorted(set(lengths))


@pytest.mark.parametrize("cap", [0, 1, 3, 7])
def test_too_few_iterations_to_tell_the_gap(cap):
    W, pruned, G, A = typical()
    result = joint_update(W, pruned, G, A, tolerance=0.5, max_iterations=cap)
    assert result.gap == INF
    assert len(result.objective) == cap + 1


def test_estimated_gap_is_exact_for_a_power_law_and_safe_for_a_geometric_series():
    best = 4.0
    for power in (0.5, 1.0, 2.0):
        trace = [best + 10.0 * (k + 1e-9) ** -power for k in range(1, 91)]
        trace = [trace[0], *trace]  # index k holds the value at k, so 4n/9, 2n/3 and n are exact for n = 90
        assert module.estimated_gap(trace) == pytest.approx((trace[-1] - best) / best, rel=1e-6)
    for ratio in (0.6, 0.8, 0.9):  # reports about the gap of 8n/9 iterations
        trace = [best + 10.0 * ratio**k for k in range(37)]
        gaps = [(value - best) / best for value in trace]
        assert gaps[36] <= module.estimated_gap(trace) <= 3 * gaps[32]


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ([0.0], 0.0),
        ([5.0], INF),
        ([5.0, 0.0], 0.0),
        ([9.0 - k for k in range(8)], INF),  # too few
        ([99.0 - k for k in range(10)], INF),  # decreases that do not shrink
        ([100.0 - k * k for k in range(10)], INF),  # decreases that grow
        ([9.0, 3.0, 2.0, 1.5, *[1.0] * 12], 0.0),  # nothing left to gain
        ([NAN], INF),
    ],
)
def test_estimated_gap_of_hand_made_traces(trace, expected):
    assert module.estimated_gap(trace) == expected
