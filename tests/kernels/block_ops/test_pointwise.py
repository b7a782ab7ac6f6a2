"""The references of RMS norm, SwiGLU and rotary embedding against their formulas, entry by entry in float64."""

import math

import pytest
import torch

from surgeon_kernels import rms_norm, rotary, swiglu


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rms_norm():
    x, weight, eps = randn(2, 3, 5), randn(5, seed=1), 0.1
    y = rms_norm(x, weight, eps)
    for i in range(2):
        for j in range(3):
            size = math.sqrt(sum(float(v) ** 2 for v in x[i, j]) / 5 + eps)
            for k in range(5):
                assert float(y[i, j, k]) == pytest.approx(float(weight[k] * x[i, j, k]) / size, rel=1e-14)


def test_half_precision_norms_are_computed_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # squares beyond float16
    assert torch.equal(rms_norm(x, torch.ones(4, dtype=torch.float16), 1e-5), torch.ones(1, 4, dtype=torch.float16))


def test_a_row_of_zeros_stays_zero():
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-6)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


def test_swiglu():
    gate, up = randn(3, 4), randn(3, 4, seed=1)
    y = swiglu(gate, up)
    for g, u, actual in zip(gate.flatten(), up.flatten(), y.flatten(), strict=True):
        assert float(actual) == pytest.approx(float(g) / (1 + math.exp(-float(g))) * float(u), rel=1e-14)


def test_rotary():
    angles = randn(1, 3, 2)
    cos, sin = (f(angles).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    x = randn(2, 5, 3, 4)
    y = rotary(x, cos, sin)
    for batch in range(2):
        for head in range(5):
            for token in range(3):
                for d in range(2):
                    pair = complex(x[batch, head, token, d], x[batch, head, token, d + 2])
                    angle = float(angles[0, token, d])
                    turned = pair * complex(math.cos(angle), math.sin(angle))
                    assert complex(y[batch, head, token, d], y[batch, head, token, d + 2]) == pytest.approx(turned)
