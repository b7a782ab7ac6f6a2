import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon_kernels import GramProduct, SymmetricAccumulator, gram_accumulate_, gram_accumulate_each_
from tests.kernels.dense import relative_error, repeatable

NAN, INF = float("nan"), float("inf")


def truth(x, mask=None, alpha=1.0, ones_column=False):
    """The sum of outer products, row by row in float64."""
    size = x.shape[-1] + ones_column
    total = torch.zeros(size, size, dtype=torch.float64)
    for index in itertools.product(*map(range, x.shape[:-1])):
        if mask is not None and not mask[index]:
            continue
        row = x[index].double()
        if ones_column:
            row = torch.cat([row, torch.ones(1, dtype=torch.float64)])
        total += alpha * torch.outer(row, row)
    return total


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@repeatable
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    channels=st.integers(0, 6),
    ones_column=st.booleans(),
    masked=st.booleans(),
    alpha=st.sampled_from([1.0, 0.25, -3.0, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_matches_the_sum_of_outer_products(leading, channels, ones_column, masked, alpha, dtype, seed):
    x = randn(*leading, channels, seed=seed, dtype=dtype)
    mask = randn(*leading, seed=seed + 1) < 0 if masked else None
    size = channels + ones_column
    before = randn(size, size, seed=seed + 2, dtype=dtype)
    out = before.clone()
    gram_accumulate_(out, x, mask=mask, alpha=alpha, ones_column=ones_column)
    expected = before.double() + truth(x, mask, alpha, ones_column)
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    "x",
    [
        randn(5, 7, seed=1).T,
        randn(3, 4, 5, seed=2).transpose(0, 1),
        randn(3, 4, 5, seed=3).permute(2, 0, 1),
        randn(8, 10, seed=4)[::3, 1::2],
        randn(1, 2, 4, seed=5).expand(6, 2, 4),
        randn(6, 1, seed=6).expand(6, 3),
    ],
    ids=["transposed", "leading transposed", "permuted", "strided", "expanded rows", "expanded channels"],
)
@pytest.mark.parametrize("ones_column", [False, True])
def test_any_strides(x, ones_column):
    assert not x.is_contiguous()
    mask = randn(*x.shape[:-1], seed=9) < 0.5
    size = x.shape[-1] + ones_column
    out = torch.zeros(size, size, dtype=torch.float64)
    gram_accumulate_(out, x, mask=mask, ones_column=ones_column)
    torch.testing.assert_close(out, truth(x, mask, ones_column=ones_column), rtol=1e-13, atol=1e-13)


def test_a_mask_of_any_strides():
    x, mask = randn(4, 3, 5), (randn(3, 4, seed=1) < 0).T
    out = gram_accumulate_(torch.zeros(5, 5, dtype=torch.float64), x, mask=mask)
    torch.testing.assert_close(out, truth(x, mask), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("ones_column", [False, True])
def test_masked_rows_do_not_leak(poison, ones_column):
    x = randn(2, 4, 3)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    poisoned = x.masked_fill(~mask[..., None], poison)
    size = 3 + ones_column
    out = torch.zeros(size, size, dtype=torch.float64)
    gram_accumulate_(out, poisoned, mask=mask, ones_column=ones_column)
    torch.testing.assert_close(out, truth(x, mask, ones_column=ones_column), rtol=1e-13, atol=1e-13)
    if ones_column:
        assert out[-1, -1] == 4


def test_all_rows_masked_leaves_out_as_it_was():
    out = randn(3, 3)
    gram_accumulate_(out, torch.full((4, 3), NAN), mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(out, randn(3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ones_column", [False, True])
def test_half_precision_is_upcast_before_the_product(dtype, out_dtype, ones_column):
    x = randn(500, 6).to(dtype)
    size = 6 + ones_column
    out = gram_accumulate_(torch.zeros(size, size, dtype=out_dtype), x, ones_column=ones_column)
    tolerance = 1e-5 if out_dtype == torch.float32 else 1e-14
    assert relative_error(out, truth(x, ones_column=ones_column)) < tolerance


def test_half_precision_products_do_not_overflow():
    out = gram_accumulate_(torch.zeros(1, 1), torch.full((3, 1), 60000.0, dtype=torch.float16))
    assert float(out) == pytest.approx(3 * float(torch.tensor(60000.0).half()) ** 2, rel=1e-6)


def test_a_float64_accumulator_keeps_what_float32_would_lose():
    x = torch.tensor([[1.0], [1e-5]], dtype=torch.float32)
    out = gram_accumulate_(torch.zeros(1, 1, dtype=torch.float64), x)
    assert float(out) - 1.0 == pytest.approx(float(x[1, 0].double() ** 2), rel=1e-4)


def test_accumulates_in_the_storage_of_out_and_returns_it():
    x, y = randn(7, 4, seed=1), randn(2, 3, 4, seed=2)
    out = torch.zeros(4, 4, dtype=torch.float64)
    pointer = out.data_ptr()
    assert gram_accumulate_(out, x) is out
    assert gram_accumulate_(out, y) is out
    assert out.data_ptr() == pointer
    torch.testing.assert_close(out, truth(torch.cat([x, y.reshape(-1, 4)])), rtol=1e-13, atol=1e-13)


def test_x_is_left_alone():
    x = randn(4, 3)
    gram_accumulate_(torch.zeros(4, 4), x, mask=torch.tensor([True, False, True, False]), ones_column=True)
    assert torch.equal(x, randn(4, 3))


def test_a_single_vector_is_one_row():
    x = randn(3)
    out = gram_accumulate_(torch.zeros(3, 3, dtype=torch.float64), x, mask=torch.tensor(True))
    torch.testing.assert_close(out, torch.outer(x, x))


OUT, X = torch.zeros(3, 3), torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("out", "x", "options", "message"),
    [
        (OUT, torch.zeros(2, 4), {}, r"\[4, 4\]"),
        (OUT, X, {"ones_column": True}, r"\[4, 4\]"),
        (torch.zeros(3, 4), X, {}, r"\[3, 3\]"),
        (torch.zeros(3), X, {}, r"\[3, 3\]"),
        (OUT.bfloat16(), X, {}, "bfloat16"),
        (OUT.long(), X, {}, "int64"),
        (OUT, X.long(), {}, "floating"),
        (OUT, torch.tensor(1.0), {}, r"\[\.\.\., C\]"),
        (OUT, X, {"mask": torch.ones(2, 4)}, "bool"),
        (OUT, X, {"mask": torch.ones(4, 2, dtype=torch.bool)}, r"\[2, 4\]"),
        (OUT, X, {"mask": torch.ones(2, 4, 1, dtype=torch.bool)}, r"\[2, 4\]"),
        (OUT, X.to("meta"), {}, "one device, not cpu, meta"),
        (OUT, X, {"mask": torch.ones(2, 4, dtype=torch.bool, device="meta")}, "one device, not cpu, cpu, meta"),
    ],
)
def test_what_does_not_fit_is_refused(out, x, options, message):
    with pytest.raises(ValueError, match=message):
        gram_accumulate_(out, x, **options)
    assert not out.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ones_column", [False, True])
def test_cuda_matches_float64(dtype, ones_column):
    x = randn(4, 33, 24).to(dtype)
    mask = randn(4, 33, seed=1) < 0.5
    size = 24 + ones_column
    out = torch.zeros(size, size, device="cuda")
    gram_accumulate_(out, x.cuda(), mask=mask.cuda(), alpha=0.5, ones_column=ones_column)
    assert relative_error(out.cpu(), truth(x, mask, 0.5, ones_column)) < 1e-5


def test_each_of_several_products():
    x, y, mask = randn(30, 7), randn(2, 15, 4, seed=1), randn(30, seed=2) < 0
    outs = [torch.zeros(7, 7, dtype=torch.float64), SymmetricAccumulator.zeros(5, dtype=torch.float64)]
    products = [GramProduct(outs[0], x), GramProduct(outs[1], y, ones_column=True), GramProduct(outs[0], x, mask)]
    gram_accumulate_each_(products, alpha=0.5)
    ones = torch.cat([y.view(30, 4), torch.ones(30, 1)], dim=1)
    torch.testing.assert_close(outs[0], 0.5 * (x.T @ x + x[mask].T @ x[mask]))
    torch.testing.assert_close(outs[1].full(), 0.5 * ones.T @ ones)
    with pytest.raises(ValueError, match=r"\[7, 7\]"):
        gram_accumulate_each_([*products, GramProduct(outs[1], x)])
    torch.testing.assert_close(outs[0], 0.5 * (x.T @ x + x[mask].T @ x[mask]))  # nothing was added
