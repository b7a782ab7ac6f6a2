"""Definitions of ops: the implementation on a CPU, and results without data for tracing."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from surgeon_kernels.runtime.ops import define

CUDA_ONLY = ["nm_select", "nm_group_cost", "nm_prune", "cost_histogram", "cost_mask", "chunked_sequence_"]


def test_an_op_runs_on_a_cpu_and_is_traced():
    define(
        "defined_by_a_test(Tensor x, int times, Tensor? bias=None) -> Tensor",
        fake=lambda x, *_: x.new_empty(x.shape),
        cpu=lambda x, times, bias=None: times * x if bias is None else times * x + bias,
    )
    op, x = torch.ops.surgeon_kernels.defined_by_a_test, torch.arange(3.0)
    assert op(x, 2).tolist() == [0.0, 2.0, 4.0] and op(x, 2, bias=x).tolist() == [0.0, 3.0, 6.0]
    with FakeTensorMode() as mode:
        traced = op(mode.from_tensor(x), 2)
    assert traced.shape == (3,) and traced.dtype == torch.float32
    torch.library.opcheck(op.default, (x, 2, x))


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_an_op_without_an_implementation_says_so(name):
    op = getattr(torch.ops.surgeon_kernels, name).default
    kinds = {"Tensor": torch.ones(2, 2), "List[Tensor]": [torch.ones(2, 2)], "int": 2, "float": 1.0, "bool": True}
    types = [str(argument.type).replace("Optional[Tensor]", "Tensor") for argument in op._schema.arguments]
    with pytest.raises(NotImplementedError, match=f"surgeon_kernels::{name}.*'CPU' backend"):
        op(*map(kinds.__getitem__, types))
