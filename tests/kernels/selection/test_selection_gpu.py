"""N:M selection and the cost threshold on CUDA devices: bit for bit the references."""

import itertools

import pytest
import torch

from surgeon_kernels import WeightCosts, k_cheapest, k_smallest, nm_group_cost, nm_prune, nm_select, smallest_mask
from surgeon_kernels.runtime import extension
from surgeon_kernels.selection import k_cheapest as module
from surgeon_kernels.selection.nm_select import _reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATTERNS = [(2, 4), (1, 4), (4, 8), (8, 16), (12, 16), (3, 5), (1, 2), (300, 1024)]
VIEWS = {
    "contiguous": lambda w: w,
    "bias column": lambda w: torch.cat([w, w[:, :1]], dim=1)[:, :-1],
    "transposed": lambda w: w.T.contiguous().T,
    "misaligned": lambda w: torch.cat([w[:1, :1].flatten(), w.flatten()])[1:].view(w.shape),
}


@pytest.fixture(autouse=True)
def kernels():
    assert extension.available(), extension.obstacle()


def problem(rows, columns, dtype=torch.bfloat16, *, seed=0, ties=False, view="contiguous"):
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device="cuda")
    g, a = (torch.rand(size, generator=generator, device="cuda") for size in (rows, columns))
    if ties:
        weight, g, a = weight.round(), (2 * g).round(), (3 * a).round()
    return WeightCosts(VIEWS[view](weight.to(dtype)), g, a)


