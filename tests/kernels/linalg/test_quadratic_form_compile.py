"""The kernel of diag(X S Xᵀ) compiles without a GPU into what its configurations were chosen for."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.linalg import quadratic_form_triton
from tests.kernels.compiled import compile_kernel


def test_kernel():
    config = quadratic_form_triton.CONFIG
    r, c, k = config.block_r, config.block_c, config.block_k
    compiled = compile_kernel(
        quadratic_form_triton.quadratic_form_kernel,
        {
            "x": f"tensordesc<fp32{[r, k]}>",
            "x_wide": f"tensordesc<fp32{[r, c]}>",
            "s": f"tensordesc<fp32{[c, k]}>",
            "partial": "*fp32",
            "partial_stride": "i32",
            "rows": "i32",
            "columns": "i32",
        },
        {"BLOCK_R": r, "BLOCK_C": c, "BLOCK_K": k, "BAND": 8},
        90,
        warps=config.warps,
        stages=config.stages,
        divisible_by_16=["partial"],
    )
    assert compiled.spilled_bytes == 0, compiled.log
    assert "serialized" not in compiled.log, compiled.log
    assert compiled.shared_bytes <= 232448
    assert compiled.registers * 32 * config.warps <= 65536
    assert "wgmma.mma_async" in compiled.ptx and "cp.async.bulk.tensor" in compiled.ptx and "HGMMA" in compiled.sass
