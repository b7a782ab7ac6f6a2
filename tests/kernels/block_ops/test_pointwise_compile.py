"""The pointwise kernels compile for Hopper, without a GPU and without spills."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.block_ops import rms_norm_triton, rotary_triton, swiglu_triton
from tests.kernels.compiled import check_resources, compile_kernel


def test_pointwise_kernels():
    x = dict.fromkeys(["x", "weight", "y", "gradient", "dx", "gate", "up", "d_gate", "d_up", "cos", "sin"], "*bf16")
    types = {**x, "rstd": "*fp32", "eps": "fp32"}
    for kernel, constants in (
        (rms_norm_triton.rms_norm_kernel, {"BLOCK": 4096, "DEPENDENT": False}),
        (rms_norm_triton.rms_norm_kernel, {"BLOCK": 16384, "DEPENDENT": True}),
        (rms_norm_triton.rms_norm_backward_kernel, {"BLOCK": 4096}),
        (rotary_triton.rotary_kernel, {"TRANSPOSED": True, "BLOCK_H": 32, "BLOCK_D": 64}),
        (swiglu_triton.swiglu_kernel, {"BLOCK": 1024, "DEPENDENT": False}),
        (swiglu_triton.swiglu_kernel, {"BLOCK": 1024, "DEPENDENT": True}),
    ):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        aligned = [name for name in kernel.arg_names if signature[name].startswith("*")]
        warps = rms_norm_triton.warps(constants["BLOCK"]) if "rstd" in signature else 4
        compiled = compile_kernel(kernel, signature, constants, 90, warps=warps, stages=3, divisible_by_16=aligned)
        check_resources(compiled, 90)
        assert ("griddepcontrol.wait" in compiled.ptx) == constants.get("DEPENDENT", False)
