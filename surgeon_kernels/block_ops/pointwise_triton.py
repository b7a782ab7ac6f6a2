"""Kernels of the operations between matrix products: RMS norm, SwiGLU and rotary embedding, forward and backward.

Each reads its operands once and writes its results once, in the dtype of the model; in between it computes in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row: ``y = weight x r``, ``r = 1 / sqrt(mean(x²) + eps)``."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    value = tl.load(x + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / columns + eps)
    w = tl.load(weight + c, mask=inside, other=0.0)
    # Rounded before the weight is multiplied, as transformers does.
    normalized = (value * r).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * columns + c, normalized * w.to(tl.float32), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def rms_norm_backward_kernel(
    gradient: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row: ``dx = r w g - r³ mean(w g x) x``."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    value = tl.load(x + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    wg = tl.load(gradient + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    wg *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    mean = tl.sum(wg * value, axis=0) / columns
    tl.store(dx + row * columns + c, r * wg - r * r * r * mean * value, mask=inside)


@triton.jit
def swiglu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A part of one row: ``y = silu(gate) up``."""
    parts = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    c = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    g = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * columns + c, silu * u, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gradient: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """``d_up = gradient silu(gate)``, ``d_gate = gradient up silu'(gate)``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    dy = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + i, dy * g * s, mask=inside)
    tl.store(d_gate + i, dy * u * s * (1.0 + g * (1.0 - s)), mask=inside)


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y`` and the reciprocal root mean squares of the rows; ``x`` contiguous."""
    columns = x.shape[-1]
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rstd.numel(),)](
            x, weight, y, rstd, columns, eps, BLOCK=triton.next_power_of_2(columns), num_warps=_warps(columns)
        )
    return y, rstd


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    columns = x.shape[-1]
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(rstd.numel(),)](
            gradient, x, weight, rstd, dx, columns, BLOCK=triton.next_power_of_2(columns), num_warps=_warps(columns)
        )
    return dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate`` and ``up`` ``[rows, columns]``, last strides 1: they may be halves of one tensor."""
    rows, columns = gate.shape
    y = gate.new_empty(rows, columns)
    with torch.cuda.device_of(gate):
        swiglu_kernel[(rows * triton.cdiv(columns, _BLOCK),)](
            gate, up, y, columns, gate.stride(0), up.stride(0), BLOCK=_BLOCK
        )
    return y


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
            gradient, gate, up, d_gate, d_up, gate.numel(), BLOCK=_BLOCK
        )
    return d_gate, d_up


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    """``x`` ``[batch, heads, length, dim]``, ``cos`` and ``sin`` ``[batch, length, dim]``, last strides 1."""
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


def _warps(columns: int) -> int:
    return max(1, min(16, triton.next_power_of_2(columns) // 512))
