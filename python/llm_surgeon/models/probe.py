"""Run one decoder block with its linear layers replaced by stubs, to see which of their outputs reach which inputs.

What lies between the linears (activations, attention, norms, rotary embeddings) is the model's own code. As no matrix
is multiplied, thousands of perturbed outputs cost little at any size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.passes import evaluation_mode

# Tokens of a probe: with eight, an output hidden behind a closed ReLU gate at every one of them is rare, and two draws
# are made.
TOKENS = 8
_DRAWS = 2
# Numbers held by the linears of one batch of perturbed runs.
_CPU_BUDGET, _GPU_BUDGET = 2**23, 2**27
# Relative: parts of some models compute in float32 whatever their dtype.
TOLERANCE = 1e-5


class Stub(nn.Module):
    """Stands for a linear: returns what it is told to and remembers its input as ``[batch, TOKENS, columns]``."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.weight = torch.empty(0, dtype=torch.float64)  # some modules look at its dtype
        self.output = self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().reshape(-1, TOKENS, x.shape[-1])
        # A tensor of its own: some models add to what a linear returns in place.
        return self.output.expand(len(self.seen), -1, -1).reshape(*x.shape[:-1], -1).clone()


class StubbedBlock:
    """A copy of a decoder block in float64 whose linears are stubs.

    Attributes:
        block: the copy; stubs: by name inside the block.
    """

    def __init__(self, block: nn.Module, linears: Sequence[PrunableLinear], inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.stubs = {linear.kind: Stub(linear.rows, linear.columns) for linear in linears}
        memo = {id(linear.module): self.stubs[linear.kind] for linear in linears}
        self.block = copy.deepcopy(block, memo).double().eval()

    def run(self, outputs: Mapping[str, Tensor], hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Every linear's input ``[batch, TOKENS, columns]`` and the block's own output, for given linear outputs."""
        for kind, stub in self.stubs.items():
            stub.output = outputs[kind]
        batch = max(len(hidden), *(len(output) for output in outputs.values()))
        inputs = {key: _expand(value, batch) for key, value in self.inputs.items()}
        try:
            with torch.no_grad(), _AttentionOfHeads():
                out = self.block(hidden.expand(batch, -1, -1).clone(), **inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model's own code makes of such a batch
            raise UnsupportedModelError(
                f"a {type(self.block).__name__} cannot be probed on its own: structured pruning of this architecture "
                "is not supported"
            ) from error
        out = out[0] if isinstance(out, tuple) else out
        return {kind: stub.seen for kind, stub in self.stubs.items()}, out


class _AttentionOfHeads(TorchFunctionMode):
    """Refuses attention of no heads, which a wrong guess of sizes asks for: some versions of PyTorch divide by zero."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, Tensor) and not tensor.numel():
                    raise ValueError(f"attention of no heads: {list(tensor.shape)}")
        return function(*args, **kwargs)


def capture_inputs(model: PreTrainedModel, block: nn.Module, *, padded: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states ``[1, TOKENS, width]`` and the other arguments that ``block`` gets in a forward pass.

    With ``padded`` the first tokens are padding, so that there is an attention mask.
    """
    return capture_all_inputs(model, [block], padded=padded)[0]


def capture_all_inputs(
    model: PreTrainedModel, blocks: Sequence[nn.Module], *, padded: bool = False
) -> list[tuple[Tensor, dict[str, Any]]]:
    """:func:`capture_inputs` of several blocks, from one forward pass."""
    found: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}
    # Of those whose weights are streamed the signature is that of the class.
    names = {block: list(inspect.signature(type(block).forward).parameters)[1:] for block in blocks}

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names[block], args, strict=False)) | kwargs
        if "hidden_states" not in named:
            raise UnsupportedModelError(
                f"a {type(block).__name__} takes no hidden_states: structured pruning of this architecture is not "
                "supported"
            )
        hidden = named.pop("hidden_states")
        found[block] = hidden.detach().double(), {key: _double(value) for key, value in named.items()}
        if len(found) == len(blocks):
            raise _Captured

    embedding = model.get_input_embeddings().weight
    ids = torch.arange(TOKENS, device=embedding.device)[None] % embedding.shape[0]
    mask = torch.ones_like(ids)
    mask[:, : TOKENS // 4] = 0
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(input_ids=ids, attention_mask=mask if padded else None, use_cache=False)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for block in blocks:
        if block not in found:
            raise UnsupportedModelError(f"a {type(block).__name__} does not run in a forward pass: it cannot be pruned")
    return [found[block] for block in blocks]


def random_outputs(linears: Sequence[PrunableLinear], seed: int, device: torch.device) -> dict[str, Tensor]:
    """Outputs ``[1, TOKENS, rows]`` of either sign, none near zero."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {}
    for linear in linears:
        draw = torch.rand(2, 1, TOKENS, linear.rows, generator=generator, dtype=torch.float64)
        outputs[linear.kind] = ((0.5 + draw[0]) * (draw[1] < 0.5).double().mul(2.0).sub(1.0)).to(device)
    return outputs


class Dependencies:
    """Dependencies of the inputs (columns) of a block's linears on their outputs (rows), direct ones alone.

    Attributes:
        reaches: (producer, consumer) -> bool ``[rows, columns]``, for the pairs with any such connection, over the
            columns that do not read the residual stream.
        residual_rows: producer -> bool ``[rows]``: reaches the block's output or a column that reads the residual.
        residual_columns: consumer -> bool ``[columns]``: depends on the block's input.
    """

    def __init__(self, block: StubbedBlock, linears: Sequence[PrunableLinear], hidden: Tensor) -> None:
        self._block, self._linears = block, linears
        device = hidden.device
        self.reaches: dict[tuple[str, str], Tensor] = {}
        self.residual_rows = {x.kind: torch.zeros(x.rows, dtype=torch.bool, device=device) for x in linears}
        self.residual_columns = {x.kind: torch.zeros(x.columns, dtype=torch.bool, device=device) for x in linears}
        width = sum(linear.rows + linear.columns for linear in linears)
        budget = _GPU_BUDGET if device.type == "cuda" else _CPU_BUDGET
        self._batch = max(1, budget // (TOKENS * width))
        for seed in range(_DRAWS):
            outputs = random_outputs(linears, seed, device)
            seen, _ = block.run(outputs, torch.cat([hidden, -2.0 * hidden]))
            for kind, x in seen.items():
                self.residual_columns[kind] |= _changed(x)[0]
            for linear in linears:
                for rows in torch.arange(linear.rows, device=device).split(self._batch):
                    self._perturb(linear.kind, rows, outputs, hidden)

    def _perturb(self, producer: str, rows: Tensor, outputs: Mapping[str, Tensor], hidden: Tensor) -> None:
        """Change one output of ``producer`` in each of a batch of runs; the first run is left as it is."""
        base = outputs[producer]
        varied = base.repeat(len(rows) + 1, 1, 1)
        run = torch.arange(len(rows), device=rows.device)
        # Of the two values one is positive, so that a ReLU shows the change.
        varied[run + 1, :, rows] = -2.0 * base[0][:, rows].T
        seen, out = self._block.run({**outputs, producer: varied}, hidden)
        self.residual_rows[producer][rows] |= _changed(out.reshape(len(rows) + 1, -1, out.shape[-1])).any(dim=1)
        for consumer, x in seen.items():
            changed = _changed(x)
            self.residual_rows[producer][rows] |= (changed & self.residual_columns[consumer]).any(dim=1)
            changed &= ~self.residual_columns[consumer]
            if changed.any():
                size = (base.shape[-1], x.shape[-1])
                found = self.reaches.setdefault((producer, consumer), changed.new_zeros(size))
                found[rows] |= changed


def agree(x: Tensor, y: Tensor) -> bool:
    """Equal shapes and values, up to the rounding of a few float32 operations."""
    return x.shape == y.shape and bool((x - y).abs().max() <= TOLERANCE * y.abs().max().clamp_min(1e-6))


def _changed(x: Tensor) -> Tensor:
    """Inputs at which runs 1.. of ``x`` ``[batch, TOKENS, n]`` differ from run 0, bool ``[batch - 1, n]``."""
    return (x[1:] - x[:1]).abs().amax(dim=1) > TOLERANCE * x[0].abs().max().clamp_min(1e-6)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_double(item) for item in value)
    return value


def _expand(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value.expand(batch, *value.shape[1:]) if value.dim() > 1 and len(value) == 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_expand(item, batch) for item in value)
    return value


class _Captured(Exception):
    """Ends a forward pass once a block's inputs are known."""
