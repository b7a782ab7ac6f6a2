"""The kernel of diag(X S Xᵀ) compiles without a GPU into what its configurations were chosen for."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels import quadratic_form_triton

from .compiled import compile_kernel


@pytest.mark.parametrize("row_major", [True, False])
def test_kernel(row_major):
    config = quadratic_form_triton.CONFIGS[row_major]
    r, c, k = config.block_r, config.block_c, config.block_k
    x, x_wide = ((r, k), (r, c)) if row_major else ((k, r), (c, r))
    compiled = compile_kernel(
        quadratic_form_triton.quadratic_form_kernel,
        {
            "x": f"tensordesc<fp32{list(x)}>",
            "x_wide": f"tensordesc<fp32{list(x_wide)}>",
            "s": f"tensordesc<fp32{[c, k]}>",
            "partial": "*fp32",
            "rows": "i32",
            "columns": "i32",
        },
        {"BLOCK_R": r, "BLOCK_C": c, "BLOCK_K": k, "ROW_MAJOR": row_major, "BAND": 8},
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
