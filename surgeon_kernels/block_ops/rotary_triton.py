"""The Triton kernel of rotary embedding, forward and backward: one program a token.

Operands are read once and results written once, in the dtype of the model; in between all is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotary_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    y_batch: tl.tensor,
    y_head: tl.tensor,
    y_token: tl.tensor,
    cos_batch: tl.tensor,
    cos_token: tl.tensor,
    sin_batch: tl.tensor,
    sin_token: tl.tensor,
    TRANSPOSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """All heads of one token: ``y = R x``, or ``Rᵀ x``, ``R`` rotating the pairs ``(x_d, x_(d + half))``."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]  # heads may lie far apart
    d = tl.arange(0, BLOCK_D)[None, :]
    cos += batch * cos_batch + token * cos_token + d
    sin += batch * sin_batch + token * sin_token + d
    c1 = tl.load(cos, mask=d < half, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half, mask=d < half, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=d < half, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half, mask=d < half, other=0.0).to(tl.float32)
    inside = (h < heads) & (d < half)
    x += batch * x_batch + token * x_token + h * x_head + d
    y += batch * y_batch + token * y_token + h * y_head + d
    x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        tl.store(y, x1 * c1 + x2 * s2, mask=inside)
        tl.store(y + half, x2 * c2 - x1 * s1, mask=inside)
    else:
        tl.store(y, x1 * c1 - x2 * s1, mask=inside)
        tl.store(y + half, x2 * c2 + x1 * s2, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    """``R x``, or ``Rᵀ x``: ``x`` ``[batch, heads, length, dim]``, angles ``[batch, length, dim]``, last strides 1."""
    batch, heads, length, dim = x.shape
    y = torch.empty_like(x)  # of the strides of x where x is dense: attention reads [batch, length, heads, dim]
    with torch.cuda.device_of(x):
        rotary_kernel[(batch * length,)](
            x, cos, sin, y, length, heads, dim // 2,
            *x.stride()[:3], *y.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
            TRANSPOSED=transposed, BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(dim // 2),
            num_warps=4,
        )  # fmt: skip
    return y
