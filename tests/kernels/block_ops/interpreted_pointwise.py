"""Checks the pointwise kernels in Triton's interpreter; run by test_interpreted.py in a process of its own."""

import torch
from torch import Tensor

from surgeon_kernels.block_ops import rms_norm_triton, rotary_triton, swiglu_triton
from surgeon_kernels.block_ops.rms_norm import rms_norm_reference
from surgeon_kernels.block_ops.rotary import rotary_reference
from surgeon_kernels.block_ops.swiglu import swiglu_reference


def close(*pairs: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def main() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 100, requires_grad=True), torch.randn(100)
    y = rms_norm_reference(x, weight, 1e-5)
    gradient = torch.randn_like(y)
    ours, rstd = rms_norm_triton.forward(x.detach(), weight, 1e-5, torch.float32)
    half, _ = rms_norm_triton.forward(x.detach(), weight, 1e-5, torch.float16)
    assert torch.equal(half, ours.half())
    backward = rms_norm_triton.backward(gradient, x.detach(), weight, rstd)
    close((ours, y), (backward, *torch.autograd.grad(y, x, gradient)))

    gate, up = (torch.randn(3, 500, requires_grad=True) for _ in range(2))
    y = swiglu_reference(gate, up)
    gradient = torch.randn_like(y)
    close((swiglu_triton.forward(gate.detach(), up.detach()), y))
    backwards = swiglu_triton.backward(gradient, gate.detach(), up.detach())
    close(*zip(backwards, torch.autograd.grad(y, (gate, up), gradient), strict=True))
    halves = torch.randn(3, 3200)
    gate, up = halves[:, 100:1500], halves[:, 1600:3000]
    close((swiglu_triton.forward(gate, up), swiglu_reference(gate, up)))

    x = torch.randn(2, 7, 3, 10).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(1, 7, 10).expand(2, 7, 10) for _ in range(2))
    y = rotary_reference(x, cos, sin)
    gradient = torch.randn_like(y)
    close((rotary_triton.rotate(x.detach(), cos, sin, transposed=False), y))
    backward = rotary_triton.rotate(gradient, cos, sin, transposed=True)
    close((backward, *torch.autograd.grad(y, x, gradient)))
    print("agrees")


if __name__ == "__main__":
    main()
