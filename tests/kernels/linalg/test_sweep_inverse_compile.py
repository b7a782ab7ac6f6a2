"""The sweep's kernel compiles for Hopper, without a GPU, into what it was chosen for."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.linalg import factor_inverse_triton
from surgeon_kernels.linalg.sweep_inverse import BLOCK
from surgeon_kernels.linalg.sweep_inverse_triton import _PANEL, _PANEL_STEP, CONFIG, panel_kernel, sweep_kernel
from tests.kernels.compiled import check_resources, compile_kernel


@pytest.mark.parametrize("of_next", [False, True])
def test_sweep_kernel(of_next):
    sizes = ["n", "stride", "start", "end", "part", "first", "width", "tiles"]
    compiled = compile_kernel(
        sweep_kernel,
        {"parts": f"tensordesc<bf16[{CONFIG.side}, {CONFIG.step}]>", "W": "*fp32", **dict.fromkeys(sizes, "i32")},
        {"NEXT": of_next, "COLUMNS": BLOCK, "SIDE": CONFIG.side, "STEP": CONFIG.step, "RUN": CONFIG.run},
        90,
        warps=CONFIG.warps,
        stages=CONFIG.stages,
        divisible_by_16=["W", "n", "stride"],
    )
    check_resources(compiled, 90)
    assert "wgmma.mma_async" in compiled.ptx and "cp.async.bulk.tensor" in compiled.ptx


def test_panel_kernel():
    sizes = ["n", "stride", "start", "end", "x_stride", "part"]
    compiled = compile_kernel(
        panel_kernel,
        {"W": "*fp32", "X": "*fp32", "parts": "*bf16", **dict.fromkeys(sizes, "i32")},
        {"COLUMNS": BLOCK, "SIDE": _PANEL, "STEP": _PANEL_STEP},
        90,
        warps=4,
        stages=3,
        divisible_by_16=["W", "X", "parts"],
    )
    check_resources(compiled, 90)


def test_eliminate_kernel():
    sizes = ["n", "source_stride", "target_stride", "step"]
    compiled = compile_kernel(
        factor_inverse_triton.eliminate_kernel,
        {"source": "*fp32", "target": "*fp32", **dict.fromkeys(sizes, "i32")},
        {"TILE": factor_inverse_triton.TILE},
        90,
        warps=factor_inverse_triton._WARPS,
        stages=3,
        divisible_by_16=["source", "target", "source_stride", "target_stride"],
    )
    check_resources(compiled, 90)