def group_reference(costs, n, m, previous=None):
    pruned, total = _reference(costs.dense(), n, m, previous)
    return pruned.flatten(1), total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm_ops_are_the_reference(n, m, dtype):
    sizes = [(1, 1), (67, 48), (130, 1000 // m + 1)]
    for view, (rows, groups), ties in itertools.product(VIEWS, sizes, [False, True]):
        costs = problem(rows, groups * m, dtype, ties=ties, view=view)
        pruned, total = group_reference(costs, n, m)
        assert torch.equal(nm_select(costs, n, m), pruned)
        assert torch.equal(nm_group_cost(costs, n, m), total)
        assert torch.equal(nm_prune(costs, n, m), costs.weight.masked_fill(pruned, 0.0))
        if view == "contiguous":
            dense = costs.dense()
            assert torch.equal(nm_select(dense, n, m), pruned)
            assert torch.equal(nm_group_cost(dense, n, m), total)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("view", ["contiguous", "bias column"])
def test_groups_below_a_threshold_and_those_pruned_before(n, m, view):
    costs = problem(97, 24 * m, ties=True, view=view)
    total = nm_group_cost(costs, n, m)
    threshold = float(total.flatten().sort().values[total.numel() // 2])
    previous = nm_select(costs, n, m, threshold=threshold / 2)
    assert previous.any() and not previous.all()
    costs.weight[previous] = 0.0
    costs.weight[:, ::3] = 0.0  # zeros that were not pruned must not take the place of those that were
    pruned, total = group_reference(costs, n, m, previous)
    for ties, limit in itertools.product([False, True], [0.0, threshold]):
        chosen = (total <= limit) if ties else (total < limit)
        chosen |= previous.unflatten(1, (-1, m)).any(dim=-1)
        expected = pruned & chosen.repeat_interleave(m, dim=1)
        assert torch.equal(nm_select(costs, n, m, previous=previous, threshold=limit, ties=ties), expected)
        assert bool((expected | ~previous).all())


def test_empty_and_invalid():
    for shape in [(0, 8), (5, 0)]:
        assert nm_select(problem(*shape), 2, 4).shape == shape
    for spoil in ("weight", "g", "a"):
        for columns, value in itertools.product((64, 68), (float("nan"), -1.0)):
            if spoil == "weight" and value == -1.0:
                continue
            costs = problem(40, columns)
            getattr(costs, spoil).view(-1)[-1] = value
            for function in (nm_select, nm_group_cost, nm_prune):
                with pytest.raises(ValueError, match="NaN or negative"):
                    function(costs, 2, 4)
            for pattern in (None, (2, 4)):
                with pytest.raises(ValueError, match="NaN or negative"):
                    k_cheapest([costs], 3, pattern=pattern)
    with pytest.raises(ValueError, match="NaN"):
        nm_select(torch.full((2, 4), float("nan"), device="cuda"), 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8), (8, 16), (3, 5)])
@pytest.mark.parametrize("view", ["contiguous", "bias column", "misaligned"])
def test_histograms_are_the_reference(dtype, pattern, view):
    m = pattern[1] if pattern else 16
    layers = [problem(*shape, dtype, seed=i, view=view) for i, shape in enumerate([(70, 8 * m), (1, m), (300, 33 * m)])]
    layers.insert(1, problem(0, m, dtype))
    values = [module._dense(layer, pattern, 1) for layer in layers]
    middle = int(values[-1].median().view(torch.int32))
    for (low, shift), step in itertools.product([(0, 20), (middle - 5000, 9), (middle - 7, 0)], (1, 64)):
        window = module._Window(low, shift)
        expected = torch.stack(
            [module._histogram_reference(module._dense(layer, pattern, step), window) for layer in layers]
        )
        each = torch.cat([module._histogram(layer, pattern, window, step) for layer in layers])
        assert torch.equal(each, expected)
        for batch in module._batches(layers, pattern):
            if batch.operands is not None:
                for _ in range(2):
                    together = module._kernel(batch.operands, pattern, window, step)
                    assert torch.equal(together, expected[batch.layers])


def on_cpu(layers):
    return [WeightCosts(*(tensor.cpu() for tensor in layer)) for layer in layers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", [None, (2, 4), (8, 16), (3, 5)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_k_cheapest_are_those_of_the_cpu(dtype, pattern, ties, monkeypatch):
    m = pattern[1] if pattern else 1
    shapes = [(70, 16 * 15), (64, 16 * 5), (90, 240)]
    layers = [problem(*shape, dtype, seed=i, ties=ties) for i, shape in enumerate(shapes)]
    size = [layer.weight.numel() // m for layer in layers]
    limits = [size[0], size[1] // 4, size[2]]
    for sampled_from in (1, 1 << 26):
        monkeypatch.setattr(module, "_SAMPLED_FROM", sampled_from)
        previous = None
        for k in (sum(size) // 3, sum(limits) - 5, sum(limits)):
            before = None if previous is None else [mask.cpu() for mask in previous]
            threshold, masks = k_cheapest(layers, k, pattern=pattern, previous=previous, at_most=limits)
            expected = k_cheapest(on_cpu(layers), k, pattern=pattern, previous=before, at_most=limits)
            assert threshold == expected[0]
            assert all(map(torch.equal, (mask.cpu() for mask in masks), expected[1]))
            assert sum(module._count(mask, pattern) for mask in masks) == k
            previous = masks
            layers = [
                WeightCosts(layer.weight.masked_fill(mask, 0.0), *layer[1:])
                for layer, mask in zip(layers, masks, strict=True)
            ]


def test_weights_in_main_memory_are_selected_on_the_device_of_their_factors():
    layers = [problem(64, 96, seed=i) for i in range(3)]
    mixed = [WeightCosts(layers[0].weight.cpu(), *layers[0][1:]), *layers[1:]]
    for pattern in (None, (2, 4)):
        threshold, masks = k_cheapest(layers, 1000, pattern=pattern)
        other, moved = k_cheapest(mixed, 1000, pattern=pattern)
        assert threshold == other and moved[0].device.type == "cpu"
        assert all(torch.equal(mask.cpu(), copy.cpu()) for mask, copy in zip(masks, moved, strict=True))
        out = [torch.zeros_like(mask, device="cpu").pin_memory() for mask in masks]
        _, written = k_cheapest(mixed, 1000, pattern=pattern, previous=out, out=out)
        torch.cuda.synchronize()
        assert all(ours is theirs for ours, theirs in zip(written, out, strict=True))
        assert all(torch.equal(mask.cpu(), copy) for mask, copy in zip(masks, out, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_devices():
    layers = [problem(64, 96, seed=i) for i in range(4)]
    spread = [WeightCosts(*(tensor.to(f"cuda:{i % 2}") for tensor in layer)) for i, layer in enumerate(layers)]
    for pattern in (None, (2, 4)):
        threshold, masks = k_cheapest(layers, 1500, pattern=pattern)
        other, moved = k_cheapest(spread, 1500, pattern=pattern)
        assert threshold == other and [mask.get_device() for mask in moved] == [0, 1, 0, 1]
        assert all(torch.equal(mask, copy.to(mask.device)) for mask, copy in zip(masks, moved, strict=True))


def test_more_than_2_to_the_31_weights_in_one_matrix():
    weight = torch.ones(70000, 32768, dtype=torch.bfloat16, device="cuda")
    assert weight.numel() > 1 << 31
    weight[-1, -3:] = weight[40000, 7] = 0.5
    weight[65535, -1] = 0.0
    costs = WeightCosts(weight, torch.ones(70000, device="cuda"), torch.ones(32768, device="cuda"))
    threshold, (mask,) = k_cheapest([costs], 5)
    assert threshold == 0.125
    assert mask.nonzero().tolist() == [[40000, 7], [65535, 32767], [69999, 32765], [69999, 32766], [69999, 32767]]
    threshold, (mask,) = k_cheapest([costs], weight.numel() - 2)
    assert threshold == 0.5 and int(mask.sum()) == weight.numel() - 2
    assert (~mask).nonzero().tolist() == [[69999, 32763], [69999, 32764]]
    del mask
    total = nm_group_cost(costs, 2, 4)
    assert total[40000, 1] == 0.625 and total[65535, -1] == 0.5 and total[69999, -1] == 0.25
    assert total.sum(dtype=torch.float64) == total.numel() - 0.375 - 0.5 - 0.75


def test_ops_pass_opcheck():
    costs = problem(32, 64)
    previous = torch.zeros(32, 64, dtype=torch.bool, device="cuda")
    nm_select(costs, 2, 4), k_cheapest([costs], 5)  # registers the fake kernels
    ops = torch.ops.surgeon_kernels
    invalid = torch.zeros((), dtype=torch.bool, device="cuda")
    torch.library.opcheck(ops.nm_select.default, (*costs, 2, 4, previous, 0.5, True, invalid))
    torch.library.opcheck(ops.nm_select.default, (costs.dense(), None, None, 3, 8, None, 0.5, False, invalid))
    torch.library.opcheck(ops.nm_group_cost.default, (*costs, 2, 4, invalid))
    torch.library.opcheck(ops.nm_prune.default, (*costs, 2, 4, invalid))
    torch.library.opcheck(ops.cost_mask.default, (*costs, 0.5, True))
    lists = tuple([operand] for operand in costs)
    torch.library.opcheck(ops.cost_histogram.default, (*lists, 2, 4, 0, 20, 2048, 1))


def test_compiled_by_torch():
    costs = problem(32, 64)
    nm_select(costs, 2, 4)

    def prune(weight, g, a):
        invalid = torch.zeros((), dtype=torch.bool, device="cuda")
        return torch.ops.surgeon_kernels.nm_prune(weight * 2, g, a, 2, 4, invalid) + 1

    assert torch.equal(torch.compile(prune, fullgraph=True, backend="aot_eager")(*costs), prune(*costs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_of_the_smallest_are_those_of_the_cpu(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    cost = torch.randn(300, 4001, generator=generator, device="cuda", dtype=dtype)
    cost[:, ::3] = cost[:, ::3].round()  # ties, and both zeros
    cost[0, :9], cost[1, :9] = float("inf"), -float("inf")
    for k in (0, 1, 9, 600_000, cost.numel() - 3, cost.numel()):
        mask = smallest_mask(cost.T, torch.tensor(k, device="cuda"))
        assert torch.equal(mask.cpu(), k_smallest([cost.T.cpu()], k)[1][0])
