from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which can be imported without a GPU")

from triton.tools.tensor_descriptor import TensorDescriptor

from surgeon_kernels.gram import gram_triton
from surgeon_kernels.gram.plan import CONFIGS


def test_a_descriptor_is_what_its_constructor_makes():
    x = torch.zeros(64, 128, dtype=torch.float16)
    arguments = [64, 128], [128, 1], [32, 64]
    made, checked = gram_triton._descriptor(x, *arguments), TensorDescriptor(x, *arguments)
    assert gram_triton._PLAIN and type(made) is TensorDescriptor
    for name in TensorDescriptor.__dataclass_fields__:
        assert getattr(made, name) is getattr(checked, name) or getattr(made, name) == getattr(checked, name), name


@pytest.mark.parametrize("other", [type("Other", (), {}), type("Slots", (TensorDescriptor,), {"__slots__": ()})])
def test_a_descriptor_of_another_make_is_built_by_its_constructor(other, monkeypatch):
    assert not gram_triton._is_plain(other)
    monkeypatch.setattr(gram_triton, "_PLAIN", False)
    with pytest.raises(AssertionError, match="contiguous"):
        gram_triton._descriptor(torch.zeros(64, 128), [64, 128], [128, 2], [32, 64])


CPU = torch.device("cpu")
CONFIG = CONFIGS[9, torch.bfloat16][1]


def test_a_plan_serves_all_numbers_of_tokens_of_as_many_steps():
    plans = [gram_triton.plan(2048, tokens, torch.bfloat16, True, CONFIG, CPU) for tokens in (65, 100, 128, 129)]
    assert plans[0] is plans[1] is plans[2] is not plans[3]


def test_what_a_graph_was_captured_with_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(gram_triton, "_captured", {})
    on_gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(gram_triton, "_plan", lambda *arguments: gram_triton.Plan(*[None] * 10))
    made = gram_triton.plan(2048, 64, torch.bfloat16, True, CONFIG, on_gpu)
    assert list(gram_triton._captured.values()) == [made]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gram_triton.plan(2048, 64, torch.bfloat16, True, CONFIG, on_gpu)
    assert len(gram_triton._captured) == 1
