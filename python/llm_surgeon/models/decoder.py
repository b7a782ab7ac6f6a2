"""Find the prunable linear layers of a causal language model by structure, not by the architecture's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.distributed import Ranks
from llm_surgeon.errors import InputError, NumericalError, UnsupportedModelError
from llm_surgeon.models.checks import (
    PROBE_SHAPE,
    check_causal,
    check_parameters,
    check_plain,
    check_sharing,
    dotted,
    is_linear,
)
from llm_surgeon.models.passes import evaluation_mode, to_list


@dataclass(frozen=True, eq=False)
class PrunableLinear:
    """One linear layer ``y = W a + b`` of a decoder block, ``W`` ``[R, C]``.

    Attributes:
        name: its name in the model, ``"model.layers.0.self_attn.q_proj"``.
        module: ``nn.Linear``, or transformers' ``Conv1D``, which stores ``Wᵀ``.
        depth: index of its decoder block.
        kind: its name inside the block, ``"self_attn.q_proj"``.
        input_group: name of the first linear to read the very same input tensor; its own name when alone.
    """

    name: str
    module: nn.Module
    depth: int
    kind: str
    input_group: str

    @property
    def rows(self) -> int:
        """Output features R."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """Input features C, the bias not counted."""
        return self.weight.shape[1]

    @property
    def has_bias(self) -> bool:
        return self._bias is not None

    @property
    def weight(self) -> Tensor:
        """``W`` as an ``[R, C]`` view of the module's storage."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    def matrix(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A new tensor ``[W | b]``, ``[R, C + 1]``, or ``W``, ``[R, C]``, without a bias, where the weights are.

        Left out, ``dtype`` is float32, or float64 for float64 weights: that of their curvature.
        """
        weight = self.weight if device is None else self.weight.to(device, non_blocking=True)
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        out = torch.empty(self._matrix_shape, dtype=dtype, device=weight.device)
        out[:, : self.columns] = weight
        if self._bias is not None:
            out[:, -1] = self._bias
        return out

    def write(self, matrix: Tensor) -> None:
        """Copy ``matrix``, shaped as :meth:`matrix` returns it, into the module's parameters and dtype.

        From a GPU to weights in pinned main memory this does not wait for the copy.
        """
        if matrix.shape != self._matrix_shape:
            raise ValueError(f"the matrix of {self.name} is {self._matrix_shape}, not {tuple(matrix.shape)}")
        # Adding zero turns -0.0, whether given or made by rounding to a narrower dtype, into +0.0.
        rounded = matrix.to(self.weight.dtype) + 0.0
        for ours, new in ((self.weight, rounded[:, : self.columns]), (self._bias, rounded[:, -1])):
            if ours is not None:
                ours.copy_(new, non_blocking=new.is_cuda and ours.is_pinned())

    def share(self, ranks: Ranks, owner: int) -> None:
        """Give every rank the weight and the bias that the linear has on ``owner``."""
        for parameter in self.module.parameters(recurse=False):
            ranks.broadcast_(parameter, owner)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        return self.rows, self.columns + self.has_bias

    @property
    def _bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.get_parameter("bias").detach()


@dataclass(frozen=True, eq=False)
class Decoder:
    """The decoder blocks of a model and their linear layers, in execution order."""

    blocks: list[nn.Module]
    linears: list[PrunableLinear]

    @property
    def weights(self) -> int:
        """Number of all weights of the linears, biases not counted."""
        return sum(linear.rows * linear.columns for linear in self.linears)


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the decoder blocks of a causal language model and every linear layer inside them.

    The blocks are the elements of the outermost ``nn.ModuleList`` that holds linear layers (of several, the
    one with most parameters among those that a pass over text runs through). Execution order and shared inputs are
    those of one forward pass over six tokens. Whatever lies outside the blocks (embeddings, the output head, the
    encoders of images and sounds) is not prunable.

    Args:
        model: without wrappers, see :func:`~llm_surgeon.models.wrappers.unwrapped`.

    Raises:
        UnsupportedModelError: the model is not a decoder-only language model with floating-point weights, or
            a block holds a matrix that would be skipped or cannot be pruned on its own; the message names it.
    """
    check_plain(model)
    prefix, blocks = _find_blocks(model)
    locations = {
        dotted(prefix, depth, kind): (module, depth, kind)
        for depth, block in enumerate(blocks)
        for kind, module in block.named_modules(remove_duplicate=False)
        if is_linear(module)
    }
    modules = {name: module for name, (module, _, _) in locations.items()}
    check_parameters(prefix, blocks, modules)
    check_sharing(model, modules)
    groups = _probe(model, modules)
    return Decoder(blocks, [PrunableLinear(name, *locations[name], group) for name, group in groups.items()])


