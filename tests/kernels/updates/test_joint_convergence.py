"""The path of the joint update: its start, its trace, its estimate of the gap and its end."""

from itertools import pairwise

import pytest
import torch

from surgeon_kernels import damp, joint_estimate, joint_update
from surgeon_kernels.linalg import masked_cg
from surgeon_kernels.updates import joint_update as module
from surgeon_kernels.updates.convergence import estimated_gap, still_to_rise
from tests.kernels import dense
from tests.kernels.dense import (
    assert_exactly_zero,
    assert_never_increases,
    random_mask,
    random_weight,
    typical,
    zeroing,
)

INF, NAN = float("inf"), float("nan")


def power_law(n, power, seed, damping):
    """A damped factor whose eigenvalues fall as those of real layers do."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(x).Q
    return damp((Q * torch.arange(1, n + 1) ** -power) @ Q.T, damping)


def inverses(G, A):
    return torch.linalg.inv(G), torch.linalg.inv(A)


def test_the_trace_is_the_true_objective_of_every_iterate_on_the_kept_weights():
    W, pruned, G, A = typical()
    full = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=24).objective
    assert len(full) == 25
    assert_never_increases(full)
    assert full[0] == pytest.approx(dense.objective(zeroing(W, pruned), G, A), rel=1e-12)
    assert full[0] > 1.5 * full[-1]
    for k in (0, 1, 2, 5, 12, 24):
        result = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=k)
        assert result.objective == pytest.approx(full[: k + 1], rel=1e-9)
        assert dense.objective(result.delta, G, A) == pytest.approx(full[k], rel=1e-9)
        assert_exactly_zero(W, pruned, result.delta)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.65])
def test_the_bound_rises_to_the_optimum_from_below(density):
    W, pruned, G, A = typical(R=16, C=24, density=density)
    best = dense.optimum(W, pruned, G, A)
    result = joint_update(W, pruned, G, A, *inverses(G, A), tolerance=1e-6, max_iterations=300)
    assert result.bound[0] == 0.0
    assert all(later >= earlier for earlier, later in pairwise(result.bound))
    assert result.bound[-1] <= best * (1 + 1e-9) and result.bound[-1] >= best * (1 - 1e-6)
    assert result.gap == pytest.approx(result.objective[-1] / result.bound[-1] - 1, abs=1e-12)
    assert result.objective[-1] == pytest.approx(dense.objective(result.delta, G, A), rel=1e-10)


@pytest.mark.parametrize("cap", [0, 1, 3, 7, 20])
@pytest.mark.parametrize("dual", [False, True])
def test_the_cap_holds_for_both_parts_together_and_the_result_is_feasible(cap, dual):
    W, pruned, G, A = typical(R=16, C=24)
    result = joint_update(W, pruned, G, A, *(inverses(G, A) if dual else ()), tolerance=0.0, max_iterations=cap)
    assert len(result.objective) + len(result.bound) - 2 == cap
    assert_exactly_zero(W, pruned, result.delta)
    best = dense.optimum(W, pruned, G, A)
    assert result.objective[-1] == pytest.approx(dense.objective(result.delta, G, A), rel=1e-10)
    if dual and cap:  # certified: never below the true gap
        assert result.gap >= result.objective[-1] / best - 1 - 1e-9
    elif cap < 8:  # too few iterations to tell
        assert result.gap == INF
    if cap == 0:
        assert torch.equal(result.delta, zeroing(W, pruned))


def test_few_kept_weights_are_solved_for_directly():
    W, pruned, G, A = typical(R=16, C=24, density=0.8, kind="plain")
    with_inverses = joint_update(W, pruned, G, A, *inverses(G, A))
    without = joint_update(W, pruned, G, A)
    assert with_inverses.bound == [0.0] and with_inverses.objective == without.objective


def test_few_kept_weights_that_depend_on_each_other_are_solved_by_the_dual():
    W, pruned = random_weight(24, 32, 0), random_mask(24, 32, "random", 1, 0.7)
    G, A = power_law(24, 2.0, 1, 0.01), power_law(32, 2.0, 2, 0.001)
    result = joint_update(W, pruned, G, A, *inverses(G, A))
    assert result.bound[-1] > 0.0 and result.gap <= 0.01
    assert result.objective[-1] <= 1.01 * dense.optimum(W, pruned, G, A)


def outliers(n, seed):
    """A factor whose few outlier channels carry four orders of magnitude more than the others."""
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x += 100 * torch.randn(4 * n, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) @ x[:2]
    return damp(x.T @ x / (4 * n), 1e-4)


def test_outlier_channels_do_no_harm_to_the_dual():
    W, pruned, G, A = random_weight(24, 32, 0), random_mask(24, 32, "random", 1), outliers(24, 2), outliers(32, 3)
    best = dense.optimum(W, pruned, G, A)
    assert float(torch.linalg.cond(G)) > 1e3
    dual = joint_update(W, pruned, G, A, *inverses(G, A))
    kept = joint_update(W, pruned, G, A, tolerance=0.0, max_iterations=len(dual.bound) + len(dual.objective) - 2)
    assert dual.objective[-1] <= 1.01 * best
    assert kept.objective[-1] > 1.5 * best


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("tolerance", [0.05, 0.01, 0.001])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_tolerance_bounds_the_true_gap(power, tolerance, dual):
    """Spectra from easy to hard. A certified gap is never too small, an estimated one by a factor of a few."""
    for seed in range(2):
        W = random_weight(16, 24, seed)
        G, A = power_law(16, power, seed + 1, 0.1), power_law(24, power, seed + 2, 0.01)
        pruned = random_mask(16, 24, "random", seed + 3)
        inverse = inverses(G, A) if dual else ()
        result = joint_update(W, pruned, G, A, *inverse, tolerance=tolerance, max_iterations=1000)
        best = dense.optimum(W, pruned, G, A)
        gap = (dense.objective(result.delta, G, A) - best) / best
        assert result.gap <= tolerance
        assert gap <= (1.0 if dual else 2.0) * tolerance
        assert -1e-9 <= gap <= (1.0 if dual else 3.0) * result.gap + 1e-9
        assert 8 <= len(result.objective) + len(result.bound) - 2 < 300


@pytest.mark.parametrize("dual", [False, True])
def test_a_smaller_tolerance_takes_more_iterations(dual):
    W, pruned, G, A = typical(R=16, C=24)
    inverse = inverses(G, A) if dual else ()
    results = [joint_update(W, pruned, G, A, *inverse, tolerance=t) for t in (1e-1, 1e-3, 1e-5)]
    lengths = [len(result.objective) + len(result.bound) for result in results]
    assert lengths == sorted(set(lengths))


def test_lost_precision_is_found_and_made_good(monkeypatch):
    """Products wrong by a part in a thousand, as TF32's are: the iterations alone would end elsewhere."""
    noise = 1e-3 * torch.randn(16, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def rough(terms, X):
        return exact(terms, X) * (1 + noise)

    exact = masked_cg.product
    monkeypatch.setattr(masked_cg, "product", rough)
    W, pruned = random_weight(16, 24, 0), random_mask(16, 24, "random", 3)
    G, A = power_law(16, 1.0, 1, 0.1), power_law(24, 1.0, 2, 0.01)
    best = dense.optimum(W, pruned, G, A)
    for inverse in ((), inverses(G, A)):
        result = joint_update(W, pruned, G, A, *inverse, tolerance=1e-3)
        assert result.objective[-1] == pytest.approx(dense.objective(result.delta, G, A), rel=1e-10)
        assert best <= result.objective[-1] <= 1.002 * best


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ([0.0], INF),
        ([0.0, *[1.0] * 9], 0.0),
        ([float(k) for k in range(10)], INF),  # rises that do not shrink
        ([1 - 0.5**k for k in range(13)], 0.5**12 / (1 - 0.5**12)),
    ],
)
def test_still_to_rise_is_exact_for_a_geometric_series(bound, expected):
    assert still_to_rise(bound) == pytest.approx(expected)


