"""The Gram kernel on a CUDA device, against float64 and PyTorch's own error."""

import threading

import pytest
import torch

from surgeon_kernels import GramProduct, SymmetricAccumulator, gram_accumulate_, gram_accumulate_each_
from surgeon_kernels.gram import gram, gram_group_triton
from surgeon_kernels.gram.gram import kernel_config
from surgeon_kernels.linalg.half_products import addmm_half_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")


def randn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def exact(x, mask=None, ones_column=False):
    rows = x.reshape(-1, x.shape[-1]).double()
    if ones_column:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    return rows.T @ rows


def torch_error(x, truth, mask=None, ones_column=False):
    """Relative error of PyTorch's product of the very same operands, accumulated in float32."""
    rows = x.reshape(-1, x.shape[-1])
    if ones_column:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    if mask is not None:
        rows = rows.masked_fill(~mask.reshape(-1, 1), 0.0)
    product = rows.T @ rows if x.dtype == torch.float32 else torch.mm(rows.T, rows, out_dtype=torch.float32)
    return error(product, truth)


def error(out, truth):
    return float((out.double() - truth).norm() / truth.norm())


def accumulators(n, value=0.0):
    packed = SymmetricAccumulator.zeros(n, device="cuda")
    packed.storage.fill_(value)
    return packed, torch.full((n, n), value, device="cuda")


def uses_kernel(out, x, ones_column):
    packed = isinstance(out, SymmetricAccumulator) and out.packed
    target = out.storage if isinstance(out, SymmetricAccumulator) else out
    return kernel_config(target, x.reshape(-1, x.shape[-1]), packed, ones_column) is not None


def full(out):
    return out.full() if isinstance(out, SymmetricAccumulator) else out


SHAPES = [
    *((4096, 2048), (2047, 2500), (16384, 3072), (64, 2050), (63, 2048), (1, 3000), (16384, 1024), (200, 3072)),
    *((300, 2051), (5000, 2051), (8192, 2051), (4096, 4097), (16400, 515), (9000, 1023), (999, 250)),
]
OTHER_SHAPES = [(16384, 3072), (2047, 2500), (300, 2051), (16400, 515)]  # of the other dtypes


@pytest.mark.parametrize(
    ("dtype", "tokens", "columns"),
    [
        *((torch.bfloat16, *shape) for shape in SHAPES),
        *((dtype, *shape) for dtype in DTYPES[1:] for shape in OTHER_SHAPES),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ones_column", [False, True])
def test_error_is_at_most_twice_that_of_torch(dtype, tokens, columns, masked, ones_column):
    x = randn(tokens, columns, dtype=dtype)
    mask = randn(tokens, dtype=torch.float32, seed=1) < 0.5 if masked else None
    truth = exact(x, mask, ones_column)
    allowed = 2 * max(torch_error(x, truth, mask, ones_column), 2**-23)
    for out in accumulators(columns + ones_column):
        if isinstance(out, SymmetricAccumulator) and out.packed:
            assert uses_kernel(out, x, ones_column) == (tokens >= 64)
        gram_accumulate_(out, x, mask=mask, ones_column=ones_column)
        if truth.any():
            assert error(full(out), truth) <= allowed
        else:
            assert not full(out).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_alpha_times_the_product_in_place_and_symmetrically(dtype):
    x = randn(3, 500, 2100, dtype=dtype)
    for out in accumulators(2100, 2.0):
        assert gram_accumulate_(out, x, alpha=-0.5) is out
        result = full(out)
        assert torch.equal(result, result.T)
        assert error(result, 2.0 - 0.5 * exact(x)) < 1e-5


@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_masked_rows_do_not_leak(poison):
    x = randn(2, 300, 2048)
    mask = randn(2, 300, dtype=torch.float32, seed=1) < 0
    poisoned = x.masked_fill(~mask[..., None], poison)
    for out in accumulators(2049):
        gram_accumulate_(out, poisoned, mask=mask, ones_column=True)
        assert error(full(out), exact(x, mask, True)) < 1e-5
        assert full(out)[-1, -1] == mask.sum()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 8:2508],
        lambda x: x[:, 1:2501],
        lambda x: x[::3, :2500],
        lambda x: x.T,
        lambda x: x.view(50, 42, 5000).transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(70, -1),
    ],
    ids=["aligned", "misaligned", "every third row", "transposed", "leading transposed", "every second", "expanded"],
)
def test_any_strides(view):
    x = view(randn(2100, 5000))
    for out in accumulators(x.shape[-1]):
        gram_accumulate_(out, x)
        assert error(full(out), exact(x)) < 3e-5


