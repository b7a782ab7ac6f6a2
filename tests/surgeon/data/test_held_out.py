"""Text held out of the calibration text, and the losses on it."""

import json

import pytest
import torch

from llm_surgeon import Calibration, InputError, prune, prune_checkpoint
from llm_surgeon.data.calibration import calibration_windows
from llm_surgeon.data.held_out import further, split
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.report.schema import PruneReport
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
APART = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length, samples, seqlen", [(10_000, 32, 64), (3000, 16, 50), (700, 8, 30)])
def test_a_long_text_is_held_out_between_the_calibration_windows_whose_draw_stays(length, samples, seqlen):
    ids = torch.arange(length)  # a token tells where it stands
    windows, held_out, apart = split(ids, samples, seqlen, seed=3)
    assert torch.equal(windows.input_ids, calibration_windows(ids, samples, seqlen, seed=3).input_ids)
    found = held_out.input_ids
    assert 4 <= len(found) <= 16 and found.shape[1] == seqlen
    assert torch.equal(found, found[:, :1] + torch.arange(seqlen))
    assert found.flatten().tolist() == apart.nonzero().flatten().tolist()
    assert not set(found.flatten().tolist()) & set(windows.input_ids.flatten().tolist())


@pytest.mark.parametrize("length, samples, seqlen, count", [(10_000, 32, 64, 4), (10_000, 8, 64, 100)])
def test_further_windows_share_no_token_with_any_other(length, samples, seqlen, count):
    ids = torch.arange(length)
    windows, held_out, _ = split(ids, samples, seqlen, seed=3)
    more = further(ids, samples, seqlen, 3, count).input_ids
    assert 4 <= len(more) <= count and more.shape[1] == seqlen and len(more.unique()) == more.numel()
    for others in (windows, held_out):
        assert not set(more.flatten().tolist()) & set(others.input_ids.flatten().tolist())


def test_a_short_text_has_no_further_windows():
    assert further(torch.arange(400), 1000, 10, 0, 4) is None
    assert further(torch.arange(700), 8, 30, 3, 4) is None  # all between the others are held out


def test_as_many_windows_as_fit_are_held_out_up_to_sixteen_and_spread_over_the_text():
    apart = split(torch.arange(100_000), 2, 100, seed=0)[1].input_ids
    assert len(apart) == 16
    assert int(apart.min()) < 1000 and int(apart.max()) > 98_000 and int(apart[:, 0].diff().max()) < 10_000


@pytest.mark.parametrize("length, count", [(100, 1), (400, 5), (80, 1), (1300, 16)])
def test_of_a_short_text_the_end_is_held_out(length, count):
    ids = torch.arange(length)
    windows, held_out, apart = split(ids, 1000, 10, seed=0)
    assert held_out.input_ids.flatten().tolist() == list(range(length - 10 * count, length))
    assert torch.equal(apart, ids >= length - 10 * count)
    assert windows.input_ids.shape == (1000, 10) and int(windows.input_ids.max()) < length - 10 * count


def test_nothing_is_held_out_of_a_text_of_fewer_than_eight_windows():
    ids = torch.arange(79)
    windows, held_out, apart = split(ids, 1000, 10, seed=0)
    assert held_out is None and not apart.any()
    assert torch.equal(windows.input_ids, calibration_windows(ids, 1000, 10, seed=0).input_ids)
    with pytest.raises(InputError, match="the text has 79 tokens and one sequence needs 80"):
        split(ids, 4, 80, seed=0)


