"""Memory of a run: what stays on the device, what each phase takes beside it, and what lies in main memory."""

from __future__ import annotations

import torch
from torch import nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.loss import CHUNK
from llm_surgeon.models.offload import compute_device
from llm_surgeon.planning.activations import measure_activations
from llm_surgeon.resources import available_memory
from surgeon_kernels import SymmetricAccumulator

_FLOAT = 4  # bytes of the float32 that factors, costs and updates are computed in
# Matrices of a layer's shape that the joint solver holds: the weight, the mask, and at most 12.6 more at any shape
# (`workspace_matrices` of bench/kernels/joint_update.py; tests/surgeon/planning/test_memory_gpu.py).
SOLVER_MATRICES = 14
# Those of a solution that waits for the next one, to be swapped for it: Δ, G Δ A and costs.
_SOLUTION_MATRICES = 3
# Linears that share an input, of which a sequential update holds moments and a target.
_STAGE_MATRICES = 4
# Gradients of a block's widest layer that are alive at once in its backward pass.
_BACKWARD_COPIES = 3
# Blocks whose weights are on the device at once when they are streamed: the last, the present and the next one.
_STREAMED_BLOCKS = 3
# Share of the memory that is left free: what allocators waste between tensors, and libraries' own workspaces.
_SLACK = 0.08


