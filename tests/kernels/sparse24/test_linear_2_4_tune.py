"""The tuning of 2:4 linears, with kernels that are only pretended."""

import contextlib
import json
import types
import warnings

import pytest
import torch
from torch.nn import functional

from surgeon_kernels.sparse24 import kept_choices
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
        self.geometry = [0, 64, 8, 1, 132]
        ops = torch.ops.surgeon_kernels
        monkeypatch.setattr(ops, "linear_2_4_choices", lambda: len(products), raising=False)
        monkeypatch.setattr(ops, "linear_2_4_choice", lambda x, *_: 0, raising=False)
        monkeypatch.setattr(ops, "linear_2_4_geometry", lambda choice: [*self.geometry, choice], raising=False)
        monkeypatch.setattr(ops, "cusparselt_version", lambda: 0, raising=False)
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
        runs = choice < len(self.products) and self.products[choice]
        return runs(x) if runs else None

    def pin(self, x, fragments, rows, choice, library):
        exists = 0 <= choice < len(self.products)
        if exists:
            self.pinned[len(x)] = choice
        return exists

    def time(self, choice, seconds):
        self.timed.add(choice)
        return seconds[choice]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The folder of the choices that are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "surgeon-kernels"


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
def test_nothing_is_pinned_where_nothing_can_be_compared(monkeypatch, weight, present, cache):
    kernels = Kernels(monkeypatch, [present, product], [1.0, 0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune_2_4(weight, (4,)) == {4: 0}
    assert not kernels.pinned and not kernels.timed and not cache.exists()


def test_choices_are_found_on_disk_and_new_ones_added(monkeypatch, weight, cache):
    kernels = Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.1])
    assert tune_2_4(weight, (1, 4)) == {1: 1, 4: 1}
    (path,) = cache.iterdir()
    assert path.name.startswith("linear-2-4-a-device-")
    assert json.loads(path.read_text()) == {"40 x 64 bfloat16, 1 tokens": 1, "40 x 64 bfloat16, 4 tokens": 1}
    kernels.timed.clear(), kernels.pinned.clear()
    assert tune_2_4(weight, (4, 1, 4)) == {4: 1, 1: 1} == kernels.pinned and not kernels.timed
    assert tune_2_4(weight, (4, 16)) == {4: 1, 16: 1} == {n: kernels.pinned[n] for n in (4, 16)} and kernels.timed
    assert json.loads(path.read_text()).keys() == {f"40 x 64 bfloat16, {n} tokens" for n in (1, 4, 16)}
    assert [*cache.iterdir()] == [path]


def test_choices_on_disk_are_left_alone_if_asked(monkeypatch, weight, cache):
    kernels = Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.1])
    assert tune_2_4(weight, (1,), keep=False) == {1: 1} and not cache.exists()
    tune_2_4(weight, (1,))
    kernels.timed.clear()
    assert tune_2_4(weight, (1,), keep=False) == {1: 1} and kernels.timed == {0, 1}


def test_choices_are_those_of_a_device_its_kernels_and_versions(monkeypatch, weight, cache):
    kernels = Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.1])
    tune_2_4(weight, (1,))
    for change in (
        lambda: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another device"),
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
        lambda: monkeypatch.setattr(torch.ops.surgeon_kernels, "cusparselt_version", lambda: 800),
        lambda: kernels.geometry.append(1),
    ):
        change()
        kernels.timed.clear()
        assert tune_2_4(weight, (1,)) == {1: 1} and kernels.timed
    assert len([*cache.iterdir()]) == 5
    with_library = weight._replace(compressed=torch.zeros(1))
    kernels.timed.clear()
    tune_2_4(with_library, (1,))
    assert kernels.timed and len([*cache.iterdir()]) == 5


@pytest.mark.parametrize("text", ["{", "[]", '{"40 x 64 bfloat16, 4 tokens": "1"}', '{"a": true}', "\udcff"])
def test_a_file_that_cannot_be_read_is_named_once_and_replaced(monkeypatch, weight, cache, text):
    Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.1])
    tune_2_4(weight, (1,))
    (path,) = cache.iterdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    kept_choices._warn.cache_clear()
    with pytest.warns(RuntimeWarning) as said:
        assert tune_2_4(weight, (4,)) == {4: 1}
    (warning,) = said
    assert str(warning.message).startswith(f"choices of 2:4 kernels in {path} are ignored, and measured again: ")
    assert json.loads(path.read_text()) == {"40 x 64 bfloat16, 4 tokens": 1}


def test_a_kept_choice_that_does_not_exist_is_measured_again(monkeypatch, weight, cache):
    kernels = Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.1])
    tune_2_4(weight, (4,))
    (path,) = cache.iterdir()
    path.write_text('{"40 x 64 bfloat16, 4 tokens": 99}')
    kernels.timed.clear()
    assert tune_2_4(weight, (4,)) == {4: 1} and kernels.timed
    assert json.loads(path.read_text()) == {"40 x 64 bfloat16, 4 tokens": 1}


def test_a_folder_that_cannot_be_written_is_named_and_the_choice_holds(monkeypatch, weight, tmp_path):
    Kernels(monkeypatch, [product, rounded_otherwise], [1.0, 0.1])
    (tmp_path / "surgeon-kernels").write_text("no folder")
    kept_choices._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="are not kept in"):
        assert tune_2_4(weight, (4,)) == {4: 1}


def test_tuning_needs_tokens():
    """None have no time; what is chosen for them would be chosen for one."""
    prepared = prepare_2_4(pack_2_4(weight_2_4(8, 16)))
    assert tune_2_4(prepared) == {}
    for tokens in ((0,), (4, -1)):
        with pytest.raises(ValueError, match="tokens must be positive"):
            tune_2_4(prepared, tokens)
