"""Footprint of a model, before and after it was made smaller."""

from functools import partial

import torch
from transformers.pytorch_utils import Conv1D

from llm_surgeon import prune
from llm_surgeon.models import footprint as size
from llm_surgeon.models.footprint import model_size
from llm_surgeon.report import render
from tests.surgeon.reports import Page, surgeon_report
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def test_parameters_products_and_bytes_are_counted():
    model = build("gpt2", torch.bfloat16)
    linears = [module for module in model.modules() if isinstance(module, Conv1D)]
    found = model_size(model, torch.arange(1, 61)[None])
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["bytes"] == 2 * found["parameters"]
    assert found["macs"] == sum(linear.weight.numel() for linear in linears) + model.lm_head.weight.numel()
    assert found["seconds"] > 0


def test_models_take_turns_and_the_first_is_not_timed(monkeypatch):
    order, now = [], [0.0]
    models = {"first": build("llama"), "second": build("opt")}

    def run(name, seconds):
        order.append(name)
        now[0] += seconds + len(order)  # the machine becomes slower and slower

    for (name, model), seconds in zip(models.items(), (100.0, 200.0), strict=True):
        call = partial(run, name, seconds)
        model.register_forward_pre_hook(lambda module, args, call=call: call())
    monkeypatch.setattr(size.time, "perf_counter", lambda: now[0])
    first, second = size.latencies(list(models.values()), torch.arange(1, 9)[None])
    assert order == ["first", "second"] * 8
    # The first of the models ran as number 3, 5, ..., 15, the second as number 4, 6, ..., 16.
    assert first == {"seconds_low": 105.0, "seconds": 109.0, "seconds_high": 113.0}
    assert second == {"seconds_low": 206.0, "seconds": 210.0, "seconds_high": 214.0}


def test_the_dense_model_is_compared_with_where_memory_has_room(monkeypatch):
    model, ids = build("llama"), torch.arange(1, 9)[None]
    dense = size.copy_in_main_memory(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    assert set(size.compare_latencies(dense, model, ids)) == {"before", "after"}
    assert size.compare_latencies(None, model, ids) == {}
    wanted = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(size, "available_memory", lambda device: 2 * wanted - 1)
    assert size.copy_in_main_memory(model) is None


def test_sizes_are_compared_before_and_after():
    model, ids = build("llama"), torch.arange(1, 9)[None]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    alone, together = size.SizeComparison(model, ids), size.SizeComparison(model, ids)
    together.keep(model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    found = together.sizes(model)
    assert found["before"]["parameters"] == parameters > found["after"]["parameters"]
    assert found["before"]["macs"] > found["after"]["macs"] > 0
    assert all("seconds_low" in sizes for sizes in found.values())
    assert not any("seconds_low" in sizes for sizes in alone.sizes(model).values())  # no dense model was kept


def test_what_becomes_smaller_is_timed_beside_the_dense_model():
    report = prune(build("llama"), TOKENS, structure="groups", sparsity=0.3, shots=1)
    for state in ("before", "after"):
        sizes = report.sizes[state]
        assert 0 < sizes["seconds_low"] <= sizes["seconds"] <= sizes["seconds_high"]
    assert report.sizes["after"]["parameters"] < report.sizes["before"]["parameters"]


def test_reports_show_both_and_their_ratio():
    report = surgeon_report()
    assert not any("latency" in line for line in report.summary().splitlines())
    report.sizes = {
        "before": {"parameters": 6_738_415_616, "macs": 6_607_077_376, "bytes": 13_476_831_232, "seconds": 0.0421},
        "after": {"parameters": 4_794_355_712, "macs": 4_663_017_472, "bytes": 9_588_711_424, "seconds": 0.0302},
    }
    expected = [
        ["before", "after", "ratio"],
        ["parameters", "6.7", "B", "4.8", "B", "0.71"],
        ["MACs", "6.6", "B", "4.7", "B", "0.71"],
        ["memory", "13.5", "GB", "9.59", "GB", "0.71"],
        ["latency", "42.1", "ms", "30.2", "ms", "0.72"],
    ]
    lines = [line.split() for line in report.summary().splitlines()]
    assert lines[lines.index(expected[0]) :][:5] == expected
    text = " ".join(Page(render.render_html(report)).text.split())
    assert all(" ".join(line) in text for line in expected)
