"""Products ``L X M`` with symmetric ``L`` and ``M`` on float16 tensor cores, fast or as exact as in float32.

With the diagonals of positive definite matrices scaled to one, ``L̂ = L / √(diag L diag Lᵀ)``, no entry is above 1, and
with ``X`` scaled to a largest entry of 1 nothing overflows: ``|L̂ X| ≤ n``. So scaled, float16 rounds to the 11 bits
that TF32 has, at twice its speed. For more, every number is split in two, ``x = x₀ + 2⁻¹¹ x₁`` up to ``2⁻²² |x|``, and
three products are summed::

    A B ≈ 2⁻¹¹ (A₁B₀ + A₀B₁) + A₀B₀

Sums are in float32, regardless of PyTorch's switches (:mod:`surgeon_kernels.linalg.half_products`); for the tensor
cores' truncation see :mod:`surgeon_kernels.linalg.split_matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.linalg.half_products import addmm_half_, float32_sums
from surgeon_kernels.linalg.split_matmul import SPLIT_FROM
from surgeon_kernels.runtime.triton_support import has_kernels

_LOW = 2.0**11  # scale of the second part
# Above, a row of L̂ times a column of ones could overflow.
LARGEST = 65504


def kron_product(L: Tensor, X: Tensor, M: Tensor, *, parts: int = 2, definite: bool = True) -> Tensor:
    """``L X M``, that is ``(L ⊗ M) vec(X)``, to the accuracy of float32: symmetric ``L`` ``[R, R]`` and ``M``
    ``[C, C]``, ``X`` ``[R, C]``.

    On CUDA, float32 matrices with both sides from 1024 on are multiplied by split products, all others by PyTorch;
    with ``torch.set_float32_matmul_precision`` at anything but ``"highest"`` all of them are.

    Args:
        parts: 1 where operands rounded to float16 are enough.
        definite: whether ``L`` and ``M`` are positive definite; if not, their rows' largest entries scale them.
    """
    if torch.get_float32_matmul_precision() != "highest" or not fits_split(X):
        return L @ X @ M
    return kron_product_split(L, X, M, scales=None if definite else (_largest(L), _largest(M)), parts=parts)


def _largest(M: Tensor) -> Tensor:
    """``m_i = max_j |M_ij|`` ``[n]``; then ``|M_ij| <= √(m_i m_j)``, as with a positive definite matrix's diagonal."""
    return torch.linalg.vector_norm(M, torch.inf, dim=1).clamp_min(torch.finfo(M.dtype).tiny)


def fits_split(X: Tensor) -> bool:
    """The dispatch rule, see :func:`kron_product`."""
    return X.is_cuda and X.dtype == torch.float32 and min(X.shape) >= SPLIT_FROM and max(X.shape) <= LARGEST


def kron_product_split(
    L: Tensor, X: Tensor, M: Tensor, *, scales: tuple[Tensor, Tensor] | None = None, parts: int = 2
) -> Tensor:
    """:func:`kron_product` by split products; without a GPU the parts are multiplied in float32.

    Args:
        scales: ``l`` ``[R]`` and ``m`` ``[C]`` to scale by, ``|L_ij| <= √(l_i l_j)``; left out: the diagonals, for
            positive definite ``L`` and ``M``.
        parts: 1 for operands rounded to float16.
    """
    rows, columns = (d.sqrt() for d in scales or (L.diagonal(), M.diagonal()))
    half, first = _times_scaled(scaled_parts(L, 1 / rows, 1 / rows, parts), scaled(X, rows, columns), on_the_left=True)
    out, second = _times_scaled(scaled_parts(M, 1 / columns, 1 / columns, parts), half, on_the_left=False)
    return scaled(out, rows * first * second, columns, out=out)


@float32_sums()
def _times_scaled(parts: Tensor, X: Tensor, *, on_the_left: bool) -> tuple[Tensor, Tensor]:
    """The matrix of ``parts`` times ``X``, or the other way round, over the largest entry of ``X``; and that entry."""
    least, most = X.aminmax()
    largest = torch.maximum(-least, most).clamp_min(torch.finfo(X.dtype).tiny)
    of_X = scaled_parts(X, (1 / largest).expand(len(X)), X.new_ones(X.shape[1]), len(parts))
    A, B = (parts, of_X) if on_the_left else (of_X, parts)
    out = torch.empty_like(X)
    if len(parts) == 2:
        mm_half(A[1], B[0], out, alpha=1 / _LOW)
        mm_half(A[0], B[1], out, beta=1.0, alpha=1 / _LOW)
    mm_half(A[0], B[0], out, beta=float(len(parts) == 2))
    return out, largest


def scaled(x: Tensor, rows: Tensor, columns: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``x ∘ (rows columnsᵀ)`` ``[m, n]``; ``out``, contiguous, may be ``x``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.is_cuda and x.dtype == torch.float32 and has_kernels():
        from surgeon_kernels.linalg.kron_product_triton import scaled_rows

        return scaled_rows(x, rows, columns, out)
    return torch.mul(x * rows[:, None], columns, out=out)


def scaled_parts(x: Tensor, rows: Tensor, columns: Tensor, parts: int) -> Tensor:
    """The first part or both of ``x ∘ (rows columnsᵀ)``, ``x`` ``[m, n]``: float16 ``[parts, m, n]``."""
    if x.is_cuda and x.dtype == torch.float32 and has_kernels():
        from surgeon_kernels.linalg.kron_product_triton import scaled_parts_rows

        return scaled_parts_rows(x, rows, columns, parts)
    return scaled_parts_reference(x, rows, columns, parts)


def scaled_parts_reference(x: Tensor, rows: Tensor, columns: Tensor, parts: int) -> Tensor:
    """Reference of :func:`scaled_parts`."""
    x = x * rows[:, None] * columns
    first = x.half()
    return torch.stack([first, ((x - first) * _LOW).half()][:parts])


def mm_half(A: Tensor, B: Tensor, out: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """``out = beta out + alpha A B`` of float16 matrices, summed in float32, into float16 or float32.

    With ``beta = 0`` ``out`` is not read. Without a GPU it is computed in float32.
    """
    if not out.is_cuda:
        previous = beta * out if beta else 0.0
        return out.copy_(previous + alpha * (A.float() @ B.float()))
    return addmm_half_(out, A, B, beta=beta, alpha=alpha)
