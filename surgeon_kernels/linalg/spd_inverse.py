"""Damped inverses of symmetric positive definite matrices, by Cholesky factorisation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.linalg.half_products import padded
from surgeon_kernels.linalg.sweep_inverse import sweep_inverse
from surgeon_kernels.linalg.triangular import cholesky_inverse_, triangular_gram_, triangular_inverse_
from surgeon_kernels.runtime.checks import check_square

# Jitter escalation, relative to the mean diagonal: tried in this order when a factorisation meets a pivot <= 0.
JITTERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# Float32 matrices on a GPU from this size on are inverted in blocks; the library is as fast for smaller ones, by
# `python -m bench.kernels.spd_inverse --tune`.
_BLOCKED_FROM = 2048
# From the first of these sizes to before the second by sweeps, which keep more of a GPU busy than the factor of such a
# matrix by itself: of 11008 they take 27.4 ms instead of 33.4 on an H200, of 4096 10.0 instead of 3.9, mostly launches.
# Both bounds are estimates.
_SWEPT = 10240, 16384


class NotPositiveDefiniteError(ArithmeticError):
    """A matrix had no Cholesky factor even with the largest jitter; the message names it."""


class DampedInverse(NamedTuple):
    """Result of :func:`spd_inverse`."""

    damped: Tensor  # M + (damping + jitter) mean(diag M) I  [n, n]
    inverse: Tensor  # its inverse  [n, n]
    jitter: float  # 0.0 unless the factorisation needed more than the given damping


def damp(M: Tensor, damping: float) -> Tensor:
    """``M + damping * mean(diag M) * I`` as a new matrix; positive definite for semidefinite ``M`` ``[n, n]``.

    A matrix with a zero (or vanishing) diagonal, that of a layer no data reaches, is damped as if its mean diagonal
    were the 3/8 power of the dtype's smallest normal number: so it too has an inverse, and the products that
    ``G⁻¹ ⊗ A⁻¹`` and ``G ⊗ A`` consist of stay within the dtype even when G and A are both zero.

    Raises:
        ValueError: ``M`` is not square; TypeError: it is not floating point.
    """
    check_square(M)
    damped = M.clone()
    damped.diagonal().add_(damping * mean_diagonal(M))
    return damped


def mean_diagonal(M: Tensor) -> Tensor:
    """Mean diagonal of ``M`` ``[n, n]``, a scalar tensor, which dampings are relative to.

    At least the number that :func:`damp` names for a zero diagonal, and 0 for ``n = 0``.
    """
    if M.shape[-1] == 0:
        return M.new_zeros(())
    return M.diagonal().mean().clamp_min(torch.finfo(M.dtype).tiny ** 0.375)


def spd_inverse(M: Tensor, damping: float = 0.0, *, jitter: float | None = None, name: str = "matrix") -> DampedInverse:
    """Inverse of the damped symmetric matrix ``M + damping * mean(diag M) * I``, ``M`` ``[n, n]``.

    Where the Cholesky factorisation meets a non-positive pivot it is tried again with :data:`JITTERS` added to the
    damping, and the jitter used is returned. At most one matrix beyond the result is allocated. The same
    ``M`` gives the same bits.

    Args:
        jitter: what an earlier factorisation of the same matrix needed, if known: not checked then, to avoid a host
            sync.

    Raises:
        NotPositiveDefiniteError: no jitter was enough; the message names ``name``.
        ValueError: ``M`` is not square; TypeError: it is not floating point.
    """
    if jitter is not None:
        damped = damp(M, damping + jitter)
        return DampedInverse(damped, unchecked_inverse(damped), jitter)
    if _blocked(M):
        damped = damp(M, damping)
        inverse, good = _inverse(damped)
        if bool(good):  # the host sync once the device has its work; nearly every matrix needs no jitter
            return DampedInverse(damped, inverse, 0.0)
        del damped, inverse
    L, jitter = cholesky_with_jitter(M, damping, name=name)
    return DampedInverse(damp(M, damping + jitter), _inverse_(L), jitter)


def unchecked_inverse(M: Tensor) -> Tensor:
    """``M⁻¹`` of a matrix ``[n, n]`` known to be positive definite: not checked, to avoid a host sync.

    Raises:
        ValueError: ``M`` is not square; TypeError: it is not floating point.
    """
    check_square(M)
    if _swept(M):
        return sweep_inverse(M)[0]
    return _first(_inverse_(torch.linalg.cholesky_ex(_aligned(M)).L), len(M))


def inverse_diagonal(M: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal ``[n]`` of the inverse of a symmetric ``M`` ``[n, n]``, and whether ``M`` is positive definite: bool.

    The diagonal of ``(L Lᵀ)⁻¹`` is that of ``L⁻ᵀ L⁻¹``, the columns' squared norms of ``L⁻¹``: a third less work than
    the inverse. There is no host sync. Where the factorisation fails the diagonal is undefined.

    Raises:
        ValueError: ``M`` is not square; TypeError: it is not floating point.
    """
    check_square(M)
    if _swept(M):
        inverse, good = sweep_inverse(M)
        return inverse.diagonal().clone(), good
    L, good = _cholesky(_aligned(M))
    return torch.linalg.vector_norm(triangular_inverse_(L), dim=0).square_()[: len(M)], good


