"""Predicted loss against sparsity, and sparsities that are chosen by it or by a size."""

import dataclasses
import json

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune, prune_checkpoint
from llm_surgeon.cli.app import main
from llm_surgeon.distributed import PlannedRanks
from llm_surgeon.jobs.prune import PruneJob, planned_job
from llm_surgeon.jobs.sensitivity import sensitivity_of_checkpoint
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.shots.sensitivity import measure_sensitivity, sensitivity_options, sparsity_for
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import VOCABULARY, build

SMALL = {"samples": 4, "seqlen": 16}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint and a text."""
    folder = tmp_path_factory.mktemp("sensitivity")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (600,), generator=generator)
    (folder / "text.txt").write_text(" ".join(f"w{int(token)}" for token in tokens))
    return save_folder(folder / "model", build("llama")), str(folder / "text.txt")


@pytest.fixture(scope="module")
def job(places):
    source, text = places
    return PruneJob(source, sensitivity_options(**SMALL), calibration=text, device="cpu")


def test_increases_are_those_of_each_layer_alone(job):
    before = [linear.weight.clone() for linear in job.decoder.linears]
    with job.measuring() as run:
        found = measure_sensitivity(run, [0.25, 0.5])
        linear = job.decoder.linears[3]
        alone = dataclasses.replace(run, decoder=Decoder(job.decoder.blocks, [linear]))
        assert measure_sensitivity(alone, [0.25, 0.5]).layers == [found.layers[3]]
    assert all(torch.equal(a, b.weight) for a, b in zip(before, job.decoder.linears, strict=True))
    assert [(x.name, x.depth, x.weights) for x in found.layers] == [
        (x.name, x.depth, x.rows * x.columns) for x in job.decoder.linears
    ]
    for layer in found.layers:
        assert 0.0 < layer.increases[0] < layer.increases[1]
    totals = [sum(layer.increases[column] for layer in found.layers) for column in (0, 1)]
    for sums in (found.by("kind"), found.by("depth")):
        assert [sum(row[column] for row in sums.values()) for column in (0, 1)] == pytest.approx(totals)
    assert list(found.by("depth")) == [0, 1]


def test_a_sparsity_is_the_largest_that_is_predicted_to_cost_no_more(job):
    def predicted(sparsity):
        report = prune(build("llama"), job.windows.calibration, config=sensitivity_options(sparsity=sparsity, **SMALL))
        return report.predicted_increase

    target = 1.02 * predicted(0.4)
    with job.measuring() as run:
        sparsity, increase = sparsity_for(run, target)
        with pytest.raises(InputError, match=r"^target_loss 1e-12: 1% of the weights is predicted to cost "):
            sparsity_for(run, 1e-12)
    assert sparsity == 0.4 and increase == pytest.approx(predicted(0.4), rel=1e-4)
    assert predicted(0.41) > target


def test_a_sparsity_leaves_what_is_kept_of_every_layer(places, job):
    with job.measuring() as run:
        assert sparsity_for(run, 1e9)[0] == 0.95
        kept = dataclasses.replace(run.config, min_kept=0.3)
        assert sparsity_for(dataclasses.replace(run, config=kept), 1e9)[0] == 0.7
        (low, high), *_ = (x.increases for x in measure_sensitivity(run, [0.9, 0.98]).layers)
        assert 0.0 < low < high
    with pytest.raises(InputError, match=r"^sparsity 0\.99 cannot be met while min_kept keeps 0\.02 of every layer"):
        sensitivity_of_checkpoint(places[0], [0.5, 0.99], calibration=places[1], **SMALL)


def test_a_run_takes_the_sparsity_that_its_target_gives(places, tmp_path):
    source, text = places
    options = {"calibration": text, "device": "cpu", "gradient_steps": 0, "shots": 1, **SMALL}
    report = prune_checkpoint(source, tmp_path / "lossy", structure="unstructured", target_loss=1e-4, **options)
    job = PruneJob(source, PruneConfig("unstructured", **SMALL), calibration=text, device="cpu")
    with job.measuring() as run:
        assert report.config["sparsity"] == sparsity_for(run, 1e-4)[0] == pytest.approx(report.sparsity, abs=0.01)
    whole = report.disk["before"]
    sized = prune_checkpoint(source, tmp_path / "small", structure="groups", target_size=whole - 8192, **options)
    assert 0.7 * whole < sized.disk["after"] <= whole - 8192


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({"structure": "2:4"}, {"target_loss": 0.1}, "target_loss chooses the sparsity: leave that out"),
        ({"structure": "groups", "sparsity": 0.2}, {"target_size": "1MB"}, "target_size chooses the sparsity"),
        ({"structure": "unstructured"}, {"target_size": "1MB"}, "target_size needs a structure that makes"),
        ({"structure": "groups"}, {"target_size": "large"}, "'large' is no amount of memory"),
        ({"structure": "groups"}, {"target_size": "9GB"}, "target_size 9 GB must lie between"),
        ({"structure": "groups"}, {"target_loss": 0.1}, "target_loss needs structure 'unstructured', a single process"),
        ({"structure": "unstructured"}, {"target_loss": -0.1}, "target_loss must be a number greater than 0"),
        ({"structure": "groups"}, {"target_loss": 0.1, "target_size": "1MB"}, "give either target_size or target_loss"),
        ({"structure": "unstructured"}, {"target_loss": 0.1, "ranks": PlannedRanks(2)}, "a single process"),
    ],
)
def test_targets_that_mean_nothing_are_refused(places, config, options, message):
    source, text = places
    with pytest.raises(InputError, match=message):
        PruneJob(source, PruneConfig(**config, **SMALL), calibration=text, device="cpu", **options)


def test_a_dry_run_finds_no_sparsity_by_loss(places, tmp_path):
    with pytest.raises(InputError, match="target_loss takes a pass over the data, which a dry run makes none of"):
        planned_job(places[0], tmp_path / "out", PruneConfig("unstructured"), calibration=places[1], target_loss=0.1)


def test_the_command_prints_sums_and_writes_all(places, tmp_path, capsys):
    source, text = places
    options = ["--calibration", text, "--samples", "4", "--seqlen", "16", "--sparsity", "0.5", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(["sensitivity", str(source), *options, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    printed = capsys.readouterr().out
    assert found["sparsities"] == [0.5] and "block 1" in printed and "50 %" in printed
    own = sensitivity_of_checkpoint(source, [0.5], calibration=text, device="cpu", **SMALL)
    assert [layer["increases"] for layer in found["layers"]] == [layer.increases for layer in own.layers]
    with pytest.raises(InputError, match="sparsity must be a number"):
        sensitivity_of_checkpoint(source, [1.5], calibration=text, **SMALL)


def test_figures_that_could_not_be_written_are_refused_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["sensitivity", str(tmp_path / "model"), "--json", str(tmp_path / "none" / "found.json")])
    assert end.value.code == 2 and "there is no folder" in capsys.readouterr().err
