"""Every launch configuration compiles for its architecture, without a GPU, into what it was chosen for."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

from surgeon_kernels.gram import gram_group_triton, gram_rows_triton, gram_triton, symmetric_triton
from surgeon_kernels.gram.plan import CONFIGS
from tests.kernels.compiled import SHARED_MEMORY, check_resources, compile_kernel

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CASES = [
    pytest.param(major * 10, dtype, config, packed, id=f"sm_{major}0-{TYPES[dtype]}-{config.block_n}-{packed}")
    for (major, dtype), choices in CONFIGS.items()
    for config in choices
    for packed in (False, True)
    if packed or config.block_n <= 128
    if major < 10 or dtype != torch.float16  # which differs from bfloat16 in nothing
]


@pytest.mark.parametrize(("capability", "dtype", "config", "packed"), CASES)
def test_gram_kernel(capability, dtype, config, packed):
    element = TYPES[dtype]
    pointers = ["out", "workspace", "units"]
    if config.descriptors:
        left, right = (f"tensordesc<{element}[{config.block_k}, {side}]>" for side in (config.block_m, config.block_n))
    else:
        left = right = f"*{element}"
        pointers += ["left", "right"]
    compiled = compile_kernel(
        gram_triton.gram_kernel,
        {
            "left": left,
            "right": right,
            "out": "*fp32",
            "workspace": "*fp32",
            "units": "*i32",
            "alpha": "fp32",
            **dict.fromkeys(["unit_count", "tokens", "columns", "x_stride", "out_stride"], "i32"),
        },
        {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "DESCRIPTORS": config.descriptors,
            "PACKED": packed,
            "PRECISION": config.precision,
            "FLOAT32": dtype == torch.float32,
            "RUN": config.run if config.in_registers else 0,
        },
        capability,
        warps=config.warps,
        stages=config.stages,
        divisible_by_16=pointers,
    )
    check_resources(compiled, capability)
    threads = 32 * config.warps * config.programs_per_sm
    assert compiled.registers * threads <= 65536
    assert compiled.shared_bytes * config.programs_per_sm <= SHARED_MEMORY[capability]
    if capability == 90:
        assert "wgmma.mma_async" in compiled.ptx
        assert "cp.async.bulk.tensor" in compiled.ptx
        assert "HGMMA" in compiled.sass
    elif capability == 100:
        assert "tcgen05.mma" in compiled.ptx
        assert ("cp.async.bulk.tensor" in compiled.ptx) == config.descriptors
    else:
        assert "mma.sync" in compiled.ptx
        assert "cp.async" in compiled.ptx


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_reduce_kernel(capability):
    for block_n in (64, 128, 256):
        compiled = compile_kernel(
            gram_triton.reduce_kernel,
            {
                "workspace": "*fp32",
                "out": "*fp32",
                "reductions": "*i32",
                **dict.fromkeys(["splits", "columns", "out_stride"], "i32"),
            },
            {"BLOCK_M": 128, "BLOCK_N": block_n, "ROWS": gram_triton._REDUCED_ROWS, "MAX_PARTS": 16, "PACKED": True},
            capability,
            warps=4,
            stages=3,
            divisible_by_16=["workspace", "out", "reductions"],
        )
        check_resources(compiled, capability)


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("packed", [False, True])
def test_mirror_kernel(capability, packed):
    compiled = compile_kernel(
        symmetric_triton.mirror_kernel,
        {"source": "*fp32", "target": "*fp32", **dict.fromkeys(["n", "source_stride", "target_stride"], "i32")},
        {"PACKED": packed, "BLOCK": symmetric_triton._BLOCK},
        capability,
        warps=4,
        stages=3,
        divisible_by_16=["source", "target"],
    )
    check_resources(compiled, capability)


def test_row_kernels():
    pointers = {"x": "*bf16", "mask": "*u8", "target": "*bf16", "partial": "*fp32", "out": "*fp32", "alpha": "fp32"}
    for kernel, constants in (
        (gram_rows_triton.gather_rows_kernel, {"MASKED": True, "BLOCK_T": 16, "BLOCK_C": 256}),
        (gram_rows_triton.column_sums_kernel, {"MASKED": True, "BLOCK_T": 32, "BLOCK_C": 128}),
        (gram_rows_triton.add_sums_kernel, {"PACKED": True, "SHARES": 64, "BLOCK_C": 128}),
    ):
        types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
        aligned = [name for name, kind in types.items() if kind.startswith("*")]
        check_resources(compile_kernel(kernel, types, constants, 90, warps=4, stages=3, divisible_by_16=aligned), 90)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_group_kernel(capability):
    block, block_k, warps, stages = gram_group_triton.CONFIG
    count = gram_group_triton.CAPACITY
    compiled = compile_kernel(
        gram_group_triton.gram_group_kernel,
        {"xs": ("*bf16",) * count, "outs": ("*fp32",) * count, "one": "*bf16", "units": "*i32", "alpha": "fp32"}
        | {"tokens": "i32"},
        {"BLOCK": block, "BLOCK_K": block_k, "RUN": gram_group_triton.RUN},
        capability,
        warps=warps,
        stages=stages,
        divisible_by_16=["xs", "outs", "one", "units"],
    )
    check_resources(compiled, capability)
    assert "cp.async.cg" in compiled.ptx  # 16 bytes at a time
    if capability == 90:
        assert "wgmma.mma_async" in compiled.ptx
        assert 3 * 32 * warps * compiled.registers <= 65536 and 3 * compiled.shared_bytes <= SHARED_MEMORY[capability]
