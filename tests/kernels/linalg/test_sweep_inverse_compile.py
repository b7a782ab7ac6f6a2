"""The sweep's kernel compiles for Hopper, without a GPU, into what it was chosen for."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.linalg.sweep_inverse import BLOCK
from surgeon_kernels.linalg.sweep_inverse_triton import CONFIG, sweep_kernel
from tests.kernels.compiled import check_resources, compile_kernel


@pytest.mark.parametrize("of_next", [False, True])
def test_sweep_kernel(of_next):
    sizes = ["n", "stride", "start", "end", "part", "first", "width", "tiles"]
    compiled = compile_kernel(
        sweep_kernel,
        {"parts": f"tensordesc<bf16[{CONFIG.side}, {CONFIG.step}]>", "W": "*fp32", **dict.fromkeys(sizes, "i32")},
        {"NEXT": of_next, "COLUMNS": BLOCK, "SIDE": CONFIG.side, "STEP": CONFIG.step},
        90,
        warps=CONFIG.warps,
        stages=CONFIG.stages,
        divisible_by_16=["W"],
    )
    check_resources(compiled, 90, spilled=64)
    assert "wgmma.mma_async" in compiled.ptx and "cp.async.bulk.tensor" in compiled.ptx
