"""The passes of MaskedCG compile without a GPU, and keep everything in registers."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.linalg import masked_cg_triton
from tests.kernels.compiled import compile_kernel

FLOATS = ("image", "residual", "source", "x", "row_scales", "column_scales", "largest")
DOUBLES = ("curvatures", "energies", "bounds", "new_energies", "decreases")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(
    ("name", "corrected"), [("curvature", False), ("residual", False), ("direction", False), ("direction", True)]
)
def test_pass(name, corrected, terms, capability):
    kernel = getattr(masked_cg_triton, f"{name}_kernel")
    constants = {"BLOCK": masked_cg_triton._BLOCK, "TERMS": terms, "CORRECTED": corrected, "PARTS": 2048}
    types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(DOUBLES, "*fp64") | {"free": "*u8"}
    types["direction"] = "*fp16" if terms == 1 else "*fp32"
    compiled = compile_kernel(
        kernel,
        {argument: types.get(argument, "i32") for argument in kernel.arg_names},
        {argument: value for argument, value in constants.items() if argument in kernel.arg_names},
        capability,
        warps=masked_cg_triton._WARPS,
        stages=3,
        divisible_by_16=[argument for argument in kernel.arg_names if argument in types or argument == "columns"],
    )
    assert compiled.spilled_bytes == 0, compiled.log
    # As many programs as are meant to be resident fit a multiprocessor's registers.
    threads = 32 * masked_cg_triton._WARPS
    assert compiled.registers * threads * masked_cg_triton._RESIDENT <= 65536, compiled.log
    assert "LDG.E.128" in compiled.sass
