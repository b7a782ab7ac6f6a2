"""Sums of 16-bit products are in float32 whatever PyTorch's process-wide switches allow, and these are put back."""

import re
import threading
from pathlib import Path

import pytest
import torch

import surgeon_kernels
from surgeon_kernels.linalg import half_products
from surgeon_kernels.linalg.half_products import addmm_half_, float32_sums

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
