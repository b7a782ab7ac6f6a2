"""The record itself: what it counts, what survives JSON, what its summary says."""

import json
import math
from importlib import metadata

import pytest
import torch

from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.report import text
from llm_surgeon.report.schema import DataRecord, LayerReport, PruneReport, ShotReport, SolverTrace, collect_versions
from tests.surgeon.reports import DOWN, QUERY, layer, magnitude_report, surgeon_report


def test_sparsity_of_layers_and_of_the_model():
    report = surgeon_report()
    assert [each.sparsity for each in report.layers] == [0.2, 0.4, 0.6, pytest.approx(2 / 3)]
    assert (report.weights, report.removed, report.sparsity) == (800, 400, 0.5)
    assert report.sparsity_by("depth") == {0: 140 / 400, 1: 260 / 400}
    assert report.sparsity_by("kind") == {QUERY: 80 / 200, DOWN: 320 / 600}


def test_nothing_to_prune_has_sparsity_zero():
    assert layer(0, QUERY, 0, 0, 10).sparsity == 0.0
    report = surgeon_report()
    report.layers = []
    assert report.sparsity == 0.0 and report.sparsity_by("kind") == {}


@pytest.mark.parametrize("objective, iterations", [([], 0), ([1.0], 0), ([2.0, 1.5, 1.2], 2)])
def test_iterations_do_not_count_the_start(objective, iterations):
    assert SolverTrace("a", objective).iterations == iterations


@pytest.mark.parametrize("make", [surgeon_report, magnitude_report])
def test_json_round_trip(make):
    report = make()
    again = PruneReport.from_json(report.to_json())
    assert again == report
    assert all(type(each) is LayerReport for each in again.layers)
    assert all(type(trace) is SolverTrace for shot in again.shots for trace in shot.solver)


def test_the_data_and_the_revision_survive_json_and_old_reports_have_neither():
    report = surgeon_report()
    record = DataRecord("chat.jsonl", "calibration", "ab" * 32, 243, 64, 2, 128, "messages", "chat template")
    report.data, report.revision = {"calibration": record}, "c0ffee"
    again = PruneReport.from_json(report.to_json())
    assert again == report and again.data["calibration"].distinct_windows == 2
    data = json.loads(report.to_json())
    del data["data"], data["revision"]
    old = PruneReport.from_json(json.dumps(data))
    assert old.data == {} and old.revision is None


def test_json_is_indented_and_versioned():
    text = surgeon_report().to_json()
    assert text.startswith('{\n  "config"')
    assert json.loads(text)["schema_version"] == 1


def test_whole_numbers_are_read_as_floats_where_floats_belong():
    data = json.loads(surgeon_report().to_json())
    data["seconds"], data["shots"][0]["loss_before"] = 192, 3
    report = PruneReport.from_json(json.dumps(data))
    assert type(report.seconds) is float and type(report.shots[0].loss_before) is float


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_never_holds_nan_or_infinity(value):
    report = surgeon_report()
    report.shots[1].predicted_increase = value
    with pytest.raises(NumericalError, match=r"shots\[1\]\.predicted_increase is (nan|inf|-inf)"):
        report.to_json()
    text = surgeon_report().to_json().replace("27.654", "NaN")
    with pytest.raises(InputError, match="NaN"):
        PruneReport.from_json(text)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_schema_versions_are_refused(version):
    data = json.loads(surgeon_report().to_json()) | {"schema_version": version}
    with pytest.raises(InputError, match=rf"schema_version {version!r}, but this version of llm_surgeon reads 1"):
        PruneReport.from_json(json.dumps(data))


def corrupt(change) -> str:
    data = json.loads(surgeon_report().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, not list"),
        (corrupt(lambda d: d.pop("layers")), "report lacks the field 'layers'"),
        (corrupt(lambda d: d.update(color=1)), "report has an unknown field 'color'"),
        (corrupt(lambda d: d.update(layers={})), "report.layers must be of type list, not dict"),
        (corrupt(lambda d: d["layers"][1].update(removed=1.5)), r"report.layers\[1\].removed must be of type int"),
        (corrupt(lambda d: d["layers"][1].update(rows=True)), r"report.layers\[1\].rows must be of type int, not bool"),
        (corrupt(lambda d: d["shots"].append(3)), r"report.shots\[2\] must be of type dict, not int"),
        (corrupt(lambda d: d["perplexity"].update(dense="x")), "report.perplexity.dense must be of type float"),
    ],
)
def test_broken_reports_are_refused_by_name(text, message):
    with pytest.raises(InputError, match=message):
        PruneReport.from_json(text)


def test_summary():
    assert surgeon_report().summary().splitlines() == [
        "Pruned facebook/opt-125m with surgeon (structure unstructured, update joint) on NVIDIA H100",
        "Removed 400 of 800 weights (50.0%) in 4 layers, 2 shots, 3 min 12 s, peak memory 1.61 GB",
        "shot  sparsity  predicted   measured   (loss increase, nats per token)",
        "   1     25.0%    +0.0123    +0.0150",
        "   2     50.0%    +0.0456    +0.0500",
        "Perplexity: 27.65 dense, 34.00 pruned",
    ]


def test_summary_leaves_out_what_is_not_known():
    report = magnitude_report()
    report.shots = [ShotReport(1, 0.5, 0.5)]
    assert report.summary().splitlines()[1:] == [
        "Removed 400 of 800 weights (50.0%) in 4 layers, 1 shot, 3 min 12 s",
        "shot  sparsity  predicted   measured   (loss increase, nats per token)",
        "   1     50.0%          –          –",
    ]


def test_versions(monkeypatch):
    def version(name: str) -> str:
        if name == "surgeon_kernels":
            raise metadata.PackageNotFoundError(name)
        return f"{name}-version"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    versions = collect_versions()
    assert versions.pop("python").startswith("3.")
    assert versions == {
        "torch": "torch-version",
        "transformers": "transformers-version",
        "surgeon_kernels": "unknown",
        "cuda": "13.0",
    }
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "cuda" not in collect_versions()


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.7, "1 h 00 min"), (7384, "2 h 03 min")],
)
def test_duration(seconds, words):
    assert text.duration(seconds) == words


@pytest.mark.parametrize(
    "count, words", [(0, "0"), (999, "999"), (84_934_656, "84.9 M"), (999_960, "1.0 M"), (6_738_415_616, "6.7 B")]
)
def test_compact(count, words):
    assert text.compact(count) == words


def test_signs():
    assert (text.signed(-0.25, 1), text.signed(0.00004), text.signed(None)) == ("-0.2", "+0.0000", "–")
