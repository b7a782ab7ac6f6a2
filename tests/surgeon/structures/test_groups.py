"""Runs that remove coupled groups: reports, importances, uniform widths, checkpoints, refusals."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_surgeon import InputError, PruneConfig, prune, prune_checkpoint
from llm_surgeon.checkpoint import load_model
from llm_surgeon.config.prune import IMPORTANCES
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.rebuild import become_pruned
from llm_surgeon.report.schema import PruneReport
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.importance import group_importance, weight_gradients
from tests.surgeon.checkpoints import save_folder
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def groups(**options):
    return PruneConfig(structure="groups", **options)


def widths(model):
    """Input widths of attention output and down projections, block by block."""
    consumers = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h")
    return [x.columns for x in find_decoder(model).linears if x.kind.rpartition(".")[2] in consumers]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_shrinks_by_what_the_report_says(name):
    model = build(name)
    before = sum(x.rows * x.columns for x in find_decoder(model).linears)
    report = prune(model, TOKENS, structure="groups", sparsity=0.3, shots=2)
    after = sum(x.rows * x.columns for x in find_decoder(model).linears)
    assert report.weights == before and report.removed == before - after
    assert report.sizes["before"]["macs"] - report.sizes["after"]["macs"] == report.removed
    assert report.sizes["after"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    largest = max(layer.rows + layer.columns for layer in report.layers) * 3
    assert 0.3 * before <= report.removed <= 0.3 * before + largest
    assert [shot.sparsity >= shot.target_sparsity - 1e-9 for shot in report.shots] == [True, True]
    assert bool(torch.isfinite(model(TOKENS).logits).all())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sparsity": 0.97}, r"would empty a layer: where 0\.02 \(at least one group\) of every layer stays, at most"),
        ({"sparsity": 0.5, "round_to": 64}, "multiples of 64"),
        ({"sparsity": 0.6, "skip_layers": "0"}, "blocks 0 are skipped"),
        ({"sparsity": 0.3, "skip_layers": "7"}, "names block 7"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_changes(options, words):
    model = build("llama")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=words):
        prune(model, TOKENS, structure="groups", **options)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_heads_that_do_not_divide_are_refused():
    model = build("llama")
    model.config.num_key_value_heads = 3
    with pytest.raises(InputError, match="the 4 attention heads of block 0 do not divide into 3 groups"):
        prune(model, TOKENS, structure="groups")


@pytest.mark.parametrize("name", NAMES)
def test_uniform_models_are_of_stock_classes(name):
    """No head goes where a class derives the width of a head from the number of heads."""
    model = build(name)
    stock, before = type(model), widths(model)
    report = prune(model, TOKENS, structure="structured", uniform=True, sparsity=0.3, shots=1)
    assert type(model) is stock and report.sparsity >= 0.3 and len({*widths(model)}) == 2
    if name in ("opt", "gpt_neox", "gpt2"):
        assert widths(model)[::2] == before[::2]
        with pytest.raises(InputError, match="stock classes know one width of"):
            prune(build(name), TOKENS, structure="groups", uniform=True, sparsity=0.8)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "k-obd"},
        {"update": "chunked"},
        {"importance": "vibes"},
        {"allocation": "fair"},
        {"round_to": 0},
        {"uniform": 1},
        {"skip_layers": "-1"},
        {"skip_layers": "a"},
        {"skip_layers": "1", "uniform": True},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError):
        groups(**options)


@pytest.mark.parametrize("name, value", [("importance", "vector"), ("round_to", 8), ("uniform", True)])
def test_options_of_groups_are_refused_elsewhere(name, value):
    with pytest.raises(InputError, match=name):
        PruneConfig(structure="2:4", **{name: value})


def test_gradients_are_the_mean_and_mean_square_over_sequences():
    model = build("opt", torch.float64)
    weight = find_decoder(model).linears[0].module.weight
    found = weight_gradients(model, [weight], Calibration(TOKENS))
    losses = []
    each = []
    for row in TOKENS:
        logits = model(row[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, row[1:])
        losses.append(float(loss.detach()))
        each.append(torch.autograd.grad(loss, weight)[0])
    stacked = torch.stack(each)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    torch.testing.assert_close(found.mean[weight].double(), stacked.mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.square[weight].double(), stacked.square().mean(0), rtol=1e-4, atol=1e-9)
    assert weight.requires_grad


def test_importances_follow_their_formulas():
    model = build("opt", torch.float64)
    decoder = find_decoder(model)
    neurons = find_dimensions(model, decoder)[1]
    weights = {x.kind: x.module.weight for x in decoder.linears if x.depth == 0}
    up, down = weights["fc1"], weights["fc2"]
    found = weight_gradients(model, [up, down], Calibration(TOKENS))
    g, h = ({p: t.double() for p, t in d.items()} for d in (found.mean, found.square))
    terms = {
        "vector": lambda w, dim: (w * g[w]).sum(dim).abs(),
        "taylor1": lambda w, dim: (w * g[w]).abs().sum(dim),
        "taylor2": lambda w, dim: (w * w * h[w]).sum(dim),
        "taylor-mix": lambda w, dim: (w * g[w] - 0.5 * w * w * h[w]).abs().sum(dim),
        "magnitude": lambda w, dim: (w * w).sum(dim),
    }
    with torch.no_grad():
        for importance, term in terms.items():
            costs = group_importance(neurons, importance, found, torch.Generator())
            expected = term(up, 1) + term(down, 0)
            torch.testing.assert_close(costs.groups.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("importance", IMPORTANCES[1:])
def test_every_importance_prunes_alike_without_moving_what_stays(importance):
    model = build("opt")
    kept = copy.deepcopy(model.model.decoder.layers[0].fc2.bias)
    report = prune(model, TOKENS, structure="groups", importance=importance, sparsity=0.3)
    assert len(report.shots) == 1 and report.sparsity >= 0.3
    assert torch.equal(model.model.decoder.layers[0].fc2.bias, kept)
    assert len({*widths(model)}) == 2  # the same sizes in both blocks


@pytest.mark.parametrize("uniform", [False, True])
def test_numbers_of_heads_that_do_not_divide_the_width(uniform, tmp_path):
    """Three heads of four in every block: no stock configuration may say that of a width of 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(config)).eval()
    allocation = "global" if uniform else "local"
    report = prune(model, TOKENS, structure="groups", sparsity=0.3, shots=1, allocation=allocation, uniform=uniform)
    heads = {block.self_attn.q_proj.out_features // 16 for block in model.model.layers}
    assert report.sparsity >= 0.3 and (heads in ({2}, {4}) if uniform else heads == {3})
    assert (type(model) is LlamaForCausalLM) == uniform
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=not uniform)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(InputError, match="the configuration refuses some numbers of heads"):
        prune(LlamaForCausalLM(config), TOKENS, structure="groups", sparsity=0.8, min_kept=0.2, uniform=True)


