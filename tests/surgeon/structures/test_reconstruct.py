"""Least-squares reconstruction of the dense model's activations."""

import copy

import pytest
import torch

from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.structures.reconstruct import reconstruct
from llm_surgeon.structures.remove.blocks import skipped
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(0))
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def fit(model, dense, name, mask=None):
    decoder = find_decoder(model)
    data = Calibration(TOKENS, mask)
    blocks = find_decoder(dense).blocks
    reconstruct(model, decoder, blocks, set(WRITERS[name]), data, damping=1e-12, batch_size=5)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("padded", [False, True])
def test_damage_that_can_be_undone_is_undone(name, padded):
    """Every linear is disturbed: the fit finds the dense model again, through norms, attention and shared inputs."""
    dense = build(name, torch.float64)
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    for linear in find_decoder(model).linears:
        matrix = linear.matrix(torch.float64)
        linear.write(matrix * (1 + 0.3 * torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)))
    mask = None
    if padded:
        mask = torch.ones_like(TOKENS, dtype=torch.bool)
        mask[::2, 20:] = False
    assert float((logits(model) - logits(dense)).abs().max()) > 0.1
    fit(model, dense, name, mask)
    # RMS norms and softmax compute in float32.
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.0, atol=1e-3)


def test_writers_make_up_for_what_the_stream_lacked_before_them():
    """The first block's attention is gone for good; its feed-forward layer takes over what a linear map can."""
    dense = build("llama", torch.float64)
    model = copy.deepcopy(dense)
    for linear in find_decoder(model).linears:
        if linear.kind == "self_attn.o_proj" and linear.depth == 0:
            linear.write(torch.zeros_like(linear.matrix(torch.float64)))
    before = float((logits(model) - logits(dense)).norm())
    fit(model, dense, "llama")
    gone = model.model.layers[0].self_attn.o_proj.weight
    assert bool((gone == 0.0).all())
    assert float((logits(model) - logits(dense)).norm()) < 0.8 * before


def test_post_norm_blocks_are_fitted_output_by_output():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = OPTForCausalLM(config).double().eval()
    model = copy.deepcopy(dense)
    for linear in find_decoder(model).linears:
        linear.write(linear.matrix(torch.float64) * 1.5)
    fit(model, dense, "opt")
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("depth, left", [(1, 1e-6), (0, 0.1)])
def test_blocks_that_stay_take_over_what_a_skipped_one_added(depth, left):
    """An OPT block that adds a constant: biases before it make up for all, after it (behind a norm) for most of it."""
    dense = build("opt", torch.float64)
    linears = {linear.name: linear for linear in find_decoder(dense).linears if linear.depth == depth}
    for linear in linears.values():
        if linear.kind in WRITERS["opt"]:
            constant = torch.zeros_like(linear.matrix(torch.float64))
            constant[:, -1] = torch.linspace(-1.0, 1.0, linear.rows)
            linear.write(constant)
    model = copy.deepcopy(dense)
    decoder = find_decoder(model)
    with skipped(decoder.blocks, [depth]):
        before = float((logits(model) - logits(dense)).norm())
    own = copy.deepcopy(decoder.blocks[depth].state_dict())
    data = Calibration(TOKENS)
    reconstruct(model, decoder, decoder.blocks, set(WRITERS["opt"]), data, damping=1e-12, batch_size=5, skipped=[depth])
    with skipped(decoder.blocks, [depth]):
        assert float((logits(model) - logits(dense)).norm()) < left * before
    assert all(torch.equal(value, own[name]) for name, value in decoder.blocks[depth].state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_whole_blocks_are_made_up_for(name):
    dense = build(name)
    distances = []
    for chosen in (False, True):
        model = build(name)
        report = prune(model, TOKENS, structure="layers", sparsity=0.5, reconstruct=chosen)
        distances.append(float((logits(model) - logits(dense)).norm()))
        assert ("reconstruction" in report.shots[-1].seconds) == chosen
    assert distances[1] < distances[0]
    rise = mean_loss(model, Calibration(TOKENS), 6) - mean_loss(dense, Calibration(TOKENS), 6)
    assert report.shots[-1].measured_increase == pytest.approx(rise, abs=1e-5)


def test_pruned_groups_come_closer_to_the_dense_model_and_stay_removed():
    dense = build("llama")
    distances, sizes = [], []
    for chosen in (False, True):
        model = build("llama")
        report = prune(model, TOKENS, structure="groups", sparsity=0.3, shots=1, reconstruct=chosen)
        distances.append(float((logits(model) - logits(dense)).norm()))
        sizes.append(report.removed)
        assert ("reconstruction" in report.shots[-1].seconds) == chosen
    assert sizes[0] == sizes[1] and distances[1] < distances[0]


def test_it_is_the_default_where_groups_are_compensated_for_and_refused_elsewhere():
    assert PruneConfig(structure="groups").reconstruct is True
    assert PruneConfig(structure="groups", update="none").reconstruct is False
    assert PruneConfig(structure="groups", importance="vector").reconstruct is False
    assert PruneConfig(structure="2:4").reconstruct is False
    assert PruneConfig(structure="layers").reconstruct is True
    assert PruneConfig(structure="layers", importance="taylor1").reconstruct is False
    for structure in ("2:4", "width"):
        with pytest.raises(InputError, match="reconstruct"):
            PruneConfig(structure=structure, reconstruct=True)
