import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import DampedInverse, NotPositiveDefiniteError, cholesky_with_jitter, damp, spd_inverse
from surgeon_kernels.linalg.spd_inverse import JITTERS
from tests.kernels.dense import FACTOR_KINDS, factor, relative_error, repeatable, with_condition


def with_lowest_eigenvalue(lowest, n=6, seed=0, dtype=torch.float64):
    """A dense matrix of mean diagonal 1 whose smallest eigenvalue is ``lowest``."""
    values = torch.full((n,), (n - lowest) / (n - 1), dtype=torch.float64)
    values[-1] = lowest
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(x).Q
    return ((Q * values) @ Q.T).to(dtype)


@repeatable
@given(
    n=st.integers(1, 9),
    kind=st.sampled_from(FACTOR_KINDS),
    damping=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_inverse_and_damped_matrix(n, kind, damping, seed):
    M = factor(n, kind, seed)
    result = spd_inverse(M, damping)
    damped = M + damping * (M.trace() / n) * torch.eye(n, dtype=torch.float64)
    assert result.jitter == 0.0
    torch.testing.assert_close(result.damped, damped, rtol=1e-14, atol=0)
    torch.testing.assert_close(damp(M, damping), damped, rtol=1e-14, atol=0)
    expected = torch.linalg.inv(damped)
    assert relative_error(result.inverse, expected) < 1e-15 * float(torch.linalg.cond(damped)) + 1e-13
    assert relative_error(result.inverse, result.inverse.T) < 1e-12


@pytest.mark.parametrize("condition", [1e8, 1e10])
@pytest.mark.parametrize("seed", range(3))
def test_ill_conditioned(condition, seed):
    M = with_condition(12, condition, seed)
    inverse, jitter = spd_inverse(M).inverse, spd_inverse(M).jitter
    assert jitter == 0.0
    assert relative_error(inverse, torch.linalg.inv(M)) < 1e-14 * condition
    assert float((M @ inverse - torch.eye(12, dtype=torch.float64)).abs().max()) < 1e-14 * condition


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_rank_deficient_with_damping_alone(samples):
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    M = x.T @ x / samples
    result = spd_inverse(M, 0.01)
    assert result.jitter == 0.0
    identity = torch.eye(8, dtype=torch.float64)
    damped = M + 0.01 * M.diagonal().mean() * identity
    torch.testing.assert_close(result.inverse @ damped, identity, rtol=0, atol=1e-11)


def test_dead_channels_get_the_damping_alone():
    M = torch.diag(torch.tensor([4.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    M[0, 2] = M[2, 0] = 1.0
    result = spd_inverse(M, 0.1)
    expected = torch.linalg.inv(M + 0.15 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(result.inverse, expected)
    assert float(result.inverse[1, 1]) == pytest.approx(1 / 0.15)
    assert result.inverse[1, [0, 2, 3]].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_matrix_has_an_inverse(dtype):
    result = spd_inverse(torch.zeros(3, 3, dtype=dtype), 0.01)
    assert result.jitter == 0.0
    diagonal = result.damped.diagonal()
    assert (diagonal > 0).all() and torch.equal(result.damped, torch.diag(diagonal))
    torch.testing.assert_close(result.damped @ result.inverse, torch.eye(3, dtype=dtype))
    # Two such factors of one layer: the entries of G⁻¹ ⊗ A⁻¹ and of G ⊗ A must neither overflow nor vanish.
    assert result.inverse[0, 0].square().isfinite()
    assert result.damped[0, 0].square() > torch.finfo(dtype).tiny


def test_empty_matrix():
    result = spd_inverse(torch.zeros(0, 0), 0.1)
    assert result.damped.shape == result.inverse.shape == (0, 0) and result.jitter == 0.0


@pytest.mark.parametrize("jitter", JITTERS[1:])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_jitter_is_the_first_of_the_ladder_that_suffices(jitter, damping):
    # Short of positive definite by half of this jitter, so the jitter before it is too small.
    M = with_lowest_eigenvalue(-damping - 0.5 * jitter)
    result = spd_inverse(M, damping)
    assert isinstance(result, DampedInverse)
    assert result.jitter == jitter
    damped = M + (damping + jitter) * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(result.damped, damped, rtol=1e-12, atol=1e-12)
    assert relative_error(result.inverse, torch.linalg.inv(damped)) < 1e-8
    L, reported = cholesky_with_jitter(M, damping)
    assert reported == jitter
    assert L.triu(1).eq(0).all()
    torch.testing.assert_close(L @ L.T, damped, rtol=1e-12, atol=1e-12)


def test_jitter_is_relative_to_the_mean_diagonal():
    assert spd_inverse(1e-7 * with_lowest_eigenvalue(-5e-5)).jitter == 1e-4
    assert spd_inverse(1e7 * with_lowest_eigenvalue(-5e-5)).jitter == 1e-4


def test_float32_jitter_rescues_a_singular_matrix():
    result = spd_inverse(torch.ones(4, 4))
    assert result.jitter in JITTERS[1:3]
    assert result.inverse.isfinite().all()


def test_the_input_is_left_alone():
    M = with_lowest_eigenvalue(-5e-4)
    before = M.clone()
    spd_inverse(M, 1e-4)
    damp(M, 0.5)
    assert torch.equal(M, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_the_matrix(bad):
    M = torch.eye(3)
    M[2, 1] = bad
    with pytest.raises(NotPositiveDefiniteError, match=r"blocks\.3\.fc holds NaN or infinity"):
        spd_inverse(M, 0.1, name="blocks.3.fc")


@pytest.mark.parametrize("lowest", [-0.03, -5.0])
def test_not_positive_definite_names_the_matrix(lowest):
    with pytest.raises(NotPositiveDefiniteError, match=r"blocks\.3\.fc is not positive definite.*0\.02"):
        spd_inverse(with_lowest_eigenvalue(lowest), 0.01, name="blocks.3.fc")
    assert issubclass(NotPositiveDefiniteError, ArithmeticError)
