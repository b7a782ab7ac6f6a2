"""Products that wait for each other, on the CPU, where every product may."""

import pytest
import torch

from llm_surgeon.curvature import estimate, waiting
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.waiting import WaitingProducts, is_small
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import find_decoder
from surgeon_kernels import GramProduct, SymmetricAccumulator, gram_accumulate_
from tests.surgeon.curvature.test_estimate import tokens
from tests.surgeon.tiny_models import build


def product(value: float) -> GramProduct:
    return GramProduct(SymmetricAccumulator.zeros(3), torch.full((2, 3), value))


def test_a_product_waits_from_its_second_time_on() -> None:
    products = WaitingProducts(lambda _: True)
    first, second = product(1.0), product(2.0)
    assert not products.takes("x", first)
    products.add_up()
    assert products.takes("x", second) and not products.takes("y", first)
    assert not second.out.full().any()
    products.add_up()
    assert not first.out.full().any() and bool((second.out.full() == 8.0).all())  # first was for the caller to add
    products.add_up()
    assert bool((second.out.full() == 8.0).all())


def test_what_is_overwritten_does_not_wait() -> None:
    products, changed = WaitingProducts(lambda _: True), product(1.0)
    assert not products.takes("x", changed)
    changed.x.add_(1.0)
    products.add_up()
    for _ in range(2):
        assert not products.takes("x", product(1.0))
        products.add_up()


def test_as_many_wait_as_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    monkeypatch.setattr(waiting, "gram_accumulate_each_", lambda products: added.append(len(products)))
    products = WaitingProducts(lambda _: True)
    for _ in range(2):
        for name in range(20):
            products.takes(str(name), product(1.0))
        products.add_up()
    assert added == [0, 0, 16, 4]
    monkeypatch.setattr(waiting, "_MOST_BYTES", 25)
    for name in range(2):
        products.takes(str(name), product(1.0))
    assert added[4:] == [2]


def test_products_on_the_cpu_do_not_wait() -> None:
    assert not is_small(product(1.0))


def test_factors_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("opt")
    decoder, data = find_decoder(model), Calibration(tokens(6, 12))
    expected = estimate_curvature(model, decoder, data, batch_size=2)
    at_once: list[int] = []
    monkeypatch.setattr(estimate, "WaitingProducts", lambda: WaitingProducts(lambda _: True))
    monkeypatch.setattr(
        estimate, "gram_accumulate_", lambda *a, **options: at_once.append(1) or gram_accumulate_(*a, **options)
    )
    found = estimate_curvature(model, decoder, data, batch_size=2)
    factors = sum(1 + (linear.input_group == linear.name) for linear in decoder.linears)
    assert len(at_once) == factors  # of the first batch
    for linear in decoder.linears:
        for ours, theirs in zip(found.factors(linear), expected.factors(linear), strict=True):
            assert torch.equal(ours, theirs)
