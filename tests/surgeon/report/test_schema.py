"""The record itself: what it counts, what survives JSON, what its summary says."""

import dataclasses
import json
import math
from importlib import metadata

import pytest
import torch

from llm_surgeon.data.record import DataRecord
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.report import format as text
from llm_surgeon.report.render import render_html, render_model_card
from llm_surgeon.report.schema import (
    HeldOutLoss,
    LayerReport,
    PruneReport,
    Sample,
    ShotReport,
    SolverTrace,
    collect_versions,
)
from llm_surgeon.report.warnings import warnings_of
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


def full_report():
    report = surgeon_report()
    report.held_out, report.warnings = HeldOutLoss(16, 2048, 3.3, 3.7), ["a", "b"]
    report.revision, report.history = "0" * 40, ["It was packed."]
    report.command = ["surgeon", "prune", "a b", "out"]
    report.samples, report.disk = [Sample("a", "b", "c\n")], {"before": 2, "after": 1}
    report.shots[0].layer_increases = {"a": 0.5}
    return report


@pytest.mark.parametrize("make", [surgeon_report, magnitude_report, full_report])
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


def test_reports_of_before_there_were_held_out_losses_load():
    data = json.loads(full_report().to_json())
    for name in ("held_out", "evaluation", "samples", "disk", "warnings", "revision", "command", "history"):
        del data[name]
    del data["shots"][0]["layer_increases"]
    data["perplexity"] = {"dense": 27.654, "pruned": 34.0}
    report = PruneReport.from_json(json.dumps(data))
    assert dataclasses.replace(report, evaluation=surgeon_report().evaluation) == surgeon_report()
    assert report.held_out is None and report.warnings == []


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
    text = surgeon_report().to_json().replace("192.3", "NaN")
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
        (corrupt(lambda d: d["evaluation"].update(loss_before="x")), "evaluation.loss_before must be of type float"),
        (corrupt(lambda d: d.update(held_out=3)), "report.held_out must be of type dict, not int"),
        (corrupt(lambda d: d.update(held_out={"windows": 1})), "report.held_out lacks the field 'tokens'"),
        (corrupt(lambda d: d["layers"][0].update(depth=-1)), r"report.layers\[0\].depth must lie between 0 and 2\^63"),
        (corrupt(lambda d: d.update(seconds=10**30)), "report.seconds must be of type float, not int"),
        (corrupt(lambda d: d.update(seconds=1e31)), r"report.seconds must lie within ±1e\+30"),
        (corrupt(lambda d: d["config"].update(a=[1e31])), r"report.config.a.0 must lie within"),
        (corrupt(lambda d: d.update(sizes={"before": {}})), r"report.sizes.before.parameters must be a number greater"),
        ('{"a": 1e999, "schema_version": 1}', "report has an unknown field 'a'"),
        (corrupt(lambda d: None).replace("192.3", "1e999"), "report.seconds must lie within"),
        (corrupt(lambda d: None).replace("192.3", "9" * 5000), "report is not valid JSON"),
        (corrupt(lambda d: d.update(device="\ud800")), "report is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (corrupt(lambda d: d["config"].update(a=json.loads("[" * 50 + "]" * 50))), "nested too deeply"),
    ],
)
def test_broken_reports_are_refused_by_name(text, message):
    with pytest.raises(InputError, match=message):
        PruneReport.from_json(text)


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "surgeon_report.json"
    path.write_text(full_report().to_json(), encoding="utf-8")
    assert PruneReport.read(path) == full_report()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"surgeon_report\.json' is damaged: the report is not valid JSON"):
        PruneReport.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"surgeon_report\.json' cannot be read: 'utf-8' codec"):
        PruneReport.read(path)


def test_summary():
    assert surgeon_report().summary().splitlines() == [
        "Pruned facebook/opt-125m with surgeon (structure unstructured, update joint) on NVIDIA H100",
        "Removed 400 of 800 weights (50.0%) in 4 layers, 2 shots, 3 min 12 s, peak memory 1.61 GB",
        "shot  sparsity  predicted   measured   (increase of the training loss, nats per token)",
        "   1     25.0%    +0.0123    +0.0150",
        "   2     50.0%    +0.0456    +0.0500",
    ]


