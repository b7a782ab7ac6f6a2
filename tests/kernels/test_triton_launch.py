from types import SimpleNamespace

import torch

from surgeon_kernels import triton_launch


class Kernel:
    """Stands for a compiled kernel's source: a launch compiles it, and a compiled one takes arguments alone."""

    def __init__(self, name, compiles=True):
        self.fn = SimpleNamespace(__name__=name)
        self.compiles = compiles
        self.searched, self.launched = [], []

    def __getitem__(self, grid):
        def search_and_launch(*args, **options):
            self.searched.append((grid, args, options))
            return {(1, 2, 3): lambda *args: self.launched.append(args)} if self.compiles else None

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