def inverse_and_diagonal(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse ``[n, n]`` of a symmetric ``M`` ``[n, n]``, and what :func:`inverse_diagonal`, which has the errors,
    returns."""
    check_square(M)
    if _swept(M):
        inverse, good = sweep_inverse(M)
        return inverse, inverse.diagonal().clone(), good
    L, good = _cholesky(_aligned(M))
    X = triangular_inverse_(L)
    diagonal = torch.linalg.vector_norm(X, dim=0).square_()[: len(M)]
    return _first(triangular_gram_(X), len(M)), diagonal, good


def cholesky_with_jitter(M: Tensor, damping: float = 0.0, *, name: str = "matrix") -> tuple[Tensor, float]:
    """Lower Cholesky factor ``[n, n]`` of ``M + (damping + jitter) * mean(diag M) * I`` and the jitter that it took.

    Raises:
        NotPositiveDefiniteError: no jitter was enough, or ``M`` holds NaN or infinity; the message names ``name``.
    """
    for jitter in JITTERS:
        L, good = _cholesky(damp(M, damping + jitter))
        if bool(good):
            return L, jitter
        if jitter == 0.0 and not math.isfinite(float(M.sum())):
            raise NotPositiveDefiniteError(f"{name} holds NaN or infinity")
    raise NotPositiveDefiniteError(
        f"{name} is not positive definite, even with {damping + JITTERS[-1]:g} of its mean diagonal added: "
        "raise its damping"
    )


def _cholesky(M: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of ``M``, and whether there is one as a bool on the device: no host sync."""
    check_square(M)
    L, info = torch.linalg.cholesky_ex(M)
    # A positive pivot that rounding made tiny can still overflow the factor: finite is part of success.
    return L, (info == 0) & L.sum().isfinite()


def _inverse(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M⁻¹``, exactly symmetric, and whether ``M`` is positive definite as a bool on the device: no host sync."""
    if _swept(M):
        return sweep_inverse(M)
    L, good = _cholesky(_aligned(M))
    return _first(_inverse_(L), len(M)), good


def _inverse_(L: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹``, exactly symmetric; ``L`` may be overwritten."""
    if _blocked(L):
        return cholesky_inverse_(L)
    inverse = torch.cholesky_inverse(L)  # on a GPU two triangular solves, whose result is symmetric up to rounding
    return inverse.tril() + inverse.tril(-1).T


def _aligned(M: Tensor) -> Tensor:
    """``M``, or a copy with a unit matrix after it where products of its blocks would be of unaligned rows."""
    n = len(M)
    if not _blocked(M) or n % 8 == 0:
        return M
    larger = padded(M)
    larger.diagonal()[n:].fill_(1.0)
    return larger


def _first(M: Tensor, n: int) -> Tensor:
    """The first ``n`` rows and columns of ``M``, contiguous."""
    return M if len(M) == n else M[:n, :n].contiguous()


def _swept(M: Tensor) -> bool:
    return _blocked(M) and _SWEPT[0] <= len(M) < _SWEPT[1]


def _blocked(M: Tensor) -> bool:
    return M.is_cuda and M.dtype == torch.float32 and len(M) >= _BLOCKED_FROM
