import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which can be imported without a GPU")

from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from surgeon_kernels.gram import gram_triton
from surgeon_kernels.gram import plan as gram_plan
from surgeon_kernels.gram.plan import CONFIGS, blocks_in_order
from surgeon_kernels.runtime import launch as triton_launch


class Compiled(CompiledKernel):
    """Takes arguments alone."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        assert grid == (1, 2, 3)
        return lambda *args: self.launched.append(args)

    def __del__(self):
        pass


class Kernel:
    """Stands for a compiled kernel's source: a launch compiles it."""

    arg_names = ("x",)

    def __init__(self, name, compiles=True):
        self.fn = SimpleNamespace(__name__=name)
        self.compiles = compiles
        self.searched, self.launched = [], []

    def __getitem__(self, grid):
        def search_and_launch(*args, **options):
            self.searched.append((grid, args, options))
            return Compiled(self.launched) if self.compiles else None

        return search_and_launch


def test_the_compiled_kernel_is_searched_once_for_each_key(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    kernel, other = Kernel("a"), Kernel("b")
    for argument in (7, 8, 9):
        triton_launch.launch(kernel, ("x",), (1, 2, 3), argument, num_warps=4)
    assert kernel.searched == [((1, 2, 3), (7,), {"num_warps": 4})]
    assert kernel.launched == [(8,), (9,)]
    triton_launch.launch(kernel, ("y",), (1, 2, 3), 10, num_warps=8)
    triton_launch.launch(other, ("x",), (1, 2, 3), 11)
    assert kernel.searched[1:] == [((1, 2, 3), (10,), {"num_warps": 8})]
    assert other.searched == [((1, 2, 3), (11,), {})]


def test_what_compiles_nothing_is_launched_in_full_every_time(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    kernel = Kernel("interpreted", compiles=False)
    for _ in range(3):
        triton_launch.launch(kernel, (), (1, 2, 3), 1)
    assert len(kernel.searched) == 3 and not kernel.launched


def test_kinds_tell_apart_what_triton_compiles_anew_for():
    x = torch.zeros(64)
    assert triton_launch.kind(x) == triton_launch.kind(x[4:]) != triton_launch.kind(x[1:])
    kinds = [triton_launch.kind(value) for value in (1, 2, 16, 1 << 31)]
    assert len(set(kinds)) == len(kinds)
    assert triton_launch.kind(3) == kinds[1] and triton_launch.kind(32) == triton_launch.kind(0) == kinds[2]


def test_the_cpu_is_no_device_to_switch_to():
    with triton_launch.on_device(torch.zeros(1).get_device()):
        pass


def test_kernels_of_one_name_are_told_apart(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    first, second = Kernel("kernel"), Kernel("kernel")
    for argument in (1, 2):
        triton_launch.launch(first, ("x",), (1, 2, 3), argument)
        triton_launch.launch(second, ("x",), (1, 2, 3), -argument)
    assert (first.launched, second.launched) == ([(2,)], [(-2,)])
    del first, second  # an identity may be given again only to what the cache does not hold
    gc.collect()
    third = Kernel("kernel")
    triton_launch.launch(third, ("x",), (1, 2, 3), 3)
    assert len(third.searched) == 1 and not third.launched


def test_all_arguments_or_none(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    with pytest.raises(TypeError, match="the kernel takes 1 arguments, not 2"):
        triton_launch.launch(Kernel("a"), ("x",), (1, 2, 3), 1, 2)


def test_with_an_unknown_version_of_triton_every_launch_is_the_plain_one(monkeypatch):
    assert [triton_launch.known(v) for v in ("3.5.1", "3.6.0", "3.9.0+git1", "3.10.0", "4.0")] == [
        False, True, True, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(triton_launch, "_direct", False)
    kernel = Kernel("a")
    for argument in (1, 2):
        triton_launch.launch(kernel, ("x",), (1, 2, 3), argument, num_warps=4)
    assert [args for _, args, _ in kernel.searched] == [(1,), (2,)] and not kernel.launched


def test_a_compiled_kernel_hands_its_arguments_over_as_they_are():
    """Direct launches may rely on the Triton installed, if it is a known one."""
    seen = []
    stand_in = SimpleNamespace(
        _init_handles=lambda: None,
        launch_metadata=lambda *args: None,
        run=lambda *args: seen.append(args),
        function="function",
        packed_metadata="metadata",
    )
    CompiledKernel.__getitem__(stand_in, (2, 3, 4))("a", 7, "constant", stream=0)
    assert seen[0][:3] == (2, 3, 4) and seen[0][-3:] == ("a", 7, "constant")


def test_a_descriptor_is_what_its_constructor_makes():
    x = torch.zeros(64, 128, dtype=torch.float16)
    arguments = [64, 128], [128, 1], [32, 64]
    made, checked = gram_triton._descriptor(x, *arguments), TensorDescriptor(x, *arguments)
    assert gram_triton._PLAIN and type(made) is TensorDescriptor
    for name in TensorDescriptor.__dataclass_fields__:
        assert getattr(made, name) is getattr(checked, name) or getattr(made, name) == getattr(checked, name), name


@pytest.mark.parametrize("other", [type("Other", (), {}), type("Slots", (TensorDescriptor,), {"__slots__": ()})])
def test_a_descriptor_of_another_make_is_built_by_its_constructor(other, monkeypatch):
    assert not gram_triton._is_plain(other)
    monkeypatch.setattr(gram_triton, "_PLAIN", False)
    with pytest.raises(AssertionError, match="contiguous"):
        gram_triton._descriptor(torch.zeros(64, 128), [64, 128], [128, 2], [32, 64])


CPU = torch.device("cpu")
CONFIG = CONFIGS[9, torch.bfloat16][1]


def test_a_plan_serves_all_numbers_of_tokens_of_as_many_steps():
    plans = [gram_triton.plan(2048, tokens, torch.bfloat16, True, CONFIG, CPU) for tokens in (65, 100, 128, 129)]
    assert plans[0] is plans[1] is plans[2] is not plans[3]


def test_what_a_graph_was_captured_with_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(gram_triton, "_captured", {})
    on_gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(gram_triton, "_plan", lambda *arguments: gram_triton.Plan(*[None] * 10))
    made = gram_triton.plan(2048, 64, torch.bfloat16, True, CONFIG, on_gpu)
    assert list(gram_triton._captured.values()) == [made]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gram_triton.plan(2048, 64, torch.bfloat16, True, CONFIG, on_gpu)
    assert len(gram_triton._captured) == 1


@pytest.mark.parametrize(
    ("n", "block_m", "block_n"), list(itertools.product([1, 129, 2048, 5000], [64, 128], [64, 128, 256]))
)
def test_blocks_are_counted_as_they_are_listed(n, block_m, block_n):
    config = CONFIG._replace(block_m=block_m, block_n=block_n)
    assert gram_plan._number_of_blocks(n, block_m, block_n) == len(blocks_in_order(n, config))
