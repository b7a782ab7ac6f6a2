"""The 2:4 linear's layout and reference, on the CPU."""

import functools
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from surgeon_kernels.sparse24 import linear_2_4 as module
from surgeon_kernels.sparse24.linear_2_4 import ACTIVATIONS, linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_layout import UNIT_BYTES, fragments, from_fragments
from surgeon_kernels.sparse24.pack_2_4 import Packed24, pack_2_4, unpack_2_4


def weight_2_4(rows, columns, dtype=torch.bfloat16, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    groups = torch.randn(rows, columns // 4, 4, device=device, generator=generator)
    kept = torch.rand(rows, columns // 4, 4, device=device, generator=generator).topk(2, dim=2).indices
    return torch.zeros_like(groups).scatter(2, kept, groups.gather(2, kept)).view(rows, columns).to(dtype)


def sparse_tile(registers, metadata, selector):
    """The 16 x 32 operand that ``mma.sp.m16n8k32`` reads from a warp, by the fragment layouts of the PTX ISA.

    ``registers`` [lane 32][register 4][2] are values, ``metadata`` [lane 32] words, ``selector`` says which two lanes
    of every four hold the positions.
    """
    tile = torch.zeros(16, 32, dtype=registers.dtype)
    for row in range(16):
        for group in range(8):
            lane, half = 4 * (row % 8), row // 8
            word = int(metadata[lane + 2 * selector + group // 4]) >> (16 * half + 4 * (group % 4))
            assert word & 3 < word >> 2 & 3, "equal or descending positions are undefined"
            for k in range(2):
                value = registers[lane + group % 4, 2 * (group // 4) + half, k]
                tile[row, 4 * group + (word >> 2 * k & 3)] = value
    return tile


@pytest.mark.parametrize("rows, columns", [(16, 128), (40, 136), (7, 8), (33, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_warp_reads_the_weight_from_its_fragments(rows, columns, dtype):
    weight = weight_2_4(rows, columns, dtype)
    data = fragments(pack_2_4(weight))
    blocks, units = -(-rows // 16), -(-columns // 128)
    assert data.shape == (blocks, units, UNIT_BYTES) and data.is_contiguous()
    read = torch.zeros(blocks * 16, units * 128, dtype=dtype)
    for block in range(blocks):
        for unit in range(units):
            registers = data[block, unit, :2048].view(dtype).view(4, 32, 4, 2)
            metadata = data[block, unit, 2048:].view(torch.int32).view(32, 2).long() & 0xFFFFFFFF
            for tile in range(4):
                r, c = 16 * block, 128 * unit + 32 * tile
                read[r : r + 16, c : c + 32] = sparse_tile(registers[tile], metadata[:, tile // 2], tile % 2)
    assert torch.equal(read[:rows, :columns], weight)
    assert not read[rows:].any() and not read[:, columns:].any()


@pytest.mark.parametrize("rows, columns", [(16, 128), (40, 136), (7, 8), (0, 16)])
def test_fragments_come_back_bit_for_bit(rows, columns):
    packed = pack_2_4(weight_2_4(rows, columns))
    back = from_fragments(fragments(packed), rows, columns, torch.bfloat16)
    assert torch.equal(back.values.view(torch.int16), packed.values.view(torch.int16))
    assert torch.equal(back.indices, packed.indices)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep_dense", [False, True])
def test_reference_is_the_dense_linear(activation, keep_dense):
    weight, bias = weight_2_4(24, 40), torch.randn(24).bfloat16()
    x = torch.randn(3, 5, 40).bfloat16()
    dense = functional.linear(x.double(), weight.double(), bias.double())
    apply = {
        "none": dense,
        "relu": dense.clamp(min=0),
        "gelu": dense * torch.special.ndtr(dense),
        "gelu_tanh": functional.gelu(dense, approximate="tanh"),
        "silu": dense * dense.sigmoid(),
    }
    prepared = prepare_2_4(pack_2_4(weight), keep_dense=keep_dense)
    assert (prepared.dense is not None) == keep_dense
    assert prepared.nbytes == 2 * 1 * UNIT_BYTES + keep_dense * weight.nbytes
    for operand in (prepared, pack_2_4(weight)):
        torch.testing.assert_close(
            linear_2_4(x, operand, bias, activation=activation).double(), apply[activation], atol=0.05, rtol=0.02
        )


@pytest.mark.parametrize("rows, columns", [(0, 16), (16, 0), (0, 0)])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_empty_weights(rows, columns, keep_dense):
    prepared = prepare_2_4(pack_2_4(torch.zeros(rows, columns).bfloat16()), keep_dense=keep_dense)
    bias = torch.randn(rows).bfloat16()
    y = linear_2_4(torch.zeros(2, 3, columns).bfloat16(), prepared, bias)
    assert torch.equal(y, bias.expand(2, 3, rows))


def test_gradients_reach_x_and_bias():
    weight = weight_2_4(8, 16)
    x, bias = torch.randn(4, 16).bfloat16().requires_grad_(), torch.zeros(8).bfloat16().requires_grad_()
    linear_2_4(x, prepare_2_4(pack_2_4(weight)), bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 16), atol=0.02, rtol=0.02)
    torch.testing.assert_close(bias.grad, torch.full((8,), 4.0).bfloat16())


@pytest.fixture
def kernel_weight():
    """A dense weight, and the same for the op, whose implementation for the CPU stands in for the kernel."""
    dense = weight_2_4(8, 16)
    return dense, prepare_2_4(pack_2_4(dense))._replace(kernel=True)


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (3, 2)])
def test_gradients_where_a_kernel_computes_the_product(leading, keep_dense, kernel_weight):
    """Of any leading shape, none included."""
    dense, prepared = kernel_weight
    prepared = prepared._replace(dense=dense if keep_dense else None)
    x, bias = torch.randn(*leading, 16).bfloat16().requires_grad_(), torch.randn(8).bfloat16().requires_grad_()
    dy = torch.randn(*leading, 8).bfloat16()
    y = linear_2_4(x, prepared, bias)
    assert torch.equal(y, functional.linear(x, dense, bias))
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    assert torch.equal(dx, dy @ dense)
    torch.testing.assert_close(db, dy.reshape(-1, 8).sum(0))
    only = linear_2_4(x, prepared, bias.detach()) if leading != (0,) else None
    assert only is None or torch.equal(torch.autograd.grad(only, x, dy)[0], dy @ dense)


def test_gradients_and_their_gradients_by_differences(kernel_weight, monkeypatch):
    """In float64, which the weight can have only dense."""
    monkeypatch.setattr(module, "_kernel", lambda x, weight, bias: functional.linear(x, weight.dense, bias))
    dense, prepared = kernel_weight
    prepared = prepared._replace(dense=dense.double(), dtype=torch.float64)
    x, bias = torch.randn(3, 16).double().requires_grad_(), torch.randn(8).double().requires_grad_()
    for activation in ("none", "silu"):
        function = functools.partial(linear_2_4, weight=prepared, activation=activation)
        assert torch.autograd.gradcheck(lambda x, b, f=function: f(x, bias=b), (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, b, f=function: f(x, bias=b), (x, bias))


@pytest.mark.parametrize("kept", ["fragments", "dense"])
def test_a_weight_written_to_before_the_backward_pass_is_noticed(kept, kernel_weight):
    dense, prepared = kernel_weight
    prepared = prepared._replace(dense=dense)
    y = linear_2_4(torch.randn(2, 16).bfloat16().requires_grad_(), prepared)
    getattr(prepared, kept).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_pass_the_hooks_and_are_freed_with_the_graph(kernel_weight):
    _, prepared = kernel_weight
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear_2_4(torch.randn(2, 16).bfloat16().requires_grad_(), prepared)
    assert any(t.data_ptr() == prepared.fragments.data_ptr() for t in saved)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_the_kernel_and_its_gradients_compile_in_one_graph(kernel_weight):
    _, prepared = kernel_weight
    x, bias = torch.randn(4, 16).bfloat16().requires_grad_(), torch.randn(8).bfloat16().requires_grad_()
    compiled = torch.compile(lambda x, b: linear_2_4(x, prepared, b), fullgraph=True, backend="aot_eager")
    y, right = compiled(x, bias), linear_2_4(x, prepared, bias)
    assert torch.equal(y, right)
    dy = torch.randn_like(y)
    for ours, eager in zip(*(torch.autograd.grad(each, (x, bias), dy) for each in (y, right)), strict=True):
        assert torch.equal(ours, eager)


def test_an_exported_graph_loads_in_a_process_that_has_prepared_no_weight(kernel_weight, tmp_path):
    dense, prepared = kernel_weight

    class Layer(torch.nn.Module):
        def forward(self, x):
            return linear_2_4(x, prepared, activation="relu")

    x = torch.randn(4, 16).bfloat16()
    with torch.no_grad():
        torch.export.save(torch.export.export(Layer(), (x,)), tmp_path / "layer.pt2")
    torch.save(x, tmp_path / "x.pt")
    program = (
        "import torch, surgeon_kernels\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"layer = torch.export.load({str(tmp_path / 'layer.pt2')!r})\n"
        "assert any('linear_2_4' in str(node.target) for node in layer.graph.nodes)\n"
        f"torch.save(layer.module()(x), {str(tmp_path / 'y.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "y.pt"), functional.linear(x, dense).relu())


@pytest.mark.parametrize(
    "op, arguments, shape, dtype",
    [
        ("linear_2_4", (torch.empty(3, 5, 16).bfloat16(), torch.empty(1, 1, 2304), None, 8, 0), [3, 5, 8], "bfloat16"),
        ("linear_2_4_unpack", (torch.empty(1, 1, 2304).byte(), 8, 16, torch.float16), [8, 16], "float16"),
        ("nm_select", (torch.empty(4, 8), None, None, 2, 4, None, 1.0, True, torch.tensor(False)), [4, 8], "bool"),
        ("nm_group_cost", (torch.empty(4, 8), None, None, 2, 4, torch.tensor(False)), [4, 2], "float32"),
        ("nm_prune", (torch.empty(4, 8).half(), *[torch.empty(4)] * 2, 2, 4, torch.tensor(False)), [4, 8], "float16"),
        ("cost_histogram", ([torch.empty(4, 8)], *[[torch.empty(4)]] * 2, 0, 1, 0, 20, 2048, 1), [1, 2050], "int64"),
        ("cost_mask", (torch.empty(4, 8), torch.empty(4), torch.empty(8), 1.0, True), [4, 8], "bool"),
    ],
)
def test_ops_are_traced_without_the_extension(op, arguments, shape, dtype):
    """Ops that a graph may hold have their schema and their fake kernel from the import on."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = getattr(torch.ops.surgeon_kernels, op)(*arguments)
    assert list(y.shape) == shape and y.dtype == getattr(torch, dtype)


def test_compiles_in_one_graph():
    weight, x = prepare_2_4(pack_2_4(weight_2_4(8, 16))), torch.randn(4, 16).bfloat16()
    compiled = torch.compile(lambda x: linear_2_4(x, weight), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), linear_2_4(x, weight))


def test_what_does_not_fit_is_refused():
    packed = pack_2_4(weight_2_4(8, 16))
    prepared, x = prepare_2_4(packed), torch.randn(4, 16).bfloat16()
    with pytest.raises(ValueError, match=r"x must be \[..., 16\]"):
        linear_2_4(x[:, :8], prepared)
    with pytest.raises(TypeError, match=r"x must be torch\.bfloat16"):
        linear_2_4(x.half(), prepared)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        linear_2_4(x, prepared, torch.zeros(16).bfloat16())
    with pytest.raises(ValueError, match="activation must be one of"):
        linear_2_4(x, prepared, activation="tanh")
    with pytest.raises(TypeError, match="bfloat16 and float16"):
        prepare_2_4(Packed24(packed.values.float(), packed.indices))
    with pytest.raises(ValueError, match="divisible by 8"):
        prepare_2_4(pack_2_4(weight_2_4(8, 12)))


def test_packed_weight_comes_back_from_a_prepared_one():
    packed = pack_2_4(weight_2_4(40, 24))
    assert torch.equal(unpack_2_4(prepare_2_4(packed).packed()), unpack_2_4(packed))


def test_cusparselt_has_no_effect_without_the_kernel():
    packed = pack_2_4(weight_2_4(8, 16))
    prepared, x = prepare_2_4(packed, cusparselt=True), torch.randn(4, 16).bfloat16()
    assert prepared.compressed is None and torch.equal(linear_2_4(x, prepared), linear_2_4(x, packed))
