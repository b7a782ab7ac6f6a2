"""The 2:4 linear's CUDA kernels."""

import threading
import warnings

import pytest
import torch
from torch.nn import functional

from surgeon_kernels.runtime import extension
from surgeon_kernels.sparse24.linear_2_4 import ACTIVATIONS, linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_tune import tune_2_4
from surgeon_kernels.sparse24.pack_2_4 import pack_2_4, unpack_2_4
from tests.kernels.sparse24.test_linear_2_4 import weight_2_4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RAGGED = [*range(1, 18), 23, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 130, 255, 257, 300, 511, 700, 1025]


@pytest.fixture(autouse=True)
def _needs_the_extension():
    if not extension.available():
        pytest.skip("the CUDA extension cannot be built here")


@pytest.fixture(autouse=True)
def _keeps_choices_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def relative(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


def problem(rows, columns, dtype=torch.bfloat16, seed=0):
    weight = weight_2_4(rows, columns, dtype, "cuda", seed)
    return weight, prepare_2_4(pack_2_4(weight)), torch.randn(rows, device="cuda").to(dtype)


def assert_right(x, weight, prepared, bias=None):
    # Memory that the allocator hands out again holds NaN: an element that is not written shows.
    torch.full((*x.shape[:-1], weight.shape[0]), float("nan"), device="cuda", dtype=x.dtype)
    y = linear_2_4(x, prepared, bias)
    assert y.shape == (*x.shape[:-1], weight.shape[0]) and y.dtype == x.dtype
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torchs = relative(functional.linear(x, weight, bias), exact)
    assert relative(y, exact) <= 2 * torchs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(512, 1024), (336, 1160), (40, 72), (1000, 4096)])
def test_ragged_tokens(rows, columns, dtype):
    weight, prepared, bias = problem(rows, columns, dtype)
    assert prepared.kernel
    for tokens in RAGGED:
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        assert_right(x, weight, prepared, bias if tokens % 2 else None)


@pytest.mark.parametrize("rows, columns", [(4096, 4096), (4096, 11008), (12288, 4096), (22016, 4096)])
def test_shapes_of_a_large_model(rows, columns):
    weight, prepared, _ = problem(rows, columns)
    for tokens in (1, 2, 7, 16, 24, 64, 96, 128, 200, 512, 2048):
        assert_right(torch.randn(tokens, columns, device="cuda").bfloat16(), weight, prepared)


@pytest.mark.parametrize("tokens", [3, 48, 300])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_activation(tokens, activation):
    weight, prepared, bias = problem(512, 1024)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16() / 16
    dense = functional.linear(x.double(), weight.double(), bias.double())
    exact = _apply(activation, dense)
    assert relative(linear_2_4(x, prepared, bias, activation=activation), exact) < 5e-3


def _apply(activation, y):
    return {
        "none": lambda: y,
        "relu": y.relu,
        "gelu": lambda: functional.gelu(y),
        "gelu_tanh": lambda: functional.gelu(y, approximate="tanh"),
        "silu": lambda: functional.silu(y),
    }[activation]()


def test_leading_shapes_strides_and_nothing():
    weight, prepared, bias = problem(512, 1024)
    for x in (
        torch.randn(2, 3, 1024, device="cuda").bfloat16(),
        torch.randn(1024, device="cuda").bfloat16(),
        torch.randn(4, 7, 1024, device="cuda").bfloat16()[:, -1:],
        torch.randn(1024, 5, device="cuda").bfloat16().T,
        torch.randn(1 + 3 * 1024, device="cuda").bfloat16()[1:].view(3, 1024),  # not aligned to 16 bytes
    ):
        assert_right(x, weight, prepared, bias)
    assert linear_2_4(torch.empty(0, 1024, device="cuda").bfloat16(), prepared).shape == (0, 512)