def test_estimated_gap_is_exact_for_a_power_law_and_safe_for_a_geometric_series():
    best = 4.0
    for power in (0.5, 1.0, 2.0):
        trace = [best + 10.0 * (k + 1e-9) ** -power for k in range(1, 91)]
        trace = [trace[0], *trace]  # index k holds the value at k, so 4n/9, 2n/3 and n are exact for n = 90
        assert estimated_gap(trace) == pytest.approx((trace[-1] - best) / best, rel=1e-6)
    for ratio in (0.6, 0.8, 0.9):  # reports about the gap of 8n/9 iterations
        trace = [best + 10.0 * ratio**k for k in range(37)]
        gaps = [(value - best) / best for value in trace]
        assert gaps[36] <= estimated_gap(trace) <= 3 * gaps[32]


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
    assert estimated_gap(trace) == expected


def test_an_estimate_knows_the_optimums_gradient_and_value():
    W, pruned, G, A = typical(kind="plain")
    best = joint_update(W, pruned, G, A, *inverses(G, A), tolerance=0.0, max_iterations=400)
    result = joint_estimate(W, pruned, G, A, *inverses(G, A), tolerance=1e-9)
    assert result.objective == [] and result.gap == INF
    assert result.bound[-1] == pytest.approx(best.objective[-1], rel=1e-6)
    assert result.gradient[~pruned].eq(0.0).all()
    torch.testing.assert_close(result.gradient, best.gradient, rtol=1e-3, atol=1e-3 * float(best.gradient.abs().max()))
    assert_exactly_zero(W, pruned, result.delta)
    assert dense.relative_error(result.delta, best.delta) < 1e-3


