"""Least-squares fit of pruned linears to what the dense model computes."""

import copy

import pytest
import torch

import llm_surgeon.shots.run
from llm_surgeon import InputError, PruneConfig, prune
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.reconstruct import reconstruct
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.models.writers import find_writers
from llm_surgeon.structures.remove.blocks import skipped
from tests.surgeon.tiny_models import NAMES, VOCABULARY, build

DOUBLE = torch.float64
TOKENS = torch.randint(0, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(0))
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def selections(decoder, rows=None, columns=None):
    """Lines that go, by the linears' names; of others none."""
    chosen = []
    for linear in decoder.linears:
        masks = [torch.zeros(size, dtype=torch.bool) for size in (linear.rows, linear.columns)]
        for mask, numbers in zip(masks, (rows, columns), strict=True):
            mask[(numbers or {}).get(linear.name, [])] = True
        chosen.append(Selection.of_rows_columns(*masks))
    return chosen


def fit(model, chosen=None, weights=None, output_factor=lambda _: None, **options):
    decoder = find_decoder(model)
    weights = torch.ones(TOKENS.shape, dtype=DOUBLE) if weights is None else weights
    options = {"damping": 1e-12, "batch_size": 5, "writers": find_writers(model, decoder), **options}
    mask = None if bool((weights > 0).all()) else weights > 0
    chosen = selections(decoder) if chosen is None else chosen
    reconstruct(model, decoder, chosen, Calibration(TOKENS, mask), lambda _: weights, output_factor, **options)


def inputs_and_stream(model, linear, mask):
    """A linear's inputs ``[tokens, C']`` and what the residual stream is where it adds to it ``[tokens, R]``."""
    decoder, seen = find_decoder(model), {}
    block = decoder.blocks[linear.depth]
    writers = find_writers(model, decoder)
    upto = [x.name for x in decoder.linears].index(linear.name) if linear.name in writers else 0
    before = [x for x in decoder.linears[:upto] if x.depth == linear.depth and x.name in writers]
    handles = [linear.module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone()))]
    handles += [block.register_forward_pre_hook(lambda _, args: seen.update(h=args[0].clone()))]
    for writer in before:
        handles += [writer.module.register_forward_hook(lambda m, _, y: seen.update({m: y.clone()}))]
    with torch.no_grad():
        model(TOKENS, attention_mask=mask)
    for handle in handles:
        handle.remove()
    x = seen["x"].reshape(TOKENS.numel(), -1)
    if linear.has_bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    stream = seen["h"].reshape(TOKENS.numel(), -1)
    return x, stream + sum(seen[writer.module].reshape(stream.shape) for writer in before)


@pytest.mark.parametrize("name", WRITERS)
def test_every_linear_solves_its_weighted_least_squares_problem(name):
    """Linear after linear against one dense solve, at inputs that runs of both whole models give."""
    damping, rho = 0.03, 0.7
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(TOKENS.shape, generator=generator, dtype=DOUBLE) + 0.1
    weights[::2, 20:] = 0.0
    model, dense, expected = (build(name, DOUBLE) for _ in range(3))
    decoder = find_decoder(model)
    gone = {x.name: torch.randperm(x.columns, generator=generator)[:3].tolist() for x in decoder.linears[2::3]}
    rows = {decoder.linears[0].name: [1, 5]}
    fit(model, selections(decoder, rows, gone), weights, damping=damping, residual_weight=rho)
    w = weights.flatten()[:, None] / weights.sum()
    mask = weights > 0
    actual = {linear.name: linear.matrix() for linear in decoder.linears}
    pairs = zip(find_decoder(dense).linears, find_decoder(expected).linears, strict=True)
    for linear, own in pairs:
        x, h = inputs_and_stream(dense, linear, mask)
        y, k = inputs_and_stream(expected, own, mask)
        W = linear.matrix()
        wanted = x @ W.T
        if linear.kind in WRITERS[name]:
            wanted += rho * (h - k)
        kept = torch.ones(W.shape[1], dtype=torch.bool)
        kept[gone.get(linear.name, [])] = False
        y = y[:, kept]
        ridge = damping * (w * y.square()).sum(dim=0).mean()
        right = (w * wanted).T @ y + ridge * W[:, kept]
        new = torch.zeros_like(W)
        new[:, kept] = torch.linalg.solve((w * y).T @ y + ridge * torch.eye(y.shape[1], dtype=DOUBLE), right.T).T
        new[rows.get(linear.name, [])] = 0.0
        # RMS norms and softmax compute in float32.
        torch.testing.assert_close(actual[linear.name], new, rtol=0.0, atol=1e-6)
        own.write(actual[linear.name])


