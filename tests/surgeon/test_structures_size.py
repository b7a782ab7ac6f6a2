"""What a model takes, before and after it was made smaller."""

import torch
from transformers.pytorch_utils import Conv1D

from llm_surgeon.report import render
from llm_surgeon.structures.size import model_size
from tests.surgeon.reports import Page, surgeon_report
from tests.surgeon.tiny_models import build


def test_parameters_products_and_bytes_are_counted():
    model = build("gpt2", torch.bfloat16)
    linears = [module for module in model.modules() if isinstance(module, Conv1D)]
    found = model_size(model, torch.arange(1, 61)[None])
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["bytes"] == 2 * found["parameters"]
    assert found["macs"] == sum(linear.weight.numel() for linear in linears) + model.lm_head.weight.numel()
    assert found["seconds"] > 0


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
