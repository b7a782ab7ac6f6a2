"""Inverses of large positive definite matrices by sweeps of blocks, in place and by one kind of product.

Cholesky factorisation, inversion of the factor and the Gram matrix of that inverse, each by blocks of columns, are done
here at the same time (block Gauss-Jordan elimination). With ``K`` a block of columns, ``<`` and ``>`` what is before
and after it, the lower triangle of ``W``, at first ``M``, holds the Schur complement of what was eliminated in
``(>, >)``, ``-L⁻¹``'s rows but for a factor in ``(>, <)`` and part of the inverse in ``(<, <)``. A sweep is::

    L Lᵀ = W_KK,  X = L⁻¹
    U_> = W_>K Xᵀ,  U_K = Xᵀ,  U_< = -W_K<ᵀ Xᵀ
    W_ij ← [i, j not in K] W_ij ± U_i U_jᵀ       for i >= j, minus where both are after K

The product is of the whole lower triangle, ``n² block`` multiplications and additions of a kind that is fast, whatever
K; all sweeps take ``n³``. The next block of columns is updated first, so that its factor, whose many small steps leave
a GPU idle, is found while the rest is updated.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgeon_kernels.linalg.split_matmul import addmm_split_, split
from surgeon_kernels.linalg.triangular import triangular_inverse_
from surgeon_kernels.runtime.triton_support import has_kernels

if TYPE_CHECKING:
    from surgeon_kernels.linalg.sweep_inverse_triton import SweepConfig

# Columns of a sweep (an estimate): enough to update with, few enough that their factor is found meanwhile;
# `python -m bench.kernels.spd_inverse --tune` times others.
BLOCK = 512


def sweep_inverse(M: Tensor, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Inverse ``[n, n]``, exactly symmetric, of a positive definite ``M`` ``[n, n]``, and whether it is that: a bool.

    ``M`` is read below the diagonal. Float32 on CUDA devices is multiplied by its bfloat16 parts. There is no host
    sync. The workspace is a few times ``n block`` numbers. The same ``M`` gives the same bits.
    """
    W, good = M.clone(memory_format=torch.contiguous_format), torch.ones((), dtype=torch.bool, device=M.device)
    blocks = [(start, min(start + block, len(M))) for start in range(0, len(M), block)]
    if M.is_cuda and M.dtype == torch.float32 and has_kernels():
        sweep_on_gpu_(W, blocks, good)
    else:
        for start, end in blocks:
            U, found = panel(W, start, end)
            good &= found
            sweep_reference_(W, U, start, end)
    W.tril_()
    W += W.tril(-1).T
    return W, good


def panel(W: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """``U`` ``[n, end - start]`` of the block ``start..end``, and whether it is positive definite: a bool."""
    L, info = torch.linalg.cholesky_ex(W[start:end, start:end])
    X = triangular_inverse_(L)
    V = torch.cat([W[start:end, :start].T.neg(), W.new_zeros(end - start, end - start), W[end:, start:end]])
    split_up = W.is_cuda and W.dtype == torch.float32
    U = addmm_split_(torch.empty_like(V), split(V), split(X.T)) if split_up else V @ X.T
    U[start:end] = X.T
    return U, (info == 0) & X.diagonal().isfinite().all()


def sweep_reference_(W: Tensor, U: Tensor, start: int, end: int) -> None:
    """Sweep the block ``start..end`` of ``W``."""
    product = U @ U.T
    product[end:, end:].neg_()
    W[start:end] = 0.0
    W[:, start:end] = 0.0
    W += product


def sweep_on_gpu_(W: Tensor, blocks: list[tuple[int, int]], good: Tensor, config: SweepConfig | None = None) -> None:
    """Sweep all ``blocks`` of a float32 ``W`` on a GPU; ``good`` becomes False where one is not positive definite."""
    from surgeon_kernels.linalg.sweep_inverse_triton import CONFIG, sweep_
    from surgeon_kernels.runtime.launch import on_device

    config = config or CONFIG
    tiles, widest = (-(-size // config.side) for size in (len(W), blocks[0][1]))
    both = torch.zeros(2, 3, tiles * config.side, widest * config.side, dtype=torch.bfloat16, device=W.device)
    with on_device(W.get_device()):
        main, aside = torch.cuda.current_stream(), _stream(W.device)
        _prepare(W, blocks[0], both[0], good)
        for index, block in enumerate(blocks):
            parts, following = both[index % 2], (tiles, 0)
            if index + 1 < len(blocks):
                start, end = blocks[index + 1]
                following = start // config.side, -(-(end - start) // config.side)
                sweep_(parts, W, block, following, config, of_next=True)
                aside.wait_stream(main)
                with torch.cuda.stream(aside):
                    _prepare(W, (start, end), both[1 - index % 2], good)
            sweep_(parts, W, block, following, config, of_next=False)
            main.wait_stream(aside)


def _prepare(W: Tensor, block: tuple[int, int], parts: Tensor, good: Tensor) -> None:
    """Write the parts of a block's ``U``, zeros where it is narrower."""
    from surgeon_kernels.linalg.split_matmul_triton import split_into

    U, found = panel(W, *block)
    good &= found
    split_into(parts[:, : len(U), : U.shape[1]], U)
    parts[:, :, U.shape[1] :] = 0.0


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Stream whose kernels go before others that wait."""
    return torch.cuda.Stream(device, priority=-1)