def test_rows_that_others_read_are_made_up_for_in_the_norm_of_G():
    """The first linear's kept weights against one solve of the Kronecker system around the dense ones."""
    model, dense = build("llama", DOUBLE), build("llama", DOUBLE)
    linear = find_decoder(model).linears[0]
    rows, columns = [0, 4, 9], [2, 3]
    factor = torch.randn(linear.rows, linear.rows, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    G = factor @ factor.T
    chosen = selections(find_decoder(model), {linear.name: rows}, {linear.name: columns})
    fit(model, chosen, None, lambda other: G if other.name == linear.name else None, damping=0.02)
    own = find_decoder(dense).linears[0]
    x, _ = inputs_and_stream(dense, own, None)
    A = x.T @ x / len(x)
    W, kept = own.matrix(), torch.ones(linear.rows, linear.columns, dtype=torch.bool)
    kept[rows], kept[:, columns] = False, False
    inputs = [column for column in range(linear.columns) if column not in columns]
    A += 0.02 * A[inputs][:, inputs].diagonal().mean() * torch.eye(len(A), dtype=DOUBLE)
    F, free = torch.kron(G, A), kept.flatten()
    expected = torch.zeros_like(W)
    expected[kept] = torch.linalg.solve(F[free][:, free], (F @ W.flatten())[free])
    torch.testing.assert_close(linear.matrix(), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_model_that_loses_nothing_stays_as_it_is(name):
    model, dense = build(name, DOUBLE), build(name, DOUBLE)
    fit(model, damping=1e-3)
    for linear, own in zip(find_decoder(model).linears, find_decoder(dense).linears, strict=True):
        torch.testing.assert_close(linear.matrix(), own.matrix(), rtol=0.0, atol=1e-6)


def test_writers_make_up_for_what_the_stream_lacked_before_them():
    """The first block's attention is gone for good; its feed-forward layer takes over what a linear map can."""
    dense, cut, model = (build("llama", DOUBLE) for _ in range(3))
    decoder = find_decoder(model)
    writer = next(linear for linear in decoder.linears if linear.kind == "self_attn.o_proj")
    chosen = selections(decoder, rows={writer.name: list(range(writer.rows))})
    find_decoder(cut).linears[decoder.linears.index(writer)].write(torch.zeros_like(writer.matrix()))
    fit(model, chosen)
    assert bool((writer.matrix() == 0.0).all())
    assert float((logits(model) - logits(dense)).norm()) < 0.8 * float((logits(cut) - logits(dense)).norm())


def test_post_norm_blocks_are_fitted_output_by_output():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = OPTForCausalLM(config).double().eval()
    distances = []
    for zeroed in (True, False):
        model = copy.deepcopy(dense)
        decoder = find_decoder(model)
        columns = {linear.name: list(range(0, 64, 4)) for linear in decoder.linears if linear.kind == "fc2"}
        if zeroed:
            for linear in decoder.linears:
                matrix = linear.matrix()
                matrix[:, columns.get(linear.name, [])] = 0.0
                linear.write(matrix)
        else:
            fit(model, selections(decoder, columns=columns))
        distances.append(float((logits(model) - logits(dense)).norm()))
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("depth, left", [(1, 1e-6), (0, 0.1)])
def test_blocks_that_stay_take_over_what_a_skipped_one_added(depth, left):
    """An OPT block that adds a constant: biases before it make up for all, after it (behind a norm) for most of it."""
    dense = build("opt", DOUBLE)
    linears = {linear.name: linear for linear in find_decoder(dense).linears if linear.depth == depth}
    for linear in linears.values():
        if linear.kind in WRITERS["opt"]:
            constant = torch.zeros_like(linear.matrix())
            constant[:, -1] = torch.linspace(-1.0, 1.0, linear.rows)
            linear.write(constant)
    model = copy.deepcopy(dense)
    decoder = find_decoder(model)
    with skipped(decoder.blocks, [depth]):
        before = float((logits(model) - logits(dense)).norm())
    own = copy.deepcopy(decoder.blocks[depth].state_dict())
    fit(model, skipped=[depth])
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


@pytest.mark.parametrize("structure", ["groups", "rows-columns"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pruned_lines_come_closer_to_the_dense_model_and_stay_removed(structure, weighted):
    dense = build("llama")
    distances, sizes = [], []
    for options in ({"reconstruct": False}, {"reconstruct": True, "token_weights": weighted}):
        model = build("llama")
        report = prune(model, TOKENS, structure=structure, sparsity=0.3, shots=2, **options)
        distances.append(float((logits(model) - logits(dense)).norm()))
        sizes.append(report.removed)
        assert ("reconstruction" in report.shots[-1].seconds) == options["reconstruct"]
        zeros = sum(int((x.matrix() == 0.0).sum()) for x in find_decoder(model).linears)
        assert zeros == (report.removed if structure == "rows-columns" else 0)
    assert sizes[0] == sizes[1] and distances[1] < distances[0]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_fit_of_offloaded_weights_is_the_same(name):
    models = []
    for options in ({}, {"offload": "cpu", "curvature_layers": 1}):
        models.append(build(name))
        prune(
            models[-1], TOKENS, structure="rows-columns", sparsity=0.3, shots=2, reconstruct=True, token_weights=True,
            **options,
        )  # fmt: skip
    for ours, theirs in zip(*(find_decoder(model).linears for model in models), strict=True):
        torch.testing.assert_close(ours.matrix(), theirs.matrix(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure, summed", [("groups", False), ("layers", False), ("rows-columns", True)])
def test_gradients_are_summed_only_where_rows_become_zeros(structure, summed, monkeypatch):
    asked = []
    estimate = llm_surgeon.shots.run.estimate_curvature

    def noting(*arguments, **options):
        if options.get("squared_norms"):
            asked.append(options["output_factors"])
        return estimate(*arguments, **options)

    monkeypatch.setattr(llm_surgeon.shots.run, "estimate_curvature", noting)
    prune(build("llama"), TOKENS, structure=structure, shots=1, sparsity=0.4, reconstruct=True, token_weights=True)
    assert asked == [summed]


def test_it_is_the_default_where_groups_are_compensated_for_and_refused_elsewhere():
    assert PruneConfig(structure="groups").reconstruct is True
    assert PruneConfig(structure="groups", update="none").reconstruct is False
    assert PruneConfig(structure="groups", importance="vector").reconstruct is False
    assert PruneConfig(structure="2:4").reconstruct is False
    assert PruneConfig(structure="layers").reconstruct is True
    assert PruneConfig(structure="layers", importance="taylor1").reconstruct is False
    assert PruneConfig(structure="groups", lora_rank=2).reconstruct is False
    assert PruneConfig(structure="rows-columns").reconstruct is False
    assert PruneConfig(structure="rows-columns", offload="cpu", reconstruct=True).reconstruct
    for structure in ("2:4", "width"):
        with pytest.raises(InputError, match="reconstruct"):
            PruneConfig(structure=structure, reconstruct=True)
