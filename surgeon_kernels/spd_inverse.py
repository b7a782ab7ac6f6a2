"""Damped inverses of symmetric positive definite matrices, by Cholesky factorisation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Jitter escalation, relative to the mean diagonal: tried in this order when a factorisation meets a pivot <= 0.
JITTERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


class NotPositiveDefiniteError(ArithmeticError):
    """A matrix had no Cholesky factor even with the largest jitter; the message names it."""


class DampedInverse(NamedTuple):
    """What :func:`spd_inverse` returns."""

    damped: Tensor  # M + (damping + jitter) mean(diag M) I  [n, n]
    inverse: Tensor  # its inverse  [n, n]
    jitter: float  # 0.0 unless the factorisation needed more than the damping asked for


def damp(M: Tensor, damping: float) -> Tensor:
    """``M + damping * mean(diag M) * I`` as a new matrix; positive definite for semidefinite ``M`` ``[n, n]``.

    A matrix with a zero (or vanishing) diagonal, that of a layer no data reaches, is damped as if its mean diagonal
    were the 3/8 power of the dtype's smallest normal number: so it too has an inverse, and the products that
    ``G⁻¹ ⊗ A⁻¹`` and ``G ⊗ A`` consist of stay within the dtype even when G and A are both zero.
    """
    damped = M.clone()
    damped.diagonal().add_(damping * _mean_diagonal(M))
    return damped


def spd_inverse(M: Tensor, damping: float = 0.0, *, name: str = "matrix") -> DampedInverse:
    """Inverse of the damped symmetric matrix ``M + damping * mean(diag M) * I``, ``M`` ``[n, n]``.

    Where the Cholesky factorisation meets a non-positive pivot it is tried again with :data:`JITTERS` added to the
    damping, and the jitter used is returned.

    Raises:
        NotPositiveDefiniteError: no jitter was enough; the message names ``name``.
    """
    L, jitter = cholesky_with_jitter(M, damping, name=name)
    return DampedInverse(damp(M, damping + jitter), torch.cholesky_inverse(L), jitter)


def cholesky_with_jitter(M: Tensor, damping: float = 0.0, *, name: str = "matrix") -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``M + (damping + jitter) * mean(diag M) * I`` and the jitter that it took."""
    if not math.isfinite(float(M.sum())):
        raise NotPositiveDefiniteError(f"{name} holds NaN or infinity")
    for jitter in JITTERS:
        L, info = torch.linalg.cholesky_ex(damp(M, damping + jitter))
        # A positive pivot that rounding made tiny can still overflow the factor: finite is part of success.
        if int(info) == 0 and math.isfinite(float(L.sum())):
            return L, jitter
    raise NotPositiveDefiniteError(
        f"{name} is not positive definite, even with {damping + JITTERS[-1]:g} of its mean diagonal added: "
        "raise its damping"
    )


def _mean_diagonal(M: Tensor) -> Tensor:
    if M.shape[-1] == 0:
        return M.new_zeros(())
    return M.diagonal().mean().clamp_min(torch.finfo(M.dtype).tiny ** 0.375)
