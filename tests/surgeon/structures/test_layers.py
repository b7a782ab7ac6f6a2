"""Whole decoder blocks: chosen by measured loss, removed for good."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from llm_surgeon import InputError, NumericalError, PruneConfig, UnsupportedModelError, prune
from llm_surgeon.config.prune import IMPORTANCES
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import Decoder, find_decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.progress import Progress
from llm_surgeon.structures.layers import BlockShots, block_weights, count_blocks
from llm_surgeon.structures.remove.blocks import remove_blocks, skipped
from llm_surgeon.structures.remove.verify import probe_logits
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", NAMES)
def test_zero_writers_skipping_and_removal_agree(name, tmp_path):
    model, zeroed = build(name, torch.float64), build(name, torch.float64)
    writers = [x for x in find_decoder(zeroed).linears if x.depth == 0]
    for linear in (x for x in writers if x.kind.rpartition(".")[2] in OUT):
        linear.write(torch.zeros_like(linear.matrix()))
    decoder = find_decoder(model)
    with skipped(decoder.blocks, [0]):
        torch.testing.assert_close(logits(model), logits(zeroed), rtol=0.0, atol=1e-8)
    remove_blocks(model, decoder, [0])
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=0.0, atol=1e-8)
    assert model.config.num_hidden_layers == 1 and len(find_decoder(model).blocks) == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.0, atol=1e-5 if name == "gemma" else 1e-8)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(TOKENS, **options), loaded.generate(TOKENS, use_cache=False, **options))


OUT = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h")


def test_the_block_with_the_smallest_measured_rise_goes():
    model = build("llama")
    decoder, data = find_decoder(model), Calibration(TOKENS)
    losses = []
    for depth in range(2):
        with skipped(decoder.blocks, [depth]):
            losses.append(mean_loss(model, data, 6))
    kept = decoder.blocks[losses.index(max(losses))]
    report = prune(model, TOKENS, structure="layers", sparsity=0.5, reconstruct=False)
    assert list(model.model.layers) == [kept]
    assert report.sparsity == 0.5 and sorted(layer.sparsity for layer in report.layers) == [0.0] * 7 + [1.0] * 7
    shot = report.shots[0]
    assert shot.measured_increase == pytest.approx(min(losses) - shot.loss_before, abs=1e-6)
    assert shot.predicted_increase == pytest.approx(shot.measured_increase, abs=1e-6)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_removes_the_blocks_that_are_not_skipped(importance):
    model = build("llama")
    last = model.model.layers[1]
    prune(model, TOKENS, structure="layers", sparsity=0.3, importance=importance, skip_layers="1")
    assert list(model.model.layers) == [last] and last.self_attn.layer_idx == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sparsity": 0.9}, "one of 2 blocks must stay"),
        ({"sparsity": 0.5, "skip_layers": "0-1"}, "while blocks 0-1 stay"),
        ({"sparsity": 0.5, "skip_layers": "5"}, "names block 5"),
    ],
)
def test_what_cannot_be_met_is_refused(options, words):
    model = build("llama")
    with pytest.raises(InputError, match=words):
        prune(model, TOKENS, structure="layers", **options)
    assert len(model.model.layers) == 2


def test_a_single_block_stays():
    model = build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with pytest.raises(InputError, match="would empty the model: its only block must stay"):
        prune(model, TOKENS, structure="layers", sparsity=0.3)


def test_blocks_that_do_not_run_on_their_own_are_removed_without_a_fit():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)).eval()
    with pytest.raises(UnsupportedModelError, match=r"a BloomBlock cannot be probed .* with reconstruct false"):
        prune(model, TOKENS, structure="layers", sparsity=0.3)
    report = prune(model, TOKENS, structure="layers", sparsity=0.3, reconstruct=False)
    assert report.sparsity == pytest.approx(1 / 3) and len(model.transformer.h) == 2


def test_a_failed_removal_leaves_the_model_as_it_was(monkeypatch):
    model = build("llama")
    before = logits(model)
    monkeypatch.setattr("llm_surgeon.structures.remove.blocks.probe_logits", lambda model: 2.0 * probe_logits(model))
    with pytest.raises(NumericalError):
        prune(model, TOKENS, structure="layers", sparsity=0.5)
    assert torch.equal(logits(model), before) and model.config.num_hidden_layers == 2


def test_blocks_that_keep_their_number_under_another_name_generate(tmp_path):
    model = build("gpt_neo")
    prune(model, TOKENS, structure="layers", sparsity=0.3, skip_layers="0,2", reconstruct=False)
    assert [block.attn.layer_id for block in model.transformer.h] == [0, 1]
    assert model.config.num_layers == 2 and model.config.attention_layers == ["global", "global"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), model.generate(TOKENS, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert [block.attn.attention_type for block in loaded.transformer.h] == ["global", "global"]


def test_a_cache_that_fails_refuses_the_removal(monkeypatch):
    model = build("gpt_neo")
    before = logits(model)
    monkeypatch.setattr("llm_surgeon.structures.remove.blocks._numbers", lambda _: {"layer_idx"})
    with pytest.raises(UnsupportedModelError, match="GPTNeoForCausalLM does not generate at these sizes: its cache"):
        prune(model, TOKENS, structure="layers", sparsity=0.3)
    assert torch.equal(logits(model), before) and [block.attn.layer_id for block in model.transformer.h] == [0, 1, 2]


def test_entries_for_each_block_follow_and_token_ids_stay():
    model = build("llama")
    model.config.eos_token_id, model.config.kinds = [1, 2], ["first", "second"]
    remove_blocks(model, find_decoder(model), [0])
    assert model.config.eos_token_id == [1, 2] and model.config.kinds == ["second"]


@pytest.mark.parametrize(
    "sparsity, blocks, count",
    [(0.2, 6, 1), (0.3, 6, 2), (0.25, 6, 2), (0.01, 6, 1), (0.5, 2, 1), (0.3, 2, 1), (0.74, 2, 1), (0.2, 32, 6)],
)
def test_the_nearest_number_of_blocks_goes(sparsity, blocks, count):
    decoder = Decoder([torch.nn.Identity()] * blocks, [])
    assert count_blocks(decoder, PruneConfig(structure="layers", sparsity=sparsity)) == count


@pytest.mark.parametrize(
    "weights, sparsity, gone",
    [
        ([4, 4, 22, 4], 0.3, {0, 1, 3}),
        ([22, 4, 4, 4], 0.2, None),
        ([10, 4, 10, 4], 0.5, None),
        ([4, 22], 0.9, {1}),
        ([4, 22], 0.05, {0}),
        ([1, 1, 1, 1, 96], 0.98, None),
    ],
)
def test_of_blocks_of_several_sizes_go_as_many_weights_as_were_asked_for(weights, sparsity, gone):
    linears = [SimpleNamespace(rows=1, columns=count, depth=depth) for depth, count in enumerate(weights)]
    shots, draw = BlockShots.__new__(BlockShots), random.Random(0)
    shots.decoder = Decoder([torch.nn.Identity()] * len(weights), linears)
    shots.config = PruneConfig(structure="layers", sparsity=sparsity, min_kept=0.0)
    for _ in range(20):  # whatever is the cheapest
        shots.removed = []
        while candidates := shots._candidates():
            shots.removed.append(draw.choice(candidates))
        removed = sum(weights[depth] for depth in shots.removed)
        left = [weights[depth] for depth in range(len(weights)) if depth not in shots.removed]
        assert shots.removed and left and (gone is None or gone >= set(shots.removed))
        missed = abs(removed - sparsity * sum(weights))
        assert missed < 0.15 * sum(weights)
        assert len(left) == 1 or all(missed <= abs(removed + more - sparsity * sum(weights)) for more in left)


@pytest.mark.parametrize(
    "sparsity, skip, words",
    [
        (0.5, "2", "sparsity 0.5 cannot be met while blocks 2 stay"),
        (0.95, "", "would empty the model: one of 4 blocks must stay"),
    ],
)
def test_what_blocks_of_several_sizes_cannot_meet_is_refused(sparsity, skip, words):
    weights = [4, 4, 22, 4]
    linears = [SimpleNamespace(rows=1, columns=count, depth=depth) for depth, count in enumerate(weights)]
    decoder = Decoder([torch.nn.Identity()] * 4, linears)
    with pytest.raises(InputError, match=words):
        count_blocks(decoder, PruneConfig(structure="layers", sparsity=sparsity, skip_layers=skip, min_kept=0.0))
    for fits, free in ((0.35, "2"), (0.9, "")):
        assert count_blocks(decoder, PruneConfig(structure="layers", sparsity=fits, skip_layers=free, min_kept=0.0)) < 4


def test_a_model_of_blocks_of_two_sizes_loses_the_smaller_one():
    for seed in range(4):
        model = build("llama")
        prune(model, TOKENS, structure="groups", sparsity=0.3, skip_layers="0", min_kept=0.0, shots=1, update="none")
        weights = block_weights(find_decoder(model))
        assert weights[1] < 0.5 * weights[0]
        kept = model.model.layers[0]
        report = prune(
            model, TOKENS, structure="layers", sparsity=0.3, importance="random", seed=seed, reconstruct=False
        )
        assert list(model.model.layers) == [kept] and report.config["shots"] == len(report.shots) == 1
        assert report.sparsity == pytest.approx(weights[1] / sum(weights))


def test_as_many_shots_run_as_blocks_go():
    class Shots(Progress):
        def shots(self, total):
            announced.append(total)

        def shot(self, index):
            seen.append(index)

    announced, seen = [], []
    model = build("gpt_neo")
    report = prune(model, TOKENS, structure="layers", sparsity=0.6, progress=Shots())
    assert announced == [2] and seen == [1, 2] and report.config["shots"] == len(report.shots) == 2
    assert report.sparsity == pytest.approx(2 / 3) and len(model.transformer.h) == 1
