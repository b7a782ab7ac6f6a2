"""Within a layer's selection and update the host does not wait for the GPU: it runs ahead, and the GPU stays busy."""

import collections
import traceback
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_surgeon import prune
from llm_surgeon.methods.swaps import solve_with_swaps
from llm_surgeon.progress import Progress
from surgeon_kernels.runtime import extension

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
TOKENS = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
# In it the joint solver asks how far it has come, to decide whether to go on.
SOLVER = solve_with_swaps.__name__


class Phases(Progress):
    current = ""

    def phase(self, name):
        self.current = name


def waits(blocks, structure):
    """Number of times the host waited for the device in each phase of a shot, but for the solver's own questions."""
    config = LlamaConfig(vocab_size=512, num_hidden_layers=blocks, max_position_embeddings=64, **SIZES)
    model, phases, counts = LlamaForCausalLM(config).bfloat16().cuda(), Phases(), collections.Counter()

    def count(message, *_, **__):
        if "synchronizing" in str(message) and SOLVER not in {frame.name for frame in traceback.extract_stack()}:
            counts[phases.current] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            # A layer that would lose more than min_kept allows has a threshold of its own, which is waited for.
            prune(model, TOKENS, structure=structure, update="joint", shots=1, min_kept=0.0, progress=phases)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counts


@pytest.mark.parametrize("structure", ["2:4", "unstructured", "rows-columns"])
def test_more_layers_do_not_mean_more_waiting(structure):
    if not extension.available():
        pytest.skip("without the extension, the references check costs layer by layer")
    few, many = waits(1, structure), waits(3, structure)
    assert few["selection"] > 0  # they are counted at all
    for phase in ("selection", "update"):
        assert many[phase] < few[phase] + 14  # there are 14 layers more
