"""Selection of a model's weights on a CUDA device: kernels and references choose the same, weight for weight."""

import pytest
import torch

from llm_surgeon import prune
from llm_surgeon.config.methods import method
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.costs import element_costs
from llm_surgeon.methods.select import select_elements
from llm_surgeon.models.decoder import find_decoder
from surgeon_kernels.runtime import extension
from tests.surgeon.tiny_models import VOCABULARY, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def without_kernels(patch):
    patch.setattr(extension, "available", lambda device=None: False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
@pytest.mark.parametrize("chosen_by", ["surgeon", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_choose_what_the_references_choose(name, structure, chosen_by, dtype, monkeypatch):
    assert extension.available(), extension.obstacle()
    model = build(name, dtype).cuda()
    decoder = find_decoder(model)
    windows = Calibration.of(torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0)))
    config = PruneConfig(structure=structure, method=chosen_by, sparsity=0.5)
    curvature = estimate_curvature(model, decoder, windows, batch_size=3)
    factors = DampedFactors(curvature, config, decoder.linears, CUDA)
    previous = [torch.zeros(x.rows, x.columns, dtype=torch.bool, device=CUDA) for x in decoder.linears]
    for sparsity in (0.2, 0.35, 0.5):
        costs = [element_costs(linear, method(chosen_by), factors) for linear in decoder.linears]
        chosen, threshold = select_elements(costs, previous, config, sparsity)
        with monkeypatch.context() as patch:
            without_kernels(patch)
            expected, other = select_elements(costs, previous, config, sparsity)
        assert threshold == other
        previous = [selection.pruned for selection in chosen]
        assert all(torch.equal(a, b.pruned) for a, b in zip(previous, expected, strict=True))
        assert sum(int(mask.sum()) for mask in previous) > 0
        for linear, mask in zip(decoder.linears, previous, strict=True):
            linear.weight[mask] = 0.0


@pytest.mark.parametrize(
    "name, structure, update",
    [
        ("llama", "2:4", "chunked"),
        ("llama", "unstructured", "joint"),
        ("opt", "2:4", "joint"),
        ("opt", "unstructured", "chunked"),
    ],
)
def test_a_model_pruned_through_kernels_is_the_one_pruned_through_references(name, structure, update, monkeypatch):
    tokens = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))

    def pruned():
        model = build(name).cuda()
        prune(model, tokens, structure=structure, sparsity=0.5, shots=1, update=update)
        return [linear.weight.clone() for linear in find_decoder(model).linears]

    actual = pruned()
    with monkeypatch.context() as patch:
        without_kernels(patch)
        expected = pruned()
    for weight, other in zip(actual, expected, strict=True):
        assert torch.equal(weight == 0.0, other == 0.0)
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert sum(int((weight == 0.0).sum()) for weight in actual) == sum(weight.numel() for weight in actual) // 2