def test_same_inputs_give_the_same_bits():
    _, prepared, bias = problem(4096, 4096)
    for tokens in (1, 16, 64, 200, 1024):
        x = torch.randn(tokens, 4096, device="cuda").bfloat16()
        first = linear_2_4(x, prepared, bias)
        assert all(torch.equal(linear_2_4(x, prepared, bias), first) for _ in range(20))


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 300, 1024])
def test_captured_in_a_cuda_graph(tokens):
    _, prepared, bias = problem(1024, 1024)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    hidden = linear_2_4(linear_2_4(x, prepared, bias) / 32, prepared, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_2_4(linear_2_4(x, prepared, bias) / 32, prepared, bias)
    graph.replay()
    assert torch.equal(y, hidden)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, linear_2_4(linear_2_4(x, prepared, bias) / 32, prepared, bias))


def test_a_chain_of_dependent_calls_reads_what_the_last_wrote():
    """A kernel may start while the one before it still runs: x must be the finished one."""
    prepared = prepare_2_4(pack_2_4(weight_2_4(2048, 2048, device="cuda") / 32))
    for tokens in (1, 16, 64, 256):
        hidden = expected = torch.randn(tokens, 2048, device="cuda").bfloat16()
        for _ in range(50):
            expected = linear_2_4(expected, prepared)
            torch.cuda.synchronize()
        for _ in range(50):
            hidden = linear_2_4(hidden, prepared)
        assert torch.equal(hidden, expected)


@pytest.mark.parametrize("tokens", [1, 12, 48, 100, 300, 1024])
@pytest.mark.parametrize("captured", [False, True])
def test_a_bias_written_by_the_kernel_just_before_is_the_one_added(tokens, captured):
    """The kernel before is one of ours, which lets the next start at its own beginning; it runs long for its size."""
    writer = prepare_2_4(pack_2_4(weight_2_4(1024, 16384, device="cuda") / 64))
    weight, prepared, _ = problem(1024, 1024)
    seeds = [torch.randn(1, 16384, device="cuda").bfloat16() for _ in range(8)]
    x = torch.randn(tokens, 1024, device="cuda").bfloat16() / 32
    biases = [linear_2_4(seed, writer)[0] for seed in seeds]
    torch.cuda.synchronize()
    expected = [linear_2_4(x, prepared, bias) for bias in biases]
    exact = functional.linear(x.double(), weight.double(), biases[0].double())
    assert relative(expected[0], exact) < 5e-3 and biases[0].norm() > 10
    torch.cuda.synchronize()

    def chain():
        return [linear_2_4(x, prepared, linear_2_4(seed, writer)[0]) for seed in seeds * 8]

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = chain()
        for _ in range(20):
            for y in results:
                y.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(y, right) for y, right in zip(results, expected * 8, strict=True))
    else:
        for _ in range(20):
            assert all(torch.equal(y, right) for y, right in zip(chain(), expected * 8, strict=True))


