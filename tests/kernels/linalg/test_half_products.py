"""Sums of 16-bit products are in float32 whatever PyTorch's process-wide switches allow, and these are put back."""

import re
import threading
from pathlib import Path

import pytest
import torch

import surgeon_kernels
from surgeon_kernels.linalg import half_products
from surgeon_kernels.linalg.half_products import addmm_half_, aligned, aligned_empty, float32_sums, padded

NAMES = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")
matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def switches():
    before = half_products._switches()
    yield
    half_products._switch(before)


def values():
    return [getattr(matmul, name) for name in NAMES]


@pytest.mark.parametrize("allowed", [[True, True, True], [True, True, False], [False, True, True], [False] * 3])
def test_switches_are_held_and_put_back(allowed):
    for name, value in zip(NAMES, allowed, strict=True):
        setattr(matmul, name, value)
    with float32_sums():
        assert values() == [False] * 3
        with float32_sums():
            assert values() == [False] * 3
        assert values() == [False] * 3
    assert values() == allowed
    with pytest.raises(ZeroDivisionError), float32_sums():
        raise ZeroDivisionError
    assert values() == allowed


def test_the_choice_to_split_sums_is_put_back_as_well():
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    with float32_sums():
        assert matmul.allow_fp16_reduced_precision_reduction_split_k
    assert not matmul.allow_fp16_reduced_precision_reduction_split_k


def test_of_several_threads_the_last_puts_them_back():
    matmul.allow_fp16_accumulation = True
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with float32_sums():
            entered.set()
            leave.wait(10)
            seen.extend(values())

    thread = threading.Thread(target=other)
    with float32_sums():
        thread.start()
        assert entered.wait(10)
    assert values() == [False] * 3  # the other thread is still inside
    leave.set()
    thread.join()
    assert seen == [False] * 3 and matmul.allow_fp16_accumulation


def test_the_product_is_launched_inside(monkeypatch):
    matmul.allow_fp16_accumulation = True
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append((values(), options)))
    A = torch.ones(2, 2, dtype=torch.float16)
    addmm_half_(torch.ones(2, 2), A, A, alpha=0.5)
    addmm_half_(A.clone(), A, A, beta=0.0)
    assert [inside for inside, _ in calls] == [[False] * 3] * 2
    assert [options.get("out_dtype") for _, options in calls] == [torch.float32, None]
    assert matmul.allow_fp16_accumulation


def test_float32_sums_of_bfloat16_leave_the_switches_alone(monkeypatch):
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_accumulation = True
    calls = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append(values()))
    A = torch.ones(2, 2, dtype=torch.bfloat16)
    addmm_half_(torch.ones(2, 2), A, A)
    addmm_half_(A.clone(), A, A)
    matmul.allow_fp16_accumulation = False
    addmm_half_(torch.ones(2, 2), A.half(), A.half())
    assert calls == [[True, True, True], [False] * 3, [True, True, False]]


@pytest.mark.parametrize("dtype, multiple", [(torch.float16, 8), (torch.bfloat16, 8), (torch.float32, 4)])
def test_rows_begin_at_multiples_of_16_bytes(dtype, multiple):
    x = torch.randn(6, 16).to(dtype)
    for same in (x, x[:, :13], x.T, x[2:]):
        assert aligned(same) is same
    for other in (x[:, 1:], x[:, :13].clone(), x[:, :13].clone().T, x[:, ::2]):
        copy = aligned(other)
        assert torch.equal(copy, other) and copy.data_ptr() % 16 == 0
        assert max(copy.stride()) % multiple == 0 and (copy.stride(0) == 1) == (other.stride(0) == 1)
    assert aligned_empty((3, 5, 9), dtype, x.device).stride() == (80, 16, 1)
    larger = padded(x)
    assert larger.shape == (8, 16) and not larger[6:].any() and padded(larger) is larger
    assert torch.equal(padded(x[:, :3])[:6, :3], x[:, :3])
    assert padded(x[:, :9] > 0).shape == (8, 16) and padded(x[:, :9] > 0).dtype == torch.bool


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_large_products_are_of_aligned_rows(monkeypatch, beta):
    seen = []

    def product(out, A, B, beta, alpha):
        seen.append([max(x.stride()) % 8 for x in (out, A, B)])
        previous = beta * out.float() if beta else 0.0
        return out.copy_(previous + alpha * (A.float() @ B.float()))

    monkeypatch.setattr(half_products, "_addmm_", product)
    A, B, out = torch.randn(5, 9).bfloat16(), torch.randn(9, 13).bfloat16(), torch.randn(5, 13)
    expected = beta * out + 2.0 * (A.float() @ B.float())
    small, large = out.clone(), out.clone()
    addmm_half_(small, A, B, beta=beta, alpha=2.0)
    monkeypatch.setattr(half_products, "_COPIED_FROM", 5 * 9 * 13)
    assert addmm_half_(large, A, B, beta=beta, alpha=2.0) is large
    assert seen == [[5, 1, 5], [0, 0, 0]]
    for result in (small, large):
        torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_unaligned_products_are_those_of_aligned_ones(dtype, beta):
    generator = torch.Generator("cuda").manual_seed(0)
    A, B = (torch.randn(1025, 1025, device="cuda", generator=generator).to(dtype) for _ in range(2))
    out = torch.randn(1025, 1025, device="cuda", generator=generator)
    exact = beta * out.double() + A.T.double() @ B.double()
    for x, y in ((A.T, B), (aligned(A).T, aligned(B))):
        found = addmm_half_(out.clone(), x, y, beta=beta)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


def test_no_other_module_multiplies_halves_by_itself():
    for path in Path(surgeon_kernels.__file__).parent.rglob("*.py"):
        assert path.stem == "half_products" or not re.search(r"\bout_dtype=", path.read_text()), path.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_results_do_not_depend_on_the_switches(dtype, out_dtype):
    out_dtype = out_dtype or dtype
    generator = torch.Generator("cuda").manual_seed(0)
    A, B = (torch.randn(1024, 8192, device="cuda", generator=generator).to(dtype) for _ in range(2))
    results = []
    for allowed in (False, True):
        for name in NAMES:
            setattr(matmul, name, allowed)
        results.append(addmm_half_(torch.zeros(1024, 1024, dtype=out_dtype, device="cuda"), A, B.T, beta=0.0))
    exact = A.double() @ B.double().T
    assert torch.equal(*results)
    bound = A.double().abs() @ B.double().abs().T
    rounding = torch.finfo(out_dtype).eps
    assert ((results[1].double() - exact).abs() <= rounding * exact.abs() + 2.0**-18 * bound).all()