def test_a_failure_at_the_end_restores_the_model(monkeypatch):
    model = build("llama")
    state = copy.deepcopy(model.state_dict())
    calls = []

    def fails_at_the_end(*arguments):
        calls.append(arguments)  # the first call is the trial before the shots
        become_pruned(*arguments) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr("llm_surgeon.structures.remove.groups.become_pruned", fails_at_the_end)
    with pytest.raises(ZeroDivisionError):
        prune(model, TOKENS, structure="groups", sparsity=0.3, shots=2)
    assert len(calls) == 2
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_checkpoints_of_uneven_models_load_with_the_code_of_the_package(tmp_path):
    save_folder(tmp_path / "dense", build("llama"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 60 + 1}" for i in range(400)))
    options = {"structure": "groups", "sparsity": 0.3, "shots": 1, "samples": 4, "seqlen": 16}
    out = tmp_path / "out"
    report = prune_checkpoint(tmp_path / "dense", out, calibration=str(tmp_path / "text.txt"), **options)
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    assert "Size and speed" in (out / "report.html").read_text()
    assert PruneReport.from_json((out / "surgeon_report.json").read_text()).sizes == report.sizes
    assert "MACs" in report.summary()
    model, _, _ = load_model(out)  # no trust_remote_code
    assert type(model).__name__ == "PrunedLlamaForCausalLM"
    weights = sum(x.rows * x.columns for x in find_decoder(model).linears)
    assert weights == report.weights - report.removed


def test_gradient_steps_after_the_fit_bring_the_outputs_nearer_to_the_dense_ones():
    dense = build("llama")
    tokens = torch.randint(0, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(0))
    divergences, sizes = [], []
    for steps in (0, 2):
        model = build("llama")
        report = prune(model, tokens, structure="groups", sparsity=0.3, shots=2, gradient_steps=steps)
        with torch.no_grad():
            ours, wanted = (torch.log_softmax(each(tokens).logits, dim=-1) for each in (model, dense))
        divergences.append(float((wanted.exp() * (wanted - ours)).sum(dim=-1).mean()))
        sizes.append(report.removed)
        assert [len(shot.gradient_steps) for shot in report.shots] == [0, steps]
    assert report.config["gradient_target"] == "dense"
    assert report.shots[-1].gradient_steps[0].loss_after < report.shots[-1].gradient_steps[0].loss_before
    assert sizes[0] == sizes[1] and divergences[1] < 0.97 * divergences[0]