def test_the_multipliers_converge_before_the_gradient():
    """Large eigenvalues multiply what is left of the violation in ``G Δ A``; the multipliers have nothing of it."""
    W, pruned = random_weight(16, 24, 0), random_mask(16, 24, "random", 3)
    G, A = power_law(16, 2.0, 1, 1e-3), power_law(24, 2.0, 2, 1e-3)
    best = joint_update(W, pruned, G, A, *inverses(G, A), tolerance=0.0, max_iterations=2000).gradient
    result = joint_estimate(W, pruned, G, A, *inverses(G, A), tolerance=0.3)
    assert len(result.bound) - 1 < 30
    own = (G @ result.delta @ A)[pruned]
    assert dense.relative_error(result.gradient[pruned], best[pruned]) < 0.5
    assert dense.relative_error(own, best[pruned]) > 2.0


def test_an_estimate_of_few_kept_weights_goes_on_from_its_start():
    """The solution of these is found on the kept weights, from nothing: multipliers of another mask would be lost."""
    W, pruned, G, A = typical(density=0.9, kind="plain")
    assert 0.0 < float((~pruned).double().mean()) < 0.3
    best = joint_update(W, pruned, G, A, *inverses(G, A), tolerance=0.0, max_iterations=400)
    cold, warm = (
        joint_estimate(W, pruned, G, A, *inverses(G, A), start=start, tolerance=0.0, max_iterations=3)
        for start in (None, -best.gradient)
    )
    assert warm.bound[0] == pytest.approx(best.objective[-1], rel=1e-5)
    errors = [dense.relative_error(result.gradient[pruned], best.gradient[pruned]) for result in (cold, warm)]
    assert errors[1] < 1e-2 < errors[0]


def similar_masks():
    """A problem of many iterations, and a mask in which a hundredth of the pruned weights, the dearest, is kept."""
    W, pruned = random_weight(24, 32, 0), random_mask(24, 32, "random", 3)
    G, A = power_law(24, 2.0, 1, 1e-3), power_law(32, 2.0, 2, 1e-3)
    gradient = joint_update(W, pruned, G, A, *inverses(G, A)).gradient.abs()
    return W, pruned, pruned & (gradient < gradient[pruned].quantile(0.99)), G, A


def test_a_start_from_a_similar_mask_saves_iterations_and_finds_the_same():
    W, other, pruned, G, A = similar_masks()
    options = {"tolerance": 1e-3, "max_iterations": 1000}
    first = joint_update(W, other, G, A, *inverses(G, A), **options)
    cold = joint_update(W, pruned, G, A, *inverses(G, A), **options)
    warm = joint_update(W, pruned, G, A, *inverses(G, A), start=-first.gradient, **options)
    best = dense.optimum(W, pruned, G, A)
    assert 0.3 * best < warm.bound[0] < best
    iterations = [sum(value < 0.95 * best for value in result.bound) for result in (cold, warm)]
    assert iterations[1] < iterations[0]
    for result in (cold, warm):
        assert best * (1 - 1e-9) <= result.objective[-1] <= best * 1.001
        assert result.bound[-1] <= best * (1 + 1e-9) and result.gap <= 1e-3
        assert_exactly_zero(W, pruned, result.delta)


