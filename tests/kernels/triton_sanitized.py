"""Small problems of the Gram kernels, quadratic forms and what is between linears, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.kernels.triton_sanitized
    compute-sanitizer --tool racecheck python -m tests.kernels.triton_sanitized

No product is cuBLAS's: its kernels do things that racecheck reports.
"""

import torch

from surgeon_kernels import SymmetricAccumulator, gram_accumulate_, quadratic_form, rms_norm, rotary, swiglu

HALF, SINGLE = torch.bfloat16, torch.float32
# tokens, columns, dtype, ones_column, masked, packed
PRODUCTS = [
    (130, 2048, HALF, False, False, True),
    (130, 2048, HALF, True, False, True),  # the ones as sums of columns
    (130, 2047, HALF, True, True, True),  # and as part of a copy
    (70, 2051, HALF, False, False, True),
    (4100, 2048, HALF, False, False, True),  # in parts
    (100, 2048, SINGLE, False, True, True),
    (1030, 2049, HALF, False, False, False),
]


def check_product(tokens, columns, dtype, ones_column, masked, packed):
    x = torch.randn(tokens, columns).to(dtype)
    mask = torch.rand(tokens) < 0.7 if masked else None
    n = columns + ones_column
    out = SymmetricAccumulator.zeros(n, device="cuda") if packed else torch.zeros(n, n, device="cuda")
    gram_accumulate_(out, x.cuda(), mask=None if mask is None else mask.cuda(), ones_column=ones_column)
    rows = x.float()
    if ones_column:
        rows = torch.cat([rows, torch.ones(tokens, 1)], dim=1)
    if mask is not None:
        rows = rows[mask]
    truth = rows.T @ rows
    full = (out if isinstance(out, torch.Tensor) else out.full()).cpu()
    assert (full - truth).norm() <= 1e-4 * truth.norm(), (tokens, columns)


def check_forms():
    x, S = torch.randn(1100, 1030), torch.randn(1030, 1030)
    S = S @ S.T
    truth = ((x.double() @ S.double()) * x.double()).sum(dim=1)
    for rows in (x.cuda(), x.T.contiguous().cuda().T):  # the latter is copied
        assert (quadratic_form(rows, S.cuda()).cpu() - truth).norm() <= 1e-4 * truth.norm()


def main():
    torch.manual_seed(0)
    for product in PRODUCTS:
        check_product(*product)
    check_forms()
    x = torch.randn(7, 100).cuda().to(HALF).requires_grad_()
    y = swiglu(rms_norm(x, torch.ones(100, dtype=HALF, device="cuda"), 1e-5), x)
    angles = torch.rand(1, 7, 20).cuda().to(HALF)
    rotary(y.view(1, 7, 5, 20).transpose(1, 2), angles, angles).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    print("0 wrong")


if __name__ == "__main__":
    main()
