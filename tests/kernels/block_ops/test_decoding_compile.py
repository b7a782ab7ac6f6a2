"""The kernels of decoding compile for Hopper, without a GPU and without spills."""

import pytest

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.block_ops import add_rms_norm_triton, decode_attention_triton, fill_cache_triton
from surgeon_kernels.block_ops.rms_norm_triton import warps
from tests.kernels.compiled import SHARED_MEMORY, check_resources, compile_kernel


def test_add_rms_norm():
    kernel = add_rms_norm_triton.add_rms_norm_kernel
    types = {name: "*bf16" for name in kernel.arg_names} | {"columns": "i32", "eps": "fp32"}
    aligned = ["x", "residual", "weight", "h", "y", "columns"]
    for block, dependent in ((4096, True), (16384, False)):
        constants = {"BLOCK": block, "DEPENDENT": dependent}
        compiled = compile_kernel(kernel, types, constants, 90, warps=warps(block), stages=3, divisible_by_16=aligned)
        check_resources(compiled, 90)
        assert ("griddepcontrol.wait" in compiled.ptx) == dependent
        assert "LDG.E.128" in compiled.sass and "STG.E.128" in compiled.sass


@pytest.mark.parametrize(
    ("group", "splits", "dim", "dtype"),
    [(1, 1, 128, "bf16"), (1, 4, 128, "bf16"), (8, 33, 128, "bf16"), (4, 8, 64, "fp16"), (2, 4, 256, "fp32")],
)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_decode_attention(group, splits, dim, dtype, capability):
    kernel = decode_attention_triton.decode_attention_kernel
    types = dict.fromkeys(("qkv", "cos", "sin", "keys", "values", "y"), f"*{dtype}")
    types |= dict.fromkeys(("partial", "maxima", "weights"), "*fp32")
    types |= {"position": "*i64", "arrived": "*i32", "scale": "fp32"}
    constants = {
        "SPLITS": splits,
        "BLOCK_S": 1 << (splits - 1).bit_length(),
        "BLOCK_G": max(decode_attention_triton._LEAST_ROWS, group),
        "BLOCK_N": {"bf16": 64, "fp16": 64, "fp32": 16}[dtype],
        "BLOCK_D": dim,
        "DEPENDENT": capability >= 90,
    }
    strides = [f"{cache}_{axis}" for cache in ("key", "value") for axis in ("batch", "head", "token")]
    aligned = [name for name, kind in types.items() if kind.startswith("*") and name != "position"]
    compiled = compile_kernel(
        kernel,
        {name: types.get(name, "i32") for name in kernel.arg_names},
        constants,
        capability,
        warps=decode_attention_triton._WARPS,
        stages=decode_attention_triton._STAGES if capability < 120 else decode_attention_triton._FEWER_STAGES,
        divisible_by_16=[*aligned, *strides, "dim"],
    )
    if dtype == "fp32":  # without tensor cores: it may spill
        assert compiled.shared_bytes <= SHARED_MEMORY[capability]
    else:
        check_resources(compiled, capability)
    assert "cp.async" in compiled.ptx and ("mma.sync" in compiled.ptx) == (dtype != "fp32")
    assert ("griddepcontrol.wait" in compiled.ptx) == (capability >= 90)
    assert ("atom.global.gpu.acq_rel" in compiled.ptx) == (splits > 1)


@pytest.mark.parametrize("kv_heads", [32, 4])
def test_fill_cache(kv_heads):
    kernel = fill_cache_triton.fill_cache_kernel
    types = dict.fromkeys(("qkv", "cos", "sin", "queries", "keys", "values"), "*bf16")
    strides = [f"{cache}_{axis}" for cache in ("key", "value") for axis in ("batch", "head", "token")]
    compiled = compile_kernel(
        kernel,
        {name: types.get(name, "i32") for name in kernel.arg_names},
        {"BLOCK_H": 32, "BLOCK_K": kv_heads, "BLOCK_D": 64},
        90,
        warps=4,
        stages=3,
        divisible_by_16=[*types, *strides, "half"],
    )
    check_resources(compiled, 90)
    assert "LDG.E.128" in compiled.sass and "STG.E.128" in compiled.sass