def test_summary_has_warnings_and_samples_and_perplexities_stand_apart():
    report = surgeon_report()
    report.held_out = HeldOutLoss(16, 2048, 3.3026, 3.7206)
    report.data["eval_data"] = DataRecord("/data/mine.txt", "evaluation", "ab" * 32, 243, 8, 8, 128)
    report.warnings = ["Too little of everything."]
    report.samples = [Sample("The town\nof", "Paris is", "is is")]
    lines = report.summary().splitlines()
    assert lines[-3:] == ["> The town of …", "  before: Paris is", "  after:  is is"]
    assert report.quality() == [
        "Perplexity on held-out text: 27.18 → 41.29 (16 windows, 2,048 tokens)",
        "Perplexity on mine.txt: 27.65 → 34.00 (8 windows, 1,024 tokens)",
    ]
    assert lines[2:4] == [
        "Warning: Too little of everything.",
        "shot  sparsity  predicted   measured   (increase of the training loss, nats per token)",
    ]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"update": "sequential", "token_weights": True}, "were weighed by their gradients"),
        ({"update": "sequential", "token_weights": False}, "counted alike"),
        ({"update": "joint", "reconstruct": True, "token_weights": False}, "counted alike"),
        ({"update": "joint", "token_weights": False}, None),
        ({"update": "sequential", "token_weights": None}, None),  # a report that does not say
    ],
)
def test_how_tokens_counted_is_said_where_it_matters(options, words):
    report = surgeon_report()
    report.config |= options
    sentence = words and f"Tokens of the calibration windows {words}."
    assert report.weighing == sentence
    told = (report.summary(), render_html(report), render_model_card(report, "facebook/opt-125m"))
    assert all(("Tokens of the" in each) == bool(words) and (sentence or "") in each for each in told)


def test_perplexities_are_exponentials_of_the_losses():
    held_out = HeldOutLoss(2, 64, 1.0, 1.5)
    assert (held_out.perplexity_before, held_out.perplexity_after) == (math.exp(1.0), math.exp(1.5))
    assert held_out.increase == 0.5
    assert HeldOutLoss(2, 64, 1.0, 800.0).describe() == "2.72 → inf (2 windows, 64 tokens)"


def test_totals_are_over_all_shots_or_none():
    report = surgeon_report()
    report.shots[0].layer_increases, report.shots[1].layer_increases = {"a": 0.25, "b": 1.0}, {"a": 0.5}
    assert report.layer_increases == {"a": 0.75, "b": 1.0}
    assert report.measured_increase == pytest.approx(0.065) and report.predicted_increase == pytest.approx(0.0579)
    report.shots[1].measured_increase = None
    assert report.measured_increase is None
    report.shots = []
    assert report.predicted_increase is None


def with_costs(predicted: float, measured: float, held_out: float | None = None, **config):
    report = surgeon_report()
    report.config |= config
    report.shots = [ShotReport(1, 0.5, 0.5, predicted_increase=predicted, measured_increase=measured)]
    report.evaluation, report.held_out = None, None
    if held_out is not None:
        report.held_out = HeldOutLoss(4, 400, 3.0, 3.0 + held_out)
    return report


ENOUGH = 240  # tokens: eight for each of the 30 inputs of the widest layer


@pytest.mark.parametrize(
    "report, tokens, words",
    [
        (with_costs(0.0444, 0.05), ENOUGH, []),
        (with_costs(0.0444, 0.05), ENOUGH - 1, ["239 calibration tokens are few for layers of 30 inputs: take 240"]),
        (with_costs(0.0444, 0.05, method="magnitude"), 1, []),  # knows no second moments
        (with_costs(0.0444, 0.05, method="wanda"), 1, []),  # compares the inputs of a row alone
        *((with_costs(0.0444, 0.05, method=name), 1, ["tokens are few"]) for name in ("sparsegpt", "k-obd", "l-obd")),
        (with_costs(0.0444, 0.7450), ENOUGH, ["rose by 0.745 nats per token where 0.044 were predicted"]),
        (with_costs(0.001, 0.04), ENOUGH, []),  # forty times, and next to nothing
        (with_costs(0.5, 1.4), ENOUGH, []),  # much, and less than three times
        (with_costs(0.05, -0.66, 0.418), ENOUGH, ["changed by +0.418 nats per token on held-out text"]),
        (with_costs(0.05, 0.014, 1.165, reconstruct=True), ENOUGH, ["training loss by +0.014"]),
        (with_costs(0.5, 0.5, 0.6), ENOUGH, []),
    ],
)
def test_warnings_say_what_makes_a_result_doubtful(report, tokens, words):
    found = warnings_of(report, tokens)
    assert len(found) == len(words)
    for sentence, expected in zip(found, words, strict=True):
        assert expected in sentence


def test_summary_leaves_out_what_is_not_known():
    report = magnitude_report()
    report.shots = [ShotReport(1, 0.5, 0.5)]
    assert report.summary().splitlines()[1:] == [
        "Removed 400 of 800 weights (50.0%) in 4 layers, 1 shot, 3 min 12 s",
        "shot  sparsity  predicted   measured   (increase of the training loss, nats per token)",
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


def test_a_command_keeps_the_folders_of_this_machine_to_itself():
    words = ["surgeon", "prune", "/home/me/my model", "out", "--calibration=/data/a.txt", "--seed", "3"]
    assert text.command_line(words) == "surgeon prune 'my model' out --calibration=a.txt --seed 3"


@pytest.mark.parametrize(
    "value, words", [(27.184, "27.18"), (-0.5, "-0.50"), (1234567.0, "1.2e+06"), (math.inf, "inf")]
)
def test_two_decimals(value, words):
    assert text.two_decimals(value) == words


def test_signs():
    assert (text.signed(-0.25, 1), text.signed(0.00004), text.signed(None)) == ("-0.2", "+0.0000", "–")
