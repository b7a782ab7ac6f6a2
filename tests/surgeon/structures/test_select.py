"""Coupled groups: their costs, and the selection that meets a target."""

import pytest
import torch

from llm_surgeon import InputError, PruneConfig
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.factors import DampedFactor, KroneckerFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import Decoder, find_decoder
from llm_surgeon.planning.plan import make_plan
from llm_surgeon.shots.run import Run
from llm_surgeon.structures.costs import DimensionCosts, kronecker_costs
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.groups import GroupShots
from llm_surgeon.structures.narrowing import NarrowingState
from llm_surgeon.structures.reachable import check_reachable
from llm_surgeon.structures.select import select_groups
from surgeon_kernels import damp, objective, rows_columns_update
from tests.surgeon.tiny_models import VOCABULARY, build

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured():
    """A tiny Llama's first two dimensions with float64 factors."""
    model = build("llama", torch.float64)
    decoder = find_decoder(model)
    dimensions = find_dimensions(model, decoder)
    curvature = estimate_curvature(model, decoder, Calibration(TOKENS), batch_size=6)
    factors = []
    for dimension in dimensions:
        G, A = curvature.factors(dimension.consumer)
        factors.append(KroneckerFactors(DampedFactor(G, 0.01), DampedFactor(A, 0.01)))
    return model, dimensions, factors


def test_a_groups_cost_is_what_the_best_compensation_leaves(measured):
    _, dimensions, factors = measured
    for dimension, known in zip(dimensions, factors, strict=True):
        weight = dimension.consumer.matrix(torch.float64)
        nothing = torch.zeros(dimension.groups, dimension.parts, dtype=torch.bool)
        costs = kronecker_costs(dimension, weight, known, nothing)
        whole = [(choose(dimension, group), costs.groups[group]) for group in range(2)]
        parts = [(choose(dimension, 1, part), costs.parts[1, part]) for part in range(dimension.parts)]
        for removed, cost in whole + parts:
            columns, rows = dimension.removed_columns(removed), torch.zeros(len(weight), dtype=torch.bool)
            best = objective(rows_columns_update(weight, *known.damped, rows, columns), *known.damped)
            assert best == pytest.approx(float(cost), rel=1e-8)


def choose(dimension, group, part=None):
    removed = torch.zeros(dimension.groups, dimension.parts, dtype=torch.bool)
    removed[group, slice(None) if part is None else part] = True
    return removed


def costs_of(dimension, scale=1.0):
    values = scale * torch.arange(1.0, dimension.groups + 1)
    return DimensionCosts(values, (values / dimension.parts)[:, None].repeat(1, dimension.parts))


def select(dimensions, sparsity, scale=1.0, **options):
    """Removed parts under made-up costs: group i costs i + 1."""
    total = sum(d.weights(d.groups, d.parts) for d in dimensions)
    costs = [costs_of(dimension, scale if dimension.is_heads else 1.0) for dimension in dimensions]
    before = [torch.zeros(d.groups, d.parts, dtype=torch.bool) for d in dimensions]
    config = PruneConfig(structure="groups", sparsity=sparsity, **options)
    removed, threshold = select_groups(dimensions, costs, before, config, round(sparsity * total))
    gone = 0
    for d, mask in zip(dimensions, removed, strict=True):
        left = (~mask).sum(dim=1)
        assert len({int(n) for n in left if n}) == 1  # as many parts in every group that is left
        gone += d.weights(d.groups, d.parts) - d.weights(int((left > 0).sum()), int(left.max()))
    return removed, threshold, gone / total


def test_the_cheapest_per_weight_go_first_and_the_target_is_met_closely(measured):
    _, dimensions, _ = measured
    removed, threshold, share = select(dimensions, 0.2, scale=1e6)
    neuron = dimensions[1].weights(1, 1) / sum(d.weights(d.groups, d.parts) for d in dimensions)
    assert 0.2 <= share < 0.2 + neuron
    assert not removed[0].any() and not removed[2].any()  # heads are dear here
    for mask in (removed[1], removed[3]):
        count = int(mask.sum())
        assert mask[:count].all()
        assert abs(count - int(removed[1].sum())) <= 1  # both blocks cost the same
    assert threshold == pytest.approx(int(removed[1].sum()) / dimensions[1].weights(1, 1), rel=0.1)
    removed, _, _ = select(dimensions, 0.2, scale=1e-6)
    assert removed[0].any() and removed[2].any()


def test_sizes_respect_rounding_min_kept_skipped_and_uniform(measured):
    _, dimensions, _ = measured
    removed, _, share = select(dimensions, 0.25, round_to=16)
    assert share >= 0.25
    for d, mask in zip(dimensions, removed, strict=True):
        assert int((~mask).sum()) * d.part_columns.shape[2] % 16 == 0
    removed, _, _ = select(dimensions, 0.4, min_kept=0.5, scale=1e-6)
    assert all(int((~mask).sum()) >= mask.numel() / 2 for mask in removed)
    removed, _, share = select(dimensions, 0.2, skip_layers="1")
    assert share >= 0.2 and not removed[2].any() and not removed[3].any()
    removed, _, _ = select(dimensions, 0.3, uniform=True)
    assert int(removed[0].sum()) == int(removed[2].sum()) and int(removed[1].sum()) == int(removed[3].sum())
    removed, _, share = select(dimensions, 0.3, allocation="local", importance="vector")
    assert share >= 0.3 and int(removed[1].sum()) == int(removed[3].sum())