def test_a_start_at_the_solution_is_already_there():
    W, pruned, _, G, A = similar_masks()
    best = joint_update(W, pruned, G, A, *inverses(G, A), tolerance=1e-9, max_iterations=4000)
    assert best.gap <= 1e-9
    again = joint_estimate(W, pruned, G, A, *inverses(G, A), start=-best.gradient, max_iterations=0)
    assert len(again.bound) == 1
    assert again.bound[0] == pytest.approx(best.objective[-1], rel=1e-6)
    assert dense.relative_error(again.gradient[pruned], best.gradient[pruned]) < 1e-3


@pytest.mark.parametrize("kind", ["random", "opposite", "zero", "elsewhere", "huge"])
def test_any_start_finds_the_optimum(kind):
    W, pruned, _, G, A = similar_masks()
    plain = joint_update(W, pruned, G, A, *inverses(G, A), tolerance=1e-6, max_iterations=2000)
    start = {
        "random": random_weight(24, 32, 9),
        "opposite": plain.gradient,
        "zero": torch.zeros_like(W),
        "elsewhere": W.masked_fill(pruned, 0.0),
        "huge": -1e30 * plain.gradient,
    }[kind]
    kept = start.clone()
    result = joint_update(W, pruned, G, A, *inverses(G, A), start=start, tolerance=1e-6, max_iterations=2000)
    assert torch.equal(start, kept)
    assert result.bound[0] >= 0.0 and result.gap <= 1e-6
    assert result.objective[-1] == pytest.approx(dense.optimum(W, pruned, G, A), rel=2e-6)
    if kind in ("opposite", "zero", "elsewhere"):  # nothing to begin with
        assert torch.equal(result.delta, plain.delta) and result.bound == plain.bound


def corrections(monkeypatch, *problem, **options):
    """The corrections that the dual's solvers had, one for each solver, and the result."""
    used, build = [], module.masked_cg

    def watched(terms, free, residual, correction=None):
        used.append(correction is not None)
        return build(terms, free, residual, correction)

    monkeypatch.setattr(module, "masked_cg", watched)
    result = joint_update(*problem, **options)
    monkeypatch.setattr(module, "masked_cg", build)
    return used, result


def test_the_preconditioner_is_corrected_where_the_first_iterations_are_slow(monkeypatch):
    W, pruned = random_weight(40, 60, 0), random_mask(40, 60, "random", 1, 0.6)
    G, A = power_law(40, 1.5, 1, 0.01), power_law(60, 2.0, 2, 0.001)
    problem = (W, pruned, G, A, *inverses(G, A))
    used, result = corrections(monkeypatch, *problem, tolerance=1e-4)
    assert used[:2] == [False, True]
    monkeypatch.setattr(module, "_WORTH", INF)
    plain_used, plain = corrections(monkeypatch, *problem, tolerance=1e-4)
    assert not any(plain_used)
    assert len(result.bound) < 0.8 * len(plain.bound)
    best = dense.optimum(W, pruned, G, A)
    for solved in (result, plain):
        assert best * (1 - 1e-9) <= solved.objective[-1] <= best * (1 + 1e-4)
    easy = damp(torch.eye(40, dtype=torch.float64), 0.1), damp(torch.eye(60, dtype=torch.float64), 0.01)
    assert corrections(monkeypatch, W, pruned, *easy, *inverses(*easy))[0] == [False]


def test_the_cap_holds_before_and_after_the_correction(monkeypatch):
    W, pruned = random_weight(40, 60, 0), random_mask(40, 60, "random", 1, 0.6)
    G, A = power_law(40, 1.5, 1, 0.01), power_law(60, 2.0, 2, 0.001)
    for cap in (7, 8, 9, 13):
        used, result = corrections(monkeypatch, W, pruned, G, A, *inverses(G, A), tolerance=0.0, max_iterations=cap)
        assert len(result.bound) + len(result.objective) - 2 == cap and used[1:2] == ([True] if cap > 8 else [])
        assert_exactly_zero(W, pruned, result.delta)