@pytest.mark.parametrize(("tokens", "columns"), [(16384, 2048), (4096, 4224), (2048, 512)])
def test_the_same_inputs_give_the_same_bits(tokens, columns):
    x = randn(tokens, columns)
    results = [gram_accumulate_(SymmetricAccumulator.zeros(columns, device="cuda"), x).full() for _ in range(5)]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_offsets_beyond_2_to_the_31():
    x = torch.empty(1 << 19, 4160, dtype=torch.bfloat16, device="cuda")
    x[:-1000] = NAN
    x[-1000:] = randn(1000, 4160)
    assert x.numel() > 1 << 31
    mask = torch.zeros(len(x), dtype=torch.bool, device="cuda")
    mask[-1000:] = True
    truth = exact(x[-1000:])
    out = gram_accumulate_(SymmetricAccumulator.zeros(4160, device="cuda"), x, mask=mask)
    assert error(out.full(), truth) < 1e-5
    x[:-1000] = 0
    out = gram_accumulate_(SymmetricAccumulator.zeros(4160, device="cuda"), x)
    assert error(out.full(), truth) < 1e-5


def test_packed_offsets_beyond_2_to_the_31():
    n = 66000
    x = randn(128, n)
    out = gram_accumulate_(SymmetricAccumulator.zeros(n, device="cuda"), x)
    assert out.storage.numel() > 1 << 31
    corner = out.full()[-1000:, -3000:]
    assert error(corner, x[:, -1000:].double().T @ x[:, -3000:].double()) < 1e-5


def test_unpacking_is_that_of_the_reference():
    out = SymmetricAccumulator.zeros(2111, device="cuda")
    out.storage.normal_()
    on_cpu = SymmetricAccumulator(2111, out.storage.cpu())
    assert torch.equal(out.full().cpu(), on_cpu.full())
    assert torch.equal(out.diagonal().cpu(), on_cpu.full().diagonal())


def test_several_threads_and_streams():
    x = randn(2048, 2304)
    expected = gram_accumulate_(SymmetricAccumulator.zeros(2304, device="cuda"), x).full()
    results = {}

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            out = SymmetricAccumulator.zeros(2304, device="cuda")
            results[index] = gram_accumulate_(out, x).full()
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(4096, 2048), (2047, 2500)])
def test_without_a_configuration_panels_are_multiplied_by_tensor_cores(dtype, tokens, columns, monkeypatch):
    """As on architectures that none is for: 16-bit rows are not converted, and errors are PyTorch's own."""
    monkeypatch.setattr(gram, "kernel_config", lambda *arguments: None)
    x = randn(tokens, columns, dtype=dtype).requires_grad_()
    out = SymmetricAccumulator.zeros(columns, device="cuda")
    assert out.packed
    products = []
    monkeypatch.setattr(
        gram,
        "addmm_half_",
        lambda out, A, B, **options: products.append((A.dtype, A.shape[0])) or addmm_half_(out, A, B, **options),
    )
    gram_accumulate_(out, x, alpha=0.5)
    assert products == ([] if dtype == torch.float32 else [(dtype, 1024)] * 2 + [(dtype, 512)] * (columns == 2500))
    truth = exact(x.detach())
    assert error(2 * out.full(), truth) <= 2 * torch_error(x.detach(), truth)
    assert not out.storage.requires_grad


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("tokens", [64, 2047, 4096])
def test_small_products_are_computed_by_one_kernel(dtype, tokens, monkeypatch):
    launches = []
    accumulate_ = gram_group_triton.accumulate_
    monkeypatch.setattr(gram_group_triton, "accumulate_", lambda *a: launches.append(len(a[0])) or accumulate_(*a))
    widths = [(576, False), (1536, True), (64, True), (200, False), (1023, True), *[(200, False)] * 13]
    xs = [randn(tokens, columns, dtype=dtype, seed=i) for i, (columns, _) in enumerate(widths)]
    mask = randn(tokens, dtype=torch.float32, seed=1) < 0.5
    products = [
        GramProduct(SymmetricAccumulator.zeros(c + ones, device="cuda"), x, None if ones or c == 576 else mask, ones)
        for x, (c, ones) in zip(xs, widths, strict=True)
    ]
    wide = GramProduct(SymmetricAccumulator.zeros(2304, device="cuda"), randn(tokens, 2304, dtype=dtype))
    dense = GramProduct(torch.zeros(576, 576, device="cuda"), xs[0])
    gram_accumulate_each_([*products, wide, dense, products[0]])
    assert launches == [16, 2]  # not of 64 columns
    for product in products[1:]:
        truth = exact(product.x, product.mask, product.ones_column)
        allowed = 2 * max(torch_error(product.x, truth, product.mask, product.ones_column), 2**-23)
        assert error(product.out.full(), truth) <= allowed
    assert error(products[0].out.full(), 2 * exact(xs[0])) < 1e-5
    assert error(wide.out.full(), exact(wide.x)) < 1e-5
    assert error(dense.out, exact(xs[0])) < 1e-5 and torch.equal(dense.out, dense.out.T)