@pytest.mark.parametrize("tokens", [1, 48, 300])
def test_a_bias_updated_in_place_just_before_is_the_one_added(tokens):
    _, prepared, _ = problem(512, 1024)
    x, bias = torch.zeros(tokens, 1024, device="cuda").bfloat16(), torch.zeros(512, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    linear_2_4(x, prepared, bias)
    with torch.cuda.graph(graph):
        steps = [linear_2_4(x, prepared, bias.add_(1)) for _ in range(100)]
    for first in (0, 100):  # exact in bfloat16
        graph.replay()
        assert [float(y.min()) for y in steps] == [float(y.max()) for y in steps] == [*range(first + 1, first + 101)]


def test_two_threads_two_streams():
    problems = [problem(1024, 2048, seed=seed) for seed in range(2)]
    inputs = [torch.randn(tokens, 2048, device="cuda").bfloat16() for tokens in (1, 9, 40, 128, 400)]
    expected = [[linear_2_4(x, prepared, bias) for x in inputs] for _, prepared, bias in problems]
    torch.cuda.synchronize()
    failures = []

    def work(index):
        _, prepared, bias = problems[index]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                for x, right in zip(inputs, expected[index], strict=True):
                    if not torch.equal(linear_2_4(x, prepared, bias), right):
                        failures.append((index, x.shape[0]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_registered_op_passes_opcheck():
    _, prepared, bias = problem(512, 1024)
    for tokens in (1, 200):
        x = torch.randn(tokens, 1024, device="cuda").bfloat16()
        arguments = (x, prepared.fragments, bias, prepared.rows, 0)
        torch.library.opcheck(torch.ops.surgeon_kernels.linear_2_4.default, arguments)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_without_graph_breaks(mode):
    _, prepared, bias = problem(512, 1024)
    compiled = torch.compile(lambda x: linear_2_4(x, prepared, bias).relu(), fullgraph=True, mode=mode)
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    for _ in range(3):
        assert torch.equal(compiled(x), linear_2_4(x, prepared, bias).relu())


@pytest.mark.parametrize("keep_dense", [False, True])
def test_gradients_are_those_of_the_dense_linear(keep_dense):
    weight, prepared, bias = problem(256, 512)
    prepared = prepared._replace(dense=weight if keep_dense else None)
    x = torch.randn(20, 512, device="cuda").bfloat16().requires_grad_()
    bias.requires_grad_()
    dy = torch.randn(20, 256, device="cuda").bfloat16()
    ours = torch.autograd.grad(linear_2_4(x, prepared, bias), (x, bias), dy)
    dense = torch.autograd.grad(functional.linear(x, weight, bias), (x, bias), dy)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(512, 1024), (336, 1160), (40, 72), (7, 8), (1000, 4096)])
def test_unpacks_bit_for_bit(rows, columns, dtype):
    weight, prepared, _ = problem(rows, columns, dtype)
    assert torch.equal(prepared.unpacked().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(unpack_2_4(prepared.packed()), weight)
    arguments = (prepared.fragments, rows, columns, dtype)
    torch.library.opcheck(torch.ops.surgeon_kernels.linear_2_4_unpack.default, arguments)


@pytest.mark.parametrize("tokens", [300, 1029])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep_dense", [False, True])
def test_the_dense_product_of_devices_without_wgmma(tokens, activation, keep_dense):
    """Pinned here, where it would not be chosen: of more rows than other tests, which share pins by size."""
    weight, prepared, bias = problem(1552, 1024)
    prepared = prepared._replace(dense=weight if keep_dense else None)
    ops = torch.ops.surgeon_kernels
    x = torch.randn(tokens, 1024, device="cuda").bfloat16() / 16
    dense = ops.linear_2_4_choices() - 1
    assert ops.linear_2_4_pin(x, prepared.fragments, 1552, dense)
    assert ops.linear_2_4_choice(x, prepared.fragments, 1552) == dense
    assert torch.equal(linear_2_4(x, prepared), functional.linear(x, weight))
    y = linear_2_4(x, prepared, bias, activation=activation)
    assert torch.equal(y, _apply(activation, torch.addmm(bias, x, weight.T)))
    with torch.no_grad():
        assert torch.equal(linear_2_4(x[None].clone().requires_grad_(), prepared)[0], functional.linear(x, weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_2_4(x, prepared, bias, activation=activation)
    graph.replay()
    assert torch.equal(captured, y)


@pytest.mark.parametrize("offset", [2, 8])
def test_fragments_that_do_not_lie_as_the_copy_engine_needs_are_refused(offset):
    _, prepared, _ = problem(64, 256)
    data = prepared.fragments
    shifted = torch.empty(data.numel() + offset, dtype=torch.uint8, device="cuda")[offset:].view_as(data).copy_(data)
    copied = prepared._replace(fragments=shifted.clone())
    torch.cuda.synchronize()
    for tokens in (1, 300):
        x = torch.randn(tokens, 256, device="cuda").bfloat16()
        with pytest.raises(ValueError, match="fragments must begin at a multiple of 16 bytes"):
            linear_2_4(x, prepared._replace(fragments=shifted))
        assert torch.equal(linear_2_4(x, copied), linear_2_4(x, prepared))
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        prepared._replace(fragments=shifted).unpacked()


def test_what_the_op_cannot_take_is_refused():
    _, prepared, bias = problem(64, 256)
    op, x = torch.ops.surgeon_kernels.linear_2_4, torch.randn(4, 256, device="cuda").bfloat16()
    for activation in (-1, len(ACTIVATIONS)):
        with pytest.raises(ValueError, match=f"no activation has the number {activation}"):
            op(x, prepared.fragments, bias, 64, activation)
    for rows in (-1, 63 + 16, 1 << 40):
        with pytest.raises(ValueError, match="fragments do not fit"):
            op(x, prepared.fragments, None, rows, 0)
    with pytest.raises(ValueError, match="no compressed weight"):
        torch.ops.surgeon_kernels.linear_2_4_run(
            x, prepared.fragments, 64, torch.ops.surgeon_kernels.linear_2_4_choices(), prepared.fragments[:0]
        )
    with pytest.raises(ValueError, match="dense weight must be"):
        op(x, prepared.fragments, None, 64, 0, None, torch.zeros(64, 128, device="cuda").bfloat16())


def test_tuning_finds_no_kernel_wrong():
    """All of them, where all run: a warning would be an error."""
    for dtype in (torch.bfloat16, torch.float16):
        _, prepared, _ = problem(720, 2048, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(tune_2_4(prepared, (1, 2, 8, 16, 64, 300, 2048))) == [1, 2, 8, 16, 64, 300, 2048]


def test_tuning_keeps_a_choice_that_is_right():
    weight, prepared, bias = problem(768, 1536)
    chosen = tune_2_4(prepared, (1, 64, 512))
    assert list(chosen) == [1, 64, 512] and tune_2_4(prepared, (512, 64, 1)) == chosen  # from disk
    ops = torch.ops.surgeon_kernels
    for tokens, choice in chosen.items():
        x = torch.randn(tokens, 1536, device="cuda").bfloat16()
        assert ops.linear_2_4_choice(x, prepared.fragments, 768) == choice
        assert torch.equal(linear_2_4(x, prepared), ops.linear_2_4_run(x, prepared.fragments, 768, choice))
        assert_right(x, weight, prepared, bias)


def test_every_kernel_is_right_wherever_it_runs():
    weight, prepared, _ = problem(336, 1160)
    for tokens in (1, 13, 70, 200, 333):
        x = torch.randn(tokens, 1160, device="cuda").bfloat16()
        exact = functional.linear(x.double(), weight.double())
        torchs = relative(functional.linear(x, weight), exact)
        ran = 0
        for choice in range(torch.ops.surgeon_kernels.linear_2_4_choices()):
            y = torch.ops.surgeon_kernels.linear_2_4_run(x, prepared.fragments, 336, choice)
            if y is not None:
                assert relative(y, exact) <= 2 * torchs, choice
                ran += 1
        assert ran >= 5


@pytest.mark.parametrize("tokens", [5, 150, 333])
def test_every_kernel_adds_a_bias_and_applies_an_activation(tokens):
    """Pinned one after the other: of a number of rows that no other test has."""
    weight, prepared, bias = problem(360, 1160)
    ops = torch.ops.surgeon_kernels
    x = torch.randn(tokens, 1160, device="cuda").bfloat16()
    exact = functional.linear(x.double(), weight.double(), bias.double()).relu()
    for choice in range(ops.linear_2_4_choices()):
        assert ops.linear_2_4_pin(x, prepared.fragments, 360, choice)
        assert relative(linear_2_4(x, prepared, bias, activation="relu"), exact) < 5e-3, choice


def test_a_choice_that_does_not_exist_runs_and_pins_nothing_and_no_tokens_take_no_kernel():
    _, prepared, _ = problem(336, 1160)
    ops, data = torch.ops.surgeon_kernels, prepared.fragments
    x = torch.randn(3, 1160, device="cuda").bfloat16()
    present = ops.linear_2_4_choice(x, data, 336)
    for choice in (-1, ops.linear_2_4_choices(), 1 << 32):
        assert ops.linear_2_4_run(x, data, 336, choice) is None
        assert not ops.linear_2_4_pin(x, data, 336, choice)
    assert ops.linear_2_4_choice(x, data, 336) == present
    x = torch.zeros(0, 1160, device="cuda").bfloat16()
    for choice in range(ops.linear_2_4_choices()):
        assert ops.linear_2_4_run(x, data, 336, choice).shape == (0, 336)
    torch.cuda.synchronize()


def test_an_empty_weight_and_a_bias_with_gaps():
    for rows, columns in ((0, 16), (16, 0)):
        prepared = prepare_2_4(pack_2_4(torch.zeros(rows, columns, device="cuda").bfloat16()))
        bias = torch.arange(2.0 * rows, device="cuda").bfloat16()[::2]
        y = linear_2_4(torch.zeros(3, columns, device="cuda").bfloat16(), prepared, bias)
        assert not prepared.kernel and torch.equal(y, bias.expand(3, rows))
    _, prepared, bias = problem(64, 256)
    x, gaps = torch.randn(5, 256, device="cuda").bfloat16(), bias.repeat_interleave(2)[::2]
    assert not gaps.is_contiguous() and torch.equal(linear_2_4(x, prepared, gaps), linear_2_4(x, prepared, bias))


@pytest.fixture
def cusparselt():
    if not torch.ops.surgeon_kernels.cusparselt_version():
        pytest.skip("cuSPARSELt is not found")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cusparselt_takes_many_tokens_where_it_was_asked_for(cusparselt, dtype):
    weight = weight_2_4(512, 1040, dtype, "cuda")
    prepared, bias = prepare_2_4(pack_2_4(weight), cusparselt=True), torch.randn(512, device="cuda").to(dtype)
    own = prepared._replace(compressed=None)
    assert prepared.nbytes == own.nbytes + prepared.compressed.nbytes
    for tokens in (1024, 1029, 3000):
        x = torch.randn(tokens, 1040, device="cuda").to(dtype)
        assert_right(x, weight, prepared)
        few = torch.randn(7, 1040, device="cuda").to(dtype)
        assert torch.equal(linear_2_4(few, prepared), linear_2_4(few, own))
        assert torch.equal(linear_2_4(x, prepared, bias), linear_2_4(x, own, bias))
        assert torch.equal(linear_2_4(x, prepared, activation="relu"), linear_2_4(x, own, activation="relu"))


def test_cusparselt_makes_no_plan_in_a_capture(cusparselt):
    """A size that has not run before is then computed by our kernels."""
    prepared = prepare_2_4(pack_2_4(weight_2_4(1072, 1024, device="cuda")), cusparselt=True)
    x = torch.randn(2048, 1024, device="cuda").bfloat16()
    own = linear_2_4(x, prepared._replace(compressed=None))
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear_2_4(x, prepared)
        graph.replay()
        assert torch.equal(y, own)
        ops = torch.ops.surgeon_kernels
        choice = ops.linear_2_4_choice(x, prepared.fragments, 1072, True)
        assert choice >= ops.linear_2_4_choices()
        own = linear_2_4(x, prepared)  # makes the plan, which the next capture finds


def test_cusparselt_refuses_what_it_cannot_take(cusparselt):
    with pytest.raises(ValueError, match="divisible by 16"):
        prepare_2_4(pack_2_4(weight_2_4(40, 72, device="cuda")), cusparselt=True)


def test_cusparselt_in_a_cuda_graph_on_two_streams_and_compiled(cusparselt):
    prepared = prepare_2_4(pack_2_4(weight_2_4(1024, 1024, device="cuda") / 32), cusparselt=True)
    inputs = [torch.randn(1024 + 8 * i, 1024, device="cuda").bfloat16() for i in range(2)]
    expected = [linear_2_4(linear_2_4(x, prepared), prepared) for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_2_4(linear_2_4(inputs[0], prepared), prepared)
    # More plans than are kept: that of the graph stays.
    ops, data = torch.ops.surgeon_kernels, prepared.fragments
    sizes = [step * count for step in (8, 16, 32, 64) for count in range(9, 17)]
    for tokens in sizes:
        for algorithm in range(20):
            choice = ops.linear_2_4_choices() + algorithm
            ops.linear_2_4_run(inputs[0][:tokens], data, 1024, choice, prepared.compressed)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected[0])
    compiled = torch.compile(lambda x: linear_2_4(linear_2_4(x, prepared), prepared), fullgraph=True)
    assert torch.equal(compiled(inputs[0]), expected[0])
    failures = []

    def work(x, right):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(linear_2_4(linear_2_4(x, prepared), prepared), right):
                    failures.append(x.shape[0])

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