def check_finite(model: nn.Module) -> None:
    """Raise :class:`NumericalError` naming the first parameter or persistent buffer that holds NaN or infinity.

    Buffers that are made anew as the model is built (masks, rotary frequencies) may hold infinity.
    """
    tensors = [
        (dotted(path, name), tensor.detach())
        for path, module in model.named_modules()
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None and tensor.is_floating_point() and tensor.numel() > 0
        if name not in module._non_persistent_buffers_set
    ]
    # The extremes are NaN where a number is; on a CPU they are found far faster than asking every number.
    finite = [torch.stack(tensor.aminmax()).isfinite().all() for _, tensor in tensors]
    for (name, _), good in zip(tensors, to_list(finite), strict=True):
        if not good:
            raise NumericalError(f"{name} holds NaN or infinity")


def _find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and elements of the outermost module list that holds linears, the one with most parameters."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and any(is_linear(child) for child in module.modules())
            and not any(name.startswith(f"{outer}.") for outer in outermost)
        ):
            outermost[name] = module
    if not outermost:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder blocks that hold linear layers")
    names = _that_run(model, outermost) if len(outermost) > 1 else list(outermost)
    name = max(names or outermost, key=lambda name: sum(p.numel() for p in outermost[name].parameters()))
    return name, list(outermost[name])


def _that_run(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """Names of the module lists of which a pass over text runs a part: not a vision tower, say."""
    ran: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.setdefault(name))
        for name, children in lists.items()
        for module in children
    ]
    _run_once(model, hooks)
    return list(ran)


def _run_once(model: PreTrainedModel, hooks: list[RemovableHandle]) -> None:
    """One pass over a few tokens with ``hooks``, which are removed then."""
    try:
        with evaluation_mode(model):
            check_causal(model)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _probe(model: PreTrainedModel, linears: dict[str, nn.Module]) -> dict[str, str]:
    """The input group of every linear, in execution order, from one forward pass over a few tokens."""
    groups: dict[str, str] = {}
    readers: dict[tuple[int, int], str] = {}
    held: list[Tensor] = []  # inputs are kept alive, so that an id stands for one tensor throughout the pass

    def record(name: str, x: Tensor, y: object) -> None:
        if name in groups:
            raise UnsupportedModelError(f"{name} runs more than once per forward pass: reused layers are not supported")
        if x.shape[:-1] not in (PROBE_SHAPE, (PROBE_SHAPE[0] * PROBE_SHAPE[1],)):
            raise UnsupportedModelError(f"{name} does not read one vector per token: its input is {list(x.shape)}")
        if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
            raise UnsupportedModelError(f"{name} does not return one vector per token")
        held.append(x)
        # The version tells a tensor from the same tensor changed in place since.
        groups[name] = readers.setdefault((id(x), x._version), name)

    hooks = [
        linear.register_forward_hook(lambda _, args, y, name=name: record(name, args[0], y))
        for name, linear in linears.items()
    ]
    _run_once(model, hooks)
    for name in linears:
        if name not in groups:
            raise UnsupportedModelError(f"{name} does not run in a forward pass: it cannot be pruned")
    return groups


def check_rank(decoder: Decoder, rank: int, name: str) -> None:
    """Refuse a rank, the option ``name``, that no layer can have: it is only a slip, and takes any amount of memory."""
    most = max(min(linear.rows, linear.columns) for linear in decoder.linears)
    if rank > most:
        raise InputError(f"{name} {rank} is more than the rank of every layer, at most {most}")
