"""Products of float32 matrices on the bfloat16 tensor cores, to the accuracy of float32.

Every number is split into three bfloat16 of 8 significant bits each, ``x = x₀ + x₁ + x₂`` up to ``2⁻²⁶ |x|``, and of
the nine products of parts the six that matter are summed in float32, the smallest first::

    A B ≈ A₂B₀ + A₁B₁ + A₀B₂ + A₁B₀ + A₀B₁ + A₀B₀

(the scheme that BLAS libraries name BF16x6). Six bfloat16 products take less than half of the time of one in float32.
Nothing that float32 holds is lost in the parts, but tensor cores cut, where float32 units round, what they add: a sum
of K terms of one sign may come out too small by up to ``K/16`` units in the last place. So the largest of the six is
summed in runs of at most :data:`RUN` terms, and the runs are added in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.linalg.half_products import addmm_half_, float32_sums
from surgeon_kernels.runtime.triton_support import has_kernels

_ORDER = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))
# Sides from which on a product is split (an estimate): the six products of a smaller one are mostly launches.
SPLIT_FROM = 1024
# Terms of a sum that tensor cores add before float32 units take over. Each further run reads and writes `out` once: at
# 2048 terms (an estimate), about a twentieth of the time of their six products on an H200.
RUN = 2048


def mm(A: Tensor, B: Tensor, *, out: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """``alpha A B`` as ``torch.mm`` computes it, of large float32 matrices on CUDA devices by split products.

    With ``torch.set_float32_matmul_precision`` at anything but ``"highest"`` it is ``torch.mm`` throughout.
    """
    out = A.new_empty(A.shape[0], B.shape[1]) if out is None else out
    if not _fits(A, B):
        return torch.addmm(out, A, B, beta=0, alpha=alpha, out=out)
    parts = split(B)
    same = A.data_ptr() == B.data_ptr() and A.shape == B.T.shape and A.stride() == B.T.stride()
    return addmm_split_(out, parts.transpose(1, 2) if same else split(A), parts, alpha=alpha)


def _fits(A: Tensor, B: Tensor) -> bool:
    """The dispatch rule, see :func:`mm`."""
    large = min(*A.shape, B.shape[1]) >= SPLIT_FROM
    return large and A.is_cuda and A.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def split_reference(x: Tensor) -> Tensor:
    """The three parts of ``x`` ``[m, n]``: bfloat16 ``[3, m, n]``."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].to(x.dtype)
    return torch.stack(parts)


def split(x: Tensor) -> Tensor:
    """:func:`split_reference`, in one pass over a float32 matrix on a GPU."""
    if not (x.is_cuda and x.dtype == torch.float32 and has_kernels()):
        return split_reference(x)
    from surgeon_kernels.linalg.split_matmul_triton import split_rows

    if x.stride(0) == 1 and x.stride(1) != 1:  # the parts keep the order of a transposed matrix
        return split_rows(x.T).transpose(1, 2)
    return split_rows(x)


@float32_sums()
def addmm_split_(out: Tensor, A: Tensor, B: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """``out = beta out + alpha A B`` from the parts ``A`` ``[3, m, k]`` and ``B`` ``[3, k, n]``; ``out`` ``[m, n]``.

    With ``beta = 0`` ``out`` is not read. Without a GPU the parts are multiplied in ``out``'s dtype.
    """
    for i, j in _ORDER:
        run = RUN if i == j == 0 else max(1, A.shape[2])
        for a, b in zip(A[i].split(run, dim=1), B[j].split(run, dim=0), strict=True):
            if out.is_cuda:
                addmm_half_(out, a, b, beta=beta, alpha=alpha)
            else:
                torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
            beta = 1.0
    return out
