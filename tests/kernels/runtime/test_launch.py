import gc
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which can be imported without a GPU")

from triton.compiler import CompiledKernel

from surgeon_kernels.runtime import launch


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
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, other = Kernel("a"), Kernel("b")
    for argument in (7, 8, 9):
        launch.launch(kernel, ("x",), (1, 2, 3), argument, num_warps=4)
    assert kernel.searched == [((1, 2, 3), (7,), {"num_warps": 4})]
    assert kernel.launched == [(8,), (9,)]
    launch.launch(kernel, ("y",), (1, 2, 3), 10, num_warps=8)
    launch.launch(other, ("x",), (1, 2, 3), 11)
    assert kernel.searched[1:] == [((1, 2, 3), (10,), {"num_warps": 8})]
    assert other.searched == [((1, 2, 3), (11,), {})]


def test_what_compiles_nothing_is_launched_in_full_every_time(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    kernel = Kernel("interpreted", compiles=False)
    for _ in range(3):
        launch.launch(kernel, (), (1, 2, 3), 1)
    assert len(kernel.searched) == 3 and not kernel.launched


def test_kinds_tell_apart_what_triton_compiles_anew_for():
    x = torch.zeros(64)
    assert launch.kind(x) == launch.kind(x[4:]) != launch.kind(x[1:])
    kinds = [launch.kind(value) for value in (1, 2, 16, 1 << 31)]
    assert len(set(kinds)) == len(kinds)
    assert launch.kind(3) == kinds[1] and launch.kind(32) == launch.kind(0) == kinds[2]


def test_the_cpu_is_no_device_to_switch_to():
    with launch.on_device(torch.zeros(1).get_device()):
        pass


def test_kernels_of_one_name_are_told_apart(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    first, second = Kernel("kernel"), Kernel("kernel")
    for argument in (1, 2):
        launch.launch(first, ("x",), (1, 2, 3), argument)
        launch.launch(second, ("x",), (1, 2, 3), -argument)
    assert (first.launched, second.launched) == ([(2,)], [(-2,)])
    del first, second  # an identity may be given again only to what the cache does not hold
    gc.collect()
    third = Kernel("kernel")
    launch.launch(third, ("x",), (1, 2, 3), 3)
    assert len(third.searched) == 1 and not third.launched


def test_all_arguments_or_none(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    with pytest.raises(TypeError, match="the kernel takes 1 arguments, not 2"):
        launch.launch(Kernel("a"), ("x",), (1, 2, 3), 1, 2)


def test_with_an_unknown_version_of_triton_every_launch_is_the_plain_one(monkeypatch):
    assert [launch.known(v) for v in ("3.5.1", "3.6.0", "3.9.0+git1", "3.10.0", "4.0")] == [
        False, True, True, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_direct", False)
    kernel = Kernel("a")
    for argument in (1, 2):
        launch.launch(kernel, ("x",), (1, 2, 3), argument, num_warps=4)
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