class Memory:
    """Bytes that a run of ``config`` takes.

    Attributes:
        device: where everything is computed.
        sizes: ``(R, C')`` of every linear, C' = C + 1 with a bias; factor_sizes: see :func:`factor_sizes`.
        gradients, factored: whether gradients, and Kronecker factors at all, are needed.
        hosted: whether factors lie in main memory between the passes over the data and the layers' turns.
        streamed: whether weights are streamed to the device block by block.
        checkpointed: whether activations are computed again in the backward pass.
        width: of the hidden states.
        blocks: bytes of every block's parameters.
        snapshot: of a copy of the linears' weights.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, config: PruneConfig) -> None:
        self.config, self.seqlen = config, config.seqlen
        self.model = model
        self.device = compute_device(model, config)
        self.on_gpu = self.device.type == "cuda"
        self.method = config.method_record
        self.gradients, self.factored = self.method.gradients, self.method.needs != "nothing"
        self.offload = config.offloads
        self.streamed = self.offload and self.on_gpu
        self.hosted = self.factored and self.on_gpu and (self.offload or config.curvature_layers is not None)
        self.checkpointed = self.gradients and (config.checkpoint_activations or self.offload)
        self.sizes = [(linear.rows, linear.columns + linear.has_bias) for linear in decoder.linears]
        self.weights = decoder.weights
        self.vocabulary, self.width = model.get_output_embeddings().weight.shape  # type: ignore[operator]
        self.itemsize = next(model.parameters()).element_size()
        self.blocks = [sum(p.nbytes for p in block.parameters()) for block in decoder.blocks]
        self.snapshot = self.itemsize * sum(R * C for R, C in self.sizes)
        self.factor_sizes = factor_sizes(decoder, config)
        self.factor_bytes = [_FLOAT * sum(map(SymmetricAccumulator.elements, sizes)) for sizes in self.factor_sizes]
        in_blocks = self.gradients or config.sequential
        self.kept = measure_activations(model, decoder, self.seqlen) if in_blocks else None

    def model_weights(self) -> int:
        """The model's weights on the device; of streamed blocks those that are there at once."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        if self.offload:
            weights += min(sum(self.blocks), _STREAMED_BLOCKS * max(self.blocks)) - sum(self.blocks) * self.on_gpu
        return weights

    def masks(self) -> int:
        """Masks of what is pruned, a byte a weight, where they stay on the device."""
        return 0 if self.streamed else self.weights

    def dense(self) -> int:
        """The dense weights, where later shots, gradient steps or a last fit go back to them, on the device."""
        config = self.config
        copies = config.around_dense_weights + (config.gradient_steps > 0 and config.gradient_target == "dense")
        return 0 if self.streamed else self.snapshot * (copies + config.reconstruct)

    def factors(self) -> int:
        """Packed factors that stay on the device."""
        return 0 if self.hosted else sum(self.factor_bytes)

    def free(self) -> float:
        """Bytes for the phases, beside what stays on the device from the first to the last."""
        return (1 - _SLACK) * self.limit() - self.model_weights() - self.masks() - self.dense() - self.factors()

    def limit(self) -> int:
        """Bytes that the run may have on the device, the model's included."""
        held = sum(p.nbytes for p in self.model.parameters() if p.device == self.device)
        available = available_memory(self.device) + held
        cap = self.config.gpu_memory_bytes
        if cap is None:
            return available
        # The cap is on all that PyTorch takes: what else the process holds there counts against it.
        others = torch.cuda.memory_allocated(self.device) - held if self.on_gpu else 0
        return min(cap - others, available)

    def curvature(self, windows: int, per_pass: int) -> int:
        """A pass: activations, logits and their gradient; also the factors of its blocks where these do not stay."""
        tokens = windows * self.seqlen
        # The loss is computed before the backward pass begins: the larger of the two counts.
        loss = _FLOAT * min(tokens * self.vocabulary, CHUNK) * (1 if self.itemsize >= _FLOAT else 2)
        widest = max(max(R, C) for R, C in self.sizes)
        logits = self.vocabulary * self.itemsize * tokens
        if self.kept is None or not self.gradients:  # forward only: the widest linear's input and output
            activations = int(tokens * self.itemsize * (self.width + 2 * widest)) + logits + loss
        else:
            backward = _BACKWARD_COPIES * widest * self.itemsize * tokens
            if self.checkpointed:  # a block's activations are there only once the loss has been computed
                block = int(tokens * self.kept.largest_block)
                activations = int(tokens * self.kept.inputs) + max(2 * logits + loss, logits + block + backward)
            else:
                activations = int(tokens * self.kept.everything) + 2 * logits + max(loss, backward)
        factors = 0
        if self.hosted:
            starts = range(0, len(self.factor_bytes), per_pass)
            factors = max(sum(self.factor_bytes[first : first + per_pass]) for first in starts)
        return activations + factors

    def selection(self) -> int:
        """Factorisations of the largest layer, and the new masks."""
        masks = 0 if self.streamed else self.weights
        return masks + self._factor_workspace(2)

    def update(self, windows: int) -> int:
        """The largest layer's update; with gradient steps, over passes of ``windows``, all weights' gradients; with a
        sequential update two models' hidden states."""
        return self._layer_update() + self._steps(windows) + self._sweep(windows)

    def inverses(self, windows: int) -> int:
        """All inverses, where the update after passes of ``windows`` needs them and they fit beside what stays."""
        config = self.config
        used = config.update != "none" and (not config.sequential or config.gradient_steps > 0)
        needed = config.structure_record.single_weights and used
        if not self.on_gpu or self.hosted or not needed or config.kron_rank > 1:
            return 0
        inverses = sum(self.factor_bytes)
        working = max(self.selection(), self.update(windows))
        return inverses if inverses + working <= self.free() else 0

    def pinned(self) -> int:
        """Pinned main memory for what is kept there: factors, masks, streamed weights, dense weights."""
        if not self.on_gpu:
            return 0
        pinned = sum(self.factor_bytes) if self.hosted else 0
        if self.offload:
            pinned += self.weights + sum(self.blocks) + self.snapshot * self.config.around_dense_weights
        return pinned

    def host(self) -> int:
        """Main memory that a run on a GPU takes: copies of the weights, or these themselves, and what is offloaded."""
        on_host = self.on_host()
        return (on_host if self.streamed and on_host else self.snapshot) + self.pinned() if self.on_gpu else 0

    def on_host(self) -> int:
        """The model's weights in main memory as they came."""
        return sum(parameter.nbytes for parameter in self.model.parameters() if parameter.device.type == "cpu")

    def _layer_update(self) -> int:
        """The update of the largest layer."""
        largest = max(R * C for R, C in self.sizes)
        if not self.method.compensates:
            return 4 * _FLOAT * largest
        # The factors of a layer, their inverses where weights go singly, and the solver's matrices.
        if not self.config.structure_record.single_weights:
            return self._factor_workspace(1) + _FLOAT * largest * 6
        held = SOLVER_MATRICES + _SOLUTION_MATRICES * bool(self.config.swaps)
        return self._factor_workspace(2) + _FLOAT * largest * held

    def _steps(self, windows: int) -> int:
        """Gradient steps, beyond an update: gradients, or directions and the weights before; activations."""
        if not self.config.gradient_steps:
            return 0
        beyond = max(0, self.curvature(windows, 1) - self._layer_update())
        return max(_FLOAT, 2 * self.itemsize) * self.weights + beyond

    def _sweep(self, windows: int) -> int:
        """Hidden states of both models, a dense block, the linears of a stage and its activations, of a sequential
        update or a last fit."""
        if not self.config.aims_at_dense or self.kept is None:
            return 0
        states = 2 * self.config.samples * self.seqlen * self.width * self.itemsize
        stage = _STAGE_MATRICES * _FLOAT * max(R * C for R, C in self.sizes)
        return states + max(self.blocks) + stage + int(windows * self.seqlen * self.kept.largest_block)

    def _factor_workspace(self, copies: int) -> int:
        """``copies`` of the largest layer's factors, and a factorisation's own workspace."""
        if not self.factored:
            return 0
        squares = [C**2 + self.gradients * R**2 for R, C in self.sizes]
        return _FLOAT * (copies * max(squares) + max(max(R, C) for R, C in self.sizes) ** 2)


def factor_sizes(decoder: Decoder, config: PruneConfig) -> list[list[int]]:
    """Sizes of every block's factors: an A per shared input, as wide as its widest user with a bias, a G per linear."""
    sizes: list[list[int]] = []
    record = config.method_record
    for depth in range(len(decoder.blocks)):
        linears = [linear for linear in decoder.linears if linear.depth == depth and record.needs != "nothing"]
        widths: dict[str, int] = {}
        for linear in linears:
            widths[linear.input_group] = max(linear.columns + linear.has_bias, widths.get(linear.input_group, 0))
        sizes.append([*widths.values(), *(linear.rows for linear in linears if record.gradients)])
    return sizes
