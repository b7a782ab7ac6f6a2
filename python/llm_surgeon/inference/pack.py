"""A model's linears between dense, packed and torch's own sparse class, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import InputError
from llm_surgeon.formats.packed_2_4 import Surgeon24Config
from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.models.wrappers import check_bare, unwrapped
from surgeon_kernels import is_2_4

if TYPE_CHECKING:  # it would bring transformers' models, which bring this: see _registration.py
    from transformers import PreTrainedModel


def pack_model(
    model: Any,
    progress: Callable[[int, int, str], None] = lambda done, total, layer: None,
    keep_dense: Collection[str] = (),
) -> Surgeon24Config:
    """Replace every linear layer whose weight is 2:4 by a :class:`PackedLinear`; the model's config says so.

    ``nn.Linear`` and transformers' ``Conv1D`` are considered, wherever they are, but no weight that is shared with
    another module (an output head tied to the embeddings).

    Args:
        progress: called as ``progress(layers_done, layers, layer)``.
        keep_dense: names of linear layers that are not considered.

    Returns:
        The config entry: which layers are packed, and which are not.

    Raises:
        InputError: the model is quantized or packed already, holds an adapter, or no layer is 2:4; nothing was changed.
        NumericalError: a tensor holds NaN or infinity; nothing was changed.
    """
    model = unwrapped(model)
    check_bare(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"{type(model).__name__} is quantized or packed already: pack the dense model")
    from llm_surgeon.models.decoder import check_finite  # brings transformers' models, which bring this

    check_finite(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    packable: list[str] = []
    ignored: list[str] = []
    for name, linear in _dense_linears(model):
        considered = uses[id(linear.weight)] == 1 and name not in keep_dense
        (packable if considered and is_2_4(matrix_of(linear)) else ignored).append(name)
    if not packable:
        raise InputError(
            "the model has no 2:4 weight to pack: prune it first, with surgeon prune --structure 2:4 (the default)"
        )
    config = Surgeon24Config(packable, ignored)
    for done, name in enumerate(packable):
        progress(done, len(packable), name)
        linear = model.get_submodule(name)
        packed = PackedLinear.from_dense(matrix_of(linear), linear.bias)
        packed.replaces = type(linear)
        model.set_submodule(name, packed.train(linear.training))
    model.config.quantization_config = config
    return config


def unpack_model(model: Any) -> None:
    """Replace every :class:`PackedLinear` by the layer it was packed from, zeros included."""
    model = unwrapped(model)
    for name, packed in packed_linears(model):
        weight = packed.weight
        linear = _conv1d(weight, packed.bias) if packed.replaces is Conv1D else _linear(weight, packed.bias)
        model.set_submodule(name, linear.train(packed.training))
    if isinstance(getattr(model.config, "quantization_config", None), Surgeon24Config):
        del model.config.quantization_config


def use_cusparselt(model: PreTrainedModel) -> list[str]:
    """Let NVIDIA's cuSPARSELt multiply where it is faster, from 1024 tokens on (other than Hopper GPUs: from 256 on, an
    estimate): long prompts.

    The library has a form of its own for the weights, which are kept in both: together 9/8 of the dense bytes. Layers
    with a bias, of sizes not divisible by 16, or without a kernel stay as they are. In a CUDA graph it multiplies
    numbers of tokens that ran before the capture.

    Returns:
        The names of the layers prepared.

    Raises:
        ValueError: the library is not there.
    """
    names = []
    for name, packed in packed_linears(model):
        if packed.fragments is not None and packed.bias is None and not any(side % 16 for side in _shape(packed)):
            packed.compress()
            names.append(name)
    return names


def to_torch_sparse(model: Any) -> list[str]:
    """Give every 2:4 linear, packed or dense, a weight of torch's ``SparseSemiStructuredTensor`` (cuSPARSELt).

    Such a model runs without this package but cannot be saved as safetensors. Layers of a shape that cuSPARSELt does
    not take become or stay dense.

    Returns:
        The names of the layers converted.

    Raises:
        InputError: a weight is not on a CUDA device, or not in float16 or bfloat16, or no layer can be converted;
            nothing was changed.
    """
    model = unwrapped(model)
    check_bare(model)
    linears: dict[str, nn.Module] = dict(packed_linears(model))
    linears |= {name: module for name, module in _dense_linears(model) if is_2_4(matrix_of(module))}
    for name, module in linears.items():
        stored = module.packed.values if isinstance(module, PackedLinear) else matrix_of(module)
        if not stored.is_cuda or stored.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(
                f"torch's 2:4 class needs float16 or bfloat16 on a CUDA device: {name} is {stored.dtype} "
                f"on {stored.device}"
            )
    # cuSPARSELt takes matrices of which both sides are divisible by 16.
    names = [name for name, module in linears.items() if not any(side % 16 for side in _shape(module))]
    if not names:
        raise InputError("the model has no 2:4 weight of a shape that torch's 2:4 class takes")
    for name in names:
        sparse = SparseSemiStructuredTensorCUSPARSELT.from_dense(matrix_of(linears[name]).contiguous())
        model.set_submodule(name, _linear(sparse, linears[name].bias).train(linears[name].training))
    unpack_model(model)
    return names


def _dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D))


def packed_linears(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def matrix_of(linear: nn.Module) -> Tensor:
    """``W`` ``[R, C]`` of a dense or packed layer."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _shape(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, PackedLinear):
        return linear.out_features, linear.in_features
    R, C = matrix_of(linear).shape
    return R, C


def _linear(weight: Tensor, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight.layout == torch.strided)
    linear.bias = bias
    return linear


def _conv1d(weight: Tensor, bias: Any) -> nn.Module:
    linear = Conv1D(0, 0)
    linear.nf, linear.nx = weight.shape
    linear.weight, linear.bias = nn.Parameter(weight.T.contiguous()), bias
    return linear
