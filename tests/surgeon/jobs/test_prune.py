"""Pruning of a checkpoint: measured on text that it does not see, and with a recovery after it, in one job."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_surgeon import perplexity, prune_checkpoint
from llm_surgeon.cli.app import main
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import PlannedRanks
from llm_surgeon.errors import InputError
from llm_surgeon.jobs import prune as job
from llm_surgeon.jobs import recovery_after, windows
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import save_folder, tree
from tests.surgeon.half_zero import text_windows
from tests.surgeon.tiny_models import build

OPTIONS = {"method": "magnitude", "samples": 4, "seqlen": 16, "device": "cpu"}


@pytest.fixture
def places(tmp_path):
    """A dense checkpoint, an output and a text."""
    words = " ".join(f"w{int(token)}" for token in text_windows(100).flatten())
    (tmp_path / "text.txt").write_text(words)
    return save_folder(tmp_path / "dense", build("llama")), tmp_path / "out", str(tmp_path / "text.txt")


def test_a_run_is_measured_and_continued_on_another_text(places, tmp_path):
    source, out, text = places
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{1 + (7 * place + place * place) % 60}" for place in range(500)))
    options = {"calibration": text, "samples": 4, "seqlen": 16, "device": "cpu", "structure": "unstructured"}
    report = prune_checkpoint(source, out, eval_data=str(other), samples_shown=2, **options)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([0, *tokenizer(other.read_text(), add_special_tokens=False)["input_ids"]])
    windows = ids[: 31 * 16].view(31, 16)[::2]  # sixteen from the first to the last
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, out)]
    found = report.evaluation
    assert (found.windows, found.tokens) == (16, 256) and report.held_out.windows == 16
    assert [found.perplexity_before, found.perplexity_after] == pytest.approx(
        [perplexity(model, windows) for model in models], rel=1e-5
    )
    assert report.data["eval_data"].source == str(other) and report.data["eval_data"].split == "evaluation"
    for model, name in zip(models, ("before", "after"), strict=True):
        prompts = {"input_ids": windows[:2, :8], "attention_mask": torch.ones(2, 8)}
        more = model.generate(**prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 8:]
        assert [getattr(sample, name) for sample in report.samples] == tokenizer.batch_decode(more)
    assert report.samples[0].prompt == "w1 w9 w19 w31 w45 w1 w19"  # but for the beginning of text
    assert report.disk == dict.fromkeys(("before", "after"), 4 * sum(p.numel() for p in models[0].parameters()))
    assert report.layer_increases.keys() == {layer.name for layer in report.layers}
    for shot in report.shots:
        assert shot.predicted_increase == pytest.approx(sum(shot.layer_increases.values()), rel=1e-6)
    plain = prune_checkpoint(source, out.with_name("plain"), samples_shown=0, **options)
    assert plain.evaluation is None and plain.samples == []
    assert tree(out)["model.safetensors"] == tree(out.with_name("plain"))["model.safetensors"]


def test_what_is_pruned_is_recovered_and_both_are_told_of(places, monkeypatch):
    source, out, text = places
    seen = {}
    recover = recovery_after.recover

    def watching(model, windows, held_out, **options):
        seen.update(zeros=[linear.module.weight == 0 for linear in find_decoder(model).linears])
        return recover(model, windows, held_out, **options)

    monkeypatch.setattr(recovery_after, "recover", watching)
    report = prune_checkpoint(source, out, calibration=text, eval_data=text, recover_minutes=0.1, **OPTIONS)
    done = json.loads((out / "surgeon_recovery.json").read_text())
    assert done["loss_after"] < done["loss_before"] and done["steps"] > 0
    assert (done["config"]["method"], done["config"]["minutes"]) == ("full", 0.1)
    assert done["data"]["training"]["source"] == text and done["data"]["training"]["seqlen"] == 16
    assert PruneReport.read(out / "surgeon_report.json") == report and len(report.history) == 1
    assert f"for {done['steps']} steps on {done['tokens']:,} tokens of" in report.history[0]
    texts = {"calibration": text, "eval_data": text}
    windows = job.PruneJob(source, job.PruneConfig(**_config()), **texts, device="cpu").windows.evaluation.input_ids
    recovered = perplexity(AutoModelForCausalLM.from_pretrained(out), windows)
    assert f" Perplexity on `text.txt` after it: {recovered:.2f}." in report.history[0]
    card = " ".join((out / "README.md").read_text().split())
    assert "## Recovered After pruning all weights were trained" in card and "distilling from `dense`" in card
    for linear, zero in zip(
        find_decoder(AutoModelForCausalLM.from_pretrained(out)).linears, seen["zeros"], strict=True
    ):
        assert zero.float().mean() == 0.5 and torch.equal(linear.module.weight == 0, zero)
    assert sorted(path.name for path in out.parent.iterdir()) == ["dense", "out", "text.txt"]


def test_no_token_that_is_held_out_is_trained_on(places):
    source, _, text = places
    windows = job.PruneJob(source, job.PruneConfig(**_config()), calibration=text, device="cpu").windows
    config = RecoverConfig(method="full", minutes=1.0, seqlen=16)
    places = torch.arange(len(windows.ids))  # a token tells where it stands
    trained = recovery_after.windows_for(config, places, windows.apart).input_ids
    held_out = places[windows.apart]
    assert not set(trained.flatten().tolist()) & set(held_out.tolist())
    assert torch.equal(windows.ids[held_out].view(-1, 16), windows.held_out.input_ids)


@pytest.mark.parametrize("step", ["load_teacher", "recover", "recovery_text"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, InputError])
def test_a_recovery_that_does_not_end_leaves_the_pruned_model(places, monkeypatch, caplog, error, step):
    source, out, text = places

    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(recovery_after, step, fails)
    with caplog.at_level(logging.WARNING), pytest.raises(error):
        prune_checkpoint(source, out, calibration=text, recover_minutes=0.02, **OPTIONS)
    assert f"the recovery did not end: {out} holds the pruned model" in caplog.text
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.pruning", "dense", "out", "text.txt"]
    assert not PruneReport.read(out / "surgeon_report.json").history
    plain = out.with_name("plain")
    prune_checkpoint(source, plain, calibration=text, **OPTIONS)
    assert tree(out)["model.safetensors"] == tree(plain)["model.safetensors"]


def test_what_several_processes_cannot_share_is_refused_when_it_is_planned(places, monkeypatch):
    source, _, text = places
    monkeypatch.setattr(job, "load_model", lambda *_, **__: pytest.fail("loaded"))
    cases = {
        "kron_rank 2 takes a single process, not 5": {"kron_rank": 2, "samples": 8},
        "skip_bad_batches takes a single process, not 5": {"skip_bad_batches": True, "samples": 8},
        "5 processes need as many calibration windows, not 4": {"samples": 4},
    }
    for match, options in cases.items():
        with pytest.raises(InputError, match=f"^{match}$"):
            job.PruneJob(source, job.PruneConfig(**options), calibration=text, ranks=PlannedRanks(5))


def test_what_cannot_be_recovered_is_refused_before_the_work(places, tmp_path):
    source, out, text = places
    for value in (0, -1.0, "five", True, float("nan")):
        with pytest.raises(InputError, match=r"^recover_minutes must be a number greater than 0, not "):
            prune_checkpoint(source, out, calibration=text, recover_minutes=value, **OPTIONS)
    (tmp_path / "short.txt").write_text("w1 w2 w3 " * 30)
    with pytest.raises(InputError, match=r"recover_minutes needs 128 tokens of text, of which some are held out"):
        prune_checkpoint(source, out, calibration=str(tmp_path / "short.txt"), recover_minutes=1, **OPTIONS)
    assert not out.exists()


def test_what_a_recovery_would_refuse_is_refused_before_the_work(places, monkeypatch):
    """The text that is left beside what is held out, its tokens, the model, and the memory and disk of both."""
    source, out, text = places
    monkeypatch.setattr(job, "prune", lambda *_, **__: pytest.fail("pruned"))

    def refused(match):
        with pytest.raises(InputError, match=match):
            prune_checkpoint(source, out, calibration=text, recover_minutes=1, **OPTIONS)
        assert not out.exists()

    with monkeypatch.context() as patch:
        split = windows.split

        def greedy(ids, *shape):
            calibration, held_out, apart = split(ids, *shape)
            return calibration, held_out, torch.ones_like(apart)

        patch.setattr(windows, "split", greedy)
        refused("no 16 tokens in a row are left beside those held out")
    with monkeypatch.context() as patch:
        given = recovery_after.windows_for
        patch.setattr(recovery_after, "windows_for", lambda *a: Calibration(given(*a).input_ids + 10**6))
        refused("training sequences hold token id")
    with monkeypatch.context() as patch:
        patch.setattr(job, "load_model", _frozen(job.load_model))
        refused("the model is frozen")
    plain = job.PruneJob(source, job.PruneConfig(**_config()), calibration=text, device="cpu").plan
    with monkeypatch.context() as patch:
        between = plain.memory_bytes - job.process_memory() + 2**26
        patch.setattr("llm_surgeon.resources.available_memory", lambda _: max(between, 2**26))
        patch.setattr("llm_surgeon.planning.recovery.RecoveryMemory.bytes", lambda *_: 2**40)
        refused("of memory are needed on cpu")
    with monkeypatch.context() as patch:
        free = plain.disk_bytes + plain.disk_bytes // 2
        patch.setattr("llm_surgeon.resources.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        refused("of disk are needed")


def _frozen(load):
    def loaded(*arguments, **options):
        model, *others = load(*arguments, **options)
        return model.requires_grad_(False), *others

    return loaded


def test_the_command_says_what_the_recovery_did(places, capsys):
    source, out, text = places
    given = ["--calibration", text, "--method", "magnitude", "--samples", "4", "--seqlen", "16", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(source), str(out), *given, "--recover-minutes", "0.1"])
    assert not ended.value.code
    assert "After pruning all weights were trained for" in capsys.readouterr().out.replace("\n", " ")


def test_the_command_refuses_no_minutes_and_its_dry_run_names_others(places, capsys):
    source, out, text = places
    given = ["--calibration", text, "--samples", "4", "--seqlen", "16", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(source), str(out), *given, "--recover-minutes", "0"])
    assert (
        ended.value.code == 2 and "recover_minutes must be a number greater than 0, not 0.0" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(source), str(out), *given, "--recover-minutes", "2.5", "--dry-run"])
    assert not ended.value.code and "on cpu (2.5 min of it recovery)" in capsys.readouterr().out
    assert not out.exists()


def _config():
    return {name: value for name, value in OPTIONS.items() if name != "device"}