def test_no_step_is_taken_after_which_the_target_cannot_be_met(measured):
    """Half of the query heads of every group gone, no group may go: with least 0.5 of all heads, whole groups must."""
    _, dimensions, _ = measured
    for scale in (1e-6, 1.0):
        removed, _, share = select(dimensions, 0.5, min_kept=0.5, scale=scale)
        assert share == 0.5 and all(int(mask.sum()) == mask.numel() / 2 for mask in removed)
    config = PruneConfig(structure="groups", sparsity=0.5, min_kept=0.5)
    total = sum(d.weights(d.groups, d.parts) for d in dimensions)
    removed = [torch.zeros(d.groups, d.parts, dtype=torch.bool) for d in dimensions]
    for share in (0.1, 0.2, 0.5):
        costs = [costs_of(d, 1e-6 if d.is_heads else 1.0) for d in dimensions]
        removed, _ = select_groups(dimensions, costs, removed, config, round(share * total), total // 2)
    assert all(int(mask.sum()) == mask.numel() / 2 for mask in removed)


def test_a_target_that_is_missed_is_an_error(measured):
    """Local allocation removes whole groups alone."""
    _, dimensions, _ = measured
    with pytest.raises(InputError, match="cannot be met with allocation 'local'"):
        select(dimensions, 0.8, allocation="local", importance="vector")


def test_earlier_choices_stay():
    model = build("llama")
    dimensions = find_dimensions(model, find_decoder(model))
    total = sum(d.weights(d.groups, d.parts) for d in dimensions)
    before = [torch.zeros(d.groups, d.parts, dtype=torch.bool) for d in dimensions]
    before[1][-3:] = True  # the dearest
    config = PruneConfig(structure="groups", sparsity=0.3)
    removed, _ = select_groups(dimensions, [costs_of(d) for d in dimensions], before, config, round(0.3 * total))
    assert bool(removed[1][-3:].all())


def test_reachable_sparsity_counts_what_must_stay(measured):
    _, dimensions, _ = measured
    total = sum(d.weights(d.groups, d.parts) for d in dimensions)
    least = sum(d.weights(1, 1) for d in dimensions) / total
    check_reachable(dimensions, PruneConfig(structure="groups", sparsity=1 - least - 1e-6, min_kept=0.0), total)
    with pytest.raises(InputError, match=f"at most {1 - least:.3g}"):
        check_reachable(dimensions, PruneConfig(structure="groups", sparsity=1 - least + 1e-3, min_kept=0.0), total)


def test_a_group_that_lost_a_part_costs_what_its_other_parts_cost():
    model = build("llama")
    heads = find_dimensions(model, find_decoder(model))[0]
    assert (heads.groups, heads.parts) == (2, 2)
    costs = DimensionCosts(torch.tensor([3.0, 3.1]), torch.tensor([[2.0, 0.1], [1.0, 2.0]]))
    state = NarrowingState(heads, costs, torch.zeros(2, 2, dtype=torch.bool), PruneConfig(structure="groups"))
    group, part = state.steps()
    assert (group.cost, group.groups) == (3.0, 1) and (part.cost, part.parts) == (pytest.approx(1.1), 1)
    state.apply(part)
    assert state.mask().tolist() == [[False, True], [True, False]]
    (group,) = state.steps()
    assert group.cost == pytest.approx(2.1)  # of the second group now
    state.apply(group)
    assert state.mask().tolist() == [[False, True], [True, True]]
    assert state.removed_weights == heads.weights(2, 2) - heads.weights(1, 1)


def test_what_is_gone_does_not_compensate_in_later_costs():
    model = build("llama", torch.float64)
    decoder = find_decoder(model)
    calibration = Calibration(TOKENS)
    config = PruneConfig(structure="groups", samples=len(TOKENS), seqlen=TOKENS.shape[1])
    shots = GroupShots(Run(model, decoder, calibration, config, make_plan(model, decoder, config)))
    heads = shots.dimensions[0]
    consumer = Decoder(decoder.blocks, [heads.consumer])
    shots._curvature = curvature = estimate_curvature(model, consumer, calibration, batch_size=4)
    removed = torch.tensor([[True, False], [False, True]])
    found, _ = shots._costs(heads, removed)

    G, A = curvature.factors(heads.consumer)
    alive = ~heads.removed_columns(removed)
    left = A[alive][:, alive]
    shift = config.damp_a * left.diagonal().sum() / len(A)
    inverse = torch.linalg.inv(left + shift * torch.eye(len(left), dtype=A.dtype))
    second = torch.isin(alive.nonzero()[:, 0], heads.part_columns[1, 0])
    W = heads.consumer.matrix(A.dtype)[:, alive][:, second]
    inner = torch.linalg.solve(inverse[second][:, second], W.T @ damp(G, config.damp_g) @ W)
    assert float(found.groups[1]) == pytest.approx(float(0.5 * inner.trace()), rel=1e-6)
    assert float(found.parts[1, 0]) == pytest.approx(float(found.groups[1])) and found.parts[0, 0] == 0.0
