"""The tuning of 2:4 linears, with kernels that are only pretended."""

import contextlib
import types
import warnings

import pytest
import torch
from torch.nn import functional

from surgeon_kernels.sparse24 import linear_2_4_tune as module
from surgeon_kernels.sparse24.linear_2_4 import prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_tune import tune_2_4
from surgeon_kernels.sparse24.pack_2_4 import pack_2_4
from tests.kernels.sparse24.test_linear_2_4 import weight_2_4

DENSE = weight_2_4(40, 64)


def product(x):
    return functional.linear(x, DENSE)


def one_element_off(x):
    y = product(x)
    y[-1, -1] += 4 * y.float().square().mean().sqrt()
    return y


def one_tile_unwritten(x):
    y = product(x)
    y[:, 32:] = float("nan")
    return y


def rounded_otherwise(x):
    return (product(x).double() * (1 + 2**-8)).bfloat16()


class Kernels:
    """Ops whose choice ``i`` computes ``products[i]``, in ``seconds[i]``; None does not run. The first is in use."""

    def __init__(self, monkeypatch, products, seconds):
        self.products, self.pinned, self.timed, self.poisoned = products, {}, set(), True
        ops = torch.ops.surgeon_kernels
        monkeypatch.setattr(ops, "linear_2_4_choices", lambda: len(products), raising=False)
        monkeypatch.setattr(ops, "linear_2_4_choice", lambda x, *_: 0, raising=False)
        monkeypatch.setattr(ops, "linear_2_4_run", self.run, raising=False)
        monkeypatch.setattr(ops, "linear_2_4_pin", self.pin, raising=False)
        monkeypatch.setattr(module, "_graph", lambda calls: calls[0])
        monkeypatch.setattr(module, "_time", lambda calls: self.time(calls[0].args[2], seconds))
        monkeypatch.setattr(module, "_wrong", set())
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        properties = types.SimpleNamespace(L2_cache_size=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")

    def run(self, x, fragments, rows, choice, compressed, poisoned):
        self.poisoned = self.poisoned and poisoned  # nothing else runs: timing is pretended
        return self.products[choice] and self.products[choice](x)

    def pin(self, x, fragments, rows, choice, library):
        self.pinned[len(x)] = choice
        return True

    def time(self, choice, seconds):
        self.timed.add(choice)
        return seconds[choice]


@pytest.fixture
def weight():
    return prepare_2_4(pack_2_4(DENSE))._replace(kernel=True)


def test_a_wrong_kernel_is_neither_timed_nor_pinned_and_named_once(monkeypatch, weight):
    wrong = [one_element_off, one_tile_unwritten, lambda x: torch.zeros_like(product(x)), lambda x: product(-x)]
    kernels = Kernels(monkeypatch, [product, *wrong, rounded_otherwise, None], [2.0, 0.1, 0.1, 0.1, 0.1, 1.0, 0.1])
    with pytest.warns(RuntimeWarning) as said:
        assert tune_2_4(weight, (1, 16)) == {1: 5, 16: 5}
    assert kernels.pinned == {1: 5, 16: 5} and kernels.timed == {0, 5} and kernels.poisoned
    assert [str(each.message) for each in said] == [
        f"2:4 kernel {choice} is not used on a device: its product of 1 tokens with 40 rows of 64 columns is not that "
        "of kernel 0"
        for choice in (1, 2, 3, 4)
    ]


def test_the_kernel_in_use_stays_for_a_smaller_gain(monkeypatch, weight):
    Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.96])
    assert tune_2_4(weight, (4,)) == {4: 0}


@pytest.mark.parametrize("present", [one_tile_unwritten, lambda x: product(x) / 0.0, lambda x: None])
def test_nothing_is_pinned_where_nothing_can_be_compared(monkeypatch, weight, present):
    kernels = Kernels(monkeypatch, [present, product], [1.0, 0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune_2_4(weight, (4,)) == {4: 0}
    assert not kernels.pinned and not kernels.timed


def test_tuning_needs_tokens():
    """None have no time; what is chosen for them would be chosen for one."""
    prepared = prepare_2_4(pack_2_4(weight_2_4(8, 16)))
    assert tune_2_4(prepared) == {}
    for tokens in ((0,), (4, -1)):
        with pytest.raises(ValueError, match="tokens must be positive"):
            tune_2_4(prepared, tokens)