def loss(model, windows):
    return mean_loss(model, Calibration.of(windows), 4)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "2:4", "shots": 2},
        {"structure": "2:4", "method": "sparsegpt"},
        {"structure": "2:4", "shots": 1, "gradient_steps": 1},
        {"structure": "2:4", "shots": 1, "lora_rank": 2, "lora_steps": 2},
        {"structure": "2:4", "shots": 1, "offload": "cpu"},
        {"structure": "rows-columns", "shots": 1},
        {"structure": "groups", "sparsity": 0.3, "shots": 2},
        {"structure": "width", "sparsity": 0.3, "shots": 1},
        {"structure": "layers", "sparsity": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_held_out_losses_are_those_of_the_dense_and_of_the_pruned_model(options):
    model = build("llama")
    before = loss(model, APART)
    report = prune(model, TOKENS, held_out=APART, **options)
    assert (report.held_out.windows, report.held_out.tokens) == (5, 60)
    assert report.held_out.loss_before == pytest.approx(before, rel=1e-6)
    assert report.held_out.loss_after == pytest.approx(loss(model, APART), rel=1e-5)
    assert abs(report.held_out.increase) > 1e-4


def test_weights_are_the_same_whether_anything_is_held_out_or_not():
    first, second = build("opt"), build("opt")
    assert prune(first, TOKENS, shots=2).held_out is None
    prune(second, TOKENS, shots=2, held_out=APART)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_padding_is_not_held_out():
    mask = torch.ones_like(APART)
    mask[0, 8:] = 0
    report = prune(build("llama"), TOKENS, shots=1, held_out={"input_ids": APART, "attention_mask": mask})
    assert report.held_out.tokens == 56


def test_held_out_data_that_the_model_does_not_know_are_refused_before_anything_changes():
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="held-out sequences hold token id 64, and the model has 64 embeddings"):
        prune(model, TOKENS, held_out=APART + 64 - APART.max(), shots=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_too_few_calibration_tokens_are_warned_of():
    report = prune(build("llama"), TOKENS, shots=1)
    assert report.warnings[0].startswith("96 calibration tokens are few for layers of 48 inputs: take 384 at least")


def pruned_on(words: int, tmp_path, **options) -> tuple[PruneReport, str, str]:
    """The report, the card and the page of a checkpoint pruned on a text of so many tokens, one of them BOS."""
    draws = torch.randint(1, VOCABULARY, (words - 1,), generator=torch.Generator().manual_seed(5))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in draws.tolist()))
    save_folder(tmp_path / "dense", build("llama"))
    text, out = tmp_path / "text.txt", tmp_path / "out"
    report = prune_checkpoint(
        tmp_path / "dense", out, calibration=str(text), shots=1, samples=8, seqlen=16, device="cpu", **options
    )
    assert PruneReport.read(out / "surgeon_report.json") == report
    return report, (out / "README.md").read_text(), (out / "report.html").read_text()


def test_a_checkpoint_is_measured_on_what_was_held_out_of_its_text(tmp_path):
    report, card, page = pruned_on(2000, tmp_path)
    assert (report.held_out.windows, report.held_out.tokens) == (16, 256)
    assert report.held_out.loss_after != report.held_out.loss_before
    assert f"Perplexity on held-out text: {report.held_out.describe()}" in card
    assert f"{report.held_out.perplexity_after:.2f}</div>" in page
    assert not any("held out" in warning for warning in report.warnings)


def test_corrections_do_not_see_what_is_held_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("llm_surgeon.recovery.correct.correct", lambda *arguments: seen.append(arguments[2]))
    pruned_on(130, tmp_path, lora_rank=2, lora_data=str(tmp_path / "text.txt"))
    ids = json.loads((tmp_path / "dense" / "tokenizer.json").read_text())["model"]["vocab"]
    held_out = [ids[word] for word in (tmp_path / "text.txt").read_text().split()[-16:]]
    windows = seen[0].input_ids.tolist()
    assert held_out not in windows and len(windows) == 8


def test_a_text_too_short_to_hold_anything_out_is_warned_of(tmp_path):
    report, card, page = pruned_on(100, tmp_path)
    sentence = (
        "No text was held out, as 100 tokens are fewer than 8 windows of 16: "
        "the losses are those on the calibration windows alone."
    )
    assert report.held_out is None and sentence in report.warnings
    assert f"Warning: {sentence}" in report.summary()
    assert f"> Warning: {sentence}" in card and sentence in page


def test_the_revision_of_a_model_of_the_hub_is_recorded(tmp_path, monkeypatch):
    """It is the commit that the hub's cache names its folder for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = save_folder(tmp_path / "models--some--model" / "snapshots" / commit, build("llama"))
    monkeypatch.setattr("llm_surgeon.checkpoint.folder.hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    (tmp_path / "text.txt").write_text("w2 w3 w4 w5 " * 100)
    options = {"calibration": str(tmp_path / "text.txt"), "samples": 2, "seqlen": 8, "method": "magnitude"}
    for source, revision in (("some/model", commit), (save_folder(tmp_path / "local", build("llama")), None)):
        out = tmp_path / f"out {revision}"
        report = prune_checkpoint(source, out, device="cpu", **options)
        assert report.revision == PruneReport.read(out / "surgeon_report.json").revision == revision
        assert (f"from revision `{commit}`" in (out / "README.md").read_text()) == (revision is not None)
        assert (commit in (out / "report.html").read_text()) == (revision is not None)
