"""Moments of two models side by side, against those of complete passes."""

import copy

import pytest
import torch

from llm_surgeon.curvature.stages import _weighted, stages
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.models.passes import run_model
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
KINDS = [*NAMES, "gpt_neo", "gemma2", "gemma4_text", "gemma4_shared", "ctrl"]


def padded():
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 15:] = False
    mask[3, :5] = False
    return Calibration(TOKENS, mask)


def inputs(model, data):
    """Inputs of every linear at real tokens in one pass over all of ``data``, by name, as rows of float64."""
    found, real = {}, torch.ones(TOKENS.shape, dtype=torch.bool)
    real = (real if data.attention_mask is None else data.attention_mask).flatten()

    def note(name, x):
        found[name] = x.reshape(len(real), -1)[real].double()

    handles = [
        linear.module.register_forward_pre_hook(lambda _, args, name=linear.name: note(name, args[0]))
        for linear in find_decoder(model).linears
    ]
    with torch.no_grad():
        run_model(model, data.input_ids, data.attention_mask)
    for handle in handles:
        handle.remove()
    return found


def assert_close(actual, expected):
    assert float((actual.double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("memory", [None, PinnedMemory()])
@pytest.mark.parametrize("data", [Calibration(TOKENS), padded()])
@pytest.mark.parametrize("name", KINDS)
def test_moments_are_those_of_complete_passes(name, data, memory):
    """At every stage, all linears before it having changed."""
    model = build(name)
    dense, decoder = inputs(model, data), find_decoder(model)
    w = torch.ones(TOKENS.shape) if data.attention_mask is None else data.attention_mask.float()
    weights = (w / w.sum()).flatten()[w.flatten() > 0][:, None].double()
    met = []
    for stage in stages(model, decoder, data, lambda _: w, writers={}, batch_size=4, memory=memory):
        first = stage.readers[0]
        x, own = dense[first.name], inputs(model, data)[first.name]
        A, cross = (part[: first.columns, : first.columns] for part in (stage.A, stage.cross))
        assert_close(A, (own * weights).T @ own)
        assert_close(cross, (x * weights).T @ own)
        for linear in stage.readers:
            linear.write(0.9 * linear.matrix())
            met.append(linear.name)
    assert sorted(met) == sorted(linear.name for linear in decoder.linears)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo"])
def test_large_answers_are_computed_anew(name, monkeypatch):
    """The same moments, whether modules are replayed or what is inside them, or nothing."""
    found, w = [], torch.ones(TOKENS.shape)
    for largest in (100, 2, 0):
        monkeypatch.setattr("llm_surgeon.models.replay._LARGEST", largest)
        model, seen = build(name), []
        for stage in stages(model, find_decoder(model), Calibration(TOKENS), lambda _: w, writers={}, batch_size=4):
            seen += [stage.A, stage.cross]
            for linear in stage.readers:
                linear.write(0.9 * linear.matrix())
        found.append(seen)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("memory", [None, PinnedMemory()])
def test_blocks_that_are_skipped_leave_what_they_add_to_the_last_writer(memory):
    """The dense model alone goes through the second of two blocks."""
    found = []
    for kept in (None, memory):
        model, seen = build("llama"), []
        decoder = find_decoder(model)
        writers = dict.fromkeys(("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"), 1.0)
        w = torch.ones(TOKENS.shape)
        options = {"writers": writers, "batch_size": 4, "skipped": {1}, "memory": kept}
        for stage in stages(model, decoder, Calibration(TOKENS), lambda _, w=w: w, **options):
            seen += [stage.A, stage.cross, *stage.residual.values()]
        found.append(seen)
    assert len(found[0]) == 10
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    # Nothing has changed: what is lacking is what the second block adds.
    hidden = []
    copied = copy.deepcopy(model)
    copied.model.layers[1].register_forward_hook(lambda _, args, y: hidden.extend([args[0], y]))
    with torch.no_grad():
        run_model(copied, TOKENS, None)
    added = (hidden[1] - hidden[0]).reshape(TOKENS.numel(), -1).double()
    x = inputs(model, Calibration(TOKENS))["model.layers.0.mlp.down_proj"]
    assert_close(found[0][-1], added.T @ x / TOKENS.numel())
    assert float(found[0][4].abs().max()) == 0.0  # of the attention's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_weight_count_for_nothing_whatever_they_hold(dtype):
    """Attention of nothing but padding is no number in some models."""
    x = torch.tensor([[[1.0, -2.0], [float("nan"), float("inf")]]], dtype=dtype)
    found = _weighted(x, torch.tensor([[0.5], [0.0]]), ones=True)
    assert torch.equal(found, torch.tensor([[0.5, -1.0, 0.5], [0.0, 0.0, 0.0]], dtype=dtype))
