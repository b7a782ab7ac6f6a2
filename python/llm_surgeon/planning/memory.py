"""Memory of a run: what stays on the device, what each phase takes beside it, and what lies in main memory."""

from __future__ import annotations

import torch
from torch import nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.head import plain_head
from llm_surgeon.models.loss import CHUNK
from llm_surgeon.models.offload import compute_device
from llm_surgeon.models.passes import compute_dtype
from llm_surgeon.planning.activations import measure_activations
from llm_surgeon.planning.owners import largest_shares
from llm_surgeon.resources import available_memory
from surgeon_kernels import SymmetricAccumulator

_FLOAT = 4  # bytes of the float32 that factors, costs and updates are computed in
# Matrices of a layer's shape that the joint solver holds: the weight, the mask, and at most 12.6 more at any shape
# (`workspace_matrices` of bench/kernels/joint_update.py; tests/surgeon/planning/test_memory_gpu.py).
SOLVER_MATRICES = 14
# Those of a solution that waits for the next one, to be swapped for it: Δ, G Δ A and costs.
_SOLUTION_MATRICES = 3
# Matrices that a sequential update holds beside those of an update: of an input's size A, X, two inverses and what X
# becomes by one of them, of a layer's E and the target.
_STAGE_SQUARES, _STAGE_MATRICES = 5, 2
# Of an input's size while they are summed: X, and A packed and whole.
_MOMENT_SQUARES = 3
# Gradients of a block's widest layer that are alive at once in its backward pass.
BACKWARD_COPIES = 3
# Chunks of logits, and of what becomes of them, that are there at once where no others are: an estimate.
_CHUNK_COPIES = 5
# Blocks whose weights are on the device at once when they are streamed: the last, the present and the next one.
_STREAMED_BLOCKS = 3
# Share of the memory that is left free: what allocators waste between tensors, and libraries' own workspaces.
SLACK = 0.08


class Memory:
    """Bytes that a run of ``config`` takes.

    Attributes:
        device: where everything is computed.
        sizes: ``(R, C')`` of every linear, C' = C + 1 with a bias; factor_sizes: see :func:`factor_sizes`.
        gradients, factored: whether gradients, and Kronecker factors at all, are needed.
        hosted: whether factors lie in main memory between the passes over the data and the layers' turns.
        streamed: whether weights are streamed to the device block by block.
        checkpointed: whether activations are computed again in the backward pass.
        chunked: whether logits are computed a chunk at a time, see :class:`~llm_surgeon.models.head.HeadLogits`.
        width: of the hidden states.
        blocks: bytes of every block's parameters.
        snapshot: of a copy of the linears' weights.
        late_bytes: of factors that are there in gradient steps alone.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, config: PruneConfig, ranks: Ranks = ALONE) -> None:
        config = config.settled(decoder.weights)
        self.config, self.seqlen = config, config.seqlen
        self.model, self.ranks, self.shares = model, ranks, largest_shares(decoder, config, ranks.count)
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
        self.groups = input_groups(decoder)
        # A of the pruned model, which gradient steps after a sequential update estimate.
        again = config.sequential and bool(config.gradient_steps)
        read = [SymmetricAccumulator.elements(C) for groups in self.groups for C, _ in groups]
        self.late_bytes = _FLOAT * sum(read) * again
        in_blocks = self.gradients or config.sequential
        dtype = compute_dtype(config.compute_dtype, model, self.device)
        self.kept = measure_activations(model, decoder, self.seqlen, dtype) if in_blocks else None
        self.chunked = dtype is not None and plain_head(model) is not None

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
        """Packed factors that stay on the device; of several ranks what one of them owns."""
        return 0 if self.hosted else int(self.shares.factors * sum(self.factor_bytes))

    def free(self) -> float:
        """Bytes for the phases, beside what stays on the device from the first to the last."""
        return (1 - SLACK) * self.limit() - self.model_weights() - self.masks() - self.dense() - self.factors()

    def limit(self) -> int:
        """Bytes that the run may have on the device, the model's included."""
        held = sum(p.nbytes for p in self.model.parameters() if p.device == self.device)
        available = self.ranks.least(available_memory(self.device) + held)
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
        loss, logits = self._loss(tokens), self._logits(tokens)
        widest, itemsize = max(max(R, C) for R, C in self.sizes), self._compute_itemsize()
        if self.kept is None or not self.gradients:  # forward only: the widest linear's input and output
            activations = int(tokens * (self.itemsize * self.width + 2 * itemsize * widest)) + logits + loss
        else:
            backward = BACKWARD_COPIES * widest * itemsize * tokens
            if self.checkpointed:  # a block's activations are there only once the loss has been computed
                block = int(tokens * self.kept.largest_block)
                activations = int(tokens * self.kept.inputs) + max(2 * logits + loss, logits + block + backward)
            else:
                activations = int(tokens * self.kept.everything) + 2 * logits + max(loss, backward)
                activations += self._rounded()
        factors = self._of_others()
        if self.hosted:
            starts = range(0, len(self.factor_bytes), per_pass)
            factors = max(sum(self.factor_bytes[first : first + per_pass]) for first in starts)
        return activations + factors + self._norms()

    def selection(self) -> int:
        """Factorisations of the largest layer, and the new masks."""
        masks = 0 if self.streamed else self.weights
        return masks + self._factor_workspace(2)

    def update(self, windows: int, inverses: int = 0) -> int:
        """The largest layer's update, with a sequential one what it keeps of two models; or, once that is done,
        gradient steps over passes of ``windows``, with all weights' gradients.

        That is beside ``inverses``, which are made after a sequential update alone.
        """
        states = self.states()
        if self.states_wait(windows):  # of two batches
            states = 2 * states * windows // max(1, round(self.shares.windows * self.config.samples))
        update = self._at_work(windows) + states - inverses * self.config.sequential
        return max(update, self._steps(windows))

    def states(self) -> int:
        """What a sequential update or a last fit keeps of every window: hidden states of both models and, not rounded,
        what those of one of them lack, and the dense model's inputs of all stages of a block.

        What comes with the stages (inputs of the linear under way, outputs of finished modules) takes the place of
        inputs of those before.
        """
        if not self.config.aims_at_dense:
            return 0
        lack = max(_FLOAT, self.itemsize)
        inputs = max(sum(columns for columns, _ in groups) for groups in self.groups) * self._compute_itemsize()
        windows = round(self.shares.windows * self.config.samples)
        return windows * self.seqlen * (self.width * (2 * self.itemsize + lack) + inputs)

    def states_wait(self, windows: int) -> bool:
        """Whether these states wait in main memory: where they do not fit the one GPU beside an update."""
        several = len({parameter.device for parameter in self.model.parameters() if parameter.is_cuda}) > 1
        if several or not (self.on_gpu and self.config.aims_at_dense):
            return False
        return self._at_work(windows) + self.states() > self.free()

    def inverses(self, windows: int) -> int:
        """All inverses, where the update after passes of ``windows`` needs them and they fit beside what stays."""
        config = self.config
        used = config.update != "none" and (not config.sequential or config.gradient_steps > 0)
        needed = config.structure_record.single_weights and used
        if not self.on_gpu or self.hosted or not needed or config.kron_rank > 1:
            return 0
        inverses = self._own_factors()
        working = max(self.selection(), self.update(windows, inverses))
        return inverses if inverses + working <= self.free() else 0

    def pinned(self, windows: int) -> int:
        """Pinned main memory for what is kept there: factors, masks, streamed weights, dense weights, hidden states."""
        if not self.on_gpu:
            return 0
        pinned = self._own_factors() if self.hosted else 0
        pinned += self.states() if self.states_wait(windows) else 0
        if self.offload:
            pinned += self.weights + sum(self.blocks) + self.snapshot * self.config.around_dense_weights
        return pinned

    def host(self, windows: int) -> int:
        """Main memory that a run on a GPU takes: copies of the weights, or these themselves, and what is offloaded."""
        on_host = self.on_host()
        if not self.on_gpu:
            return 0
        weights = on_host if self.streamed and on_host else self.snapshot
        return weights + self.snapshot * (self.streamed and self.config.reconstruct) + self.pinned(windows)

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
        """Gradient steps: all gradients beside a pass of half as many windows, or an update of the largest layer; then
        all directions and the weights before beside a pass without gradients."""
        if not self.config.gradient_steps:
            return 0
        passes = self.curvature(max(1, windows // 2), 1) - self._of_others()
        gradients = max(passes, self._layer_update()) + _FLOAT * self.weights
        logits = self._logits(windows * self.seqlen)
        held = 0
        if self.chunked and self.config.gradient_target == "dense":  # of all windows its last hidden states
            tokens = round(self.shares.windows * self.config.samples) * self.seqlen
            held = tokens * self.width * self._compute_itemsize()
        late = 0 if self.hosted else int(self.shares.factors * self.late_bytes)
        return held + late + max(gradients, 2 * self.itemsize * self.weights + 2 * logits)

    def _at_work(self, windows: int) -> int:
        """An update without the states: of the largest layer, or the moments that it needs of a batch of inputs."""
        update = self._layer_update()
        if not self.config.aims_at_dense or self.kept is None:
            return update
        tokens, columns = windows * self.seqlen, max(C for _, C in self.sizes)
        largest = max(R * C for R, C in self.sizes)
        update += _FLOAT * (_STAGE_SQUARES * columns**2 + _STAGE_MATRICES * largest)
        # Either a block runs or products are summed: of two inputs, as they came and weighted, one by float32; and of
        # what the stream lacks.
        weighted = columns * (4 * self._compute_itemsize() + _FLOAT) + 3 * _FLOAT * self.width
        moments = _FLOAT * (_MOMENT_SQUARES * columns**2 + largest)
        moments += tokens * max(int(self.kept.largest_block), weighted)
        return max(update, moments) + self._norms()

    def _own_factors(self) -> int:
        """Packed factors of what a rank owns, as there are at most."""
        return int(self.shares.factors * (sum(self.factor_bytes) + self.late_bytes))

    def _of_others(self) -> int:
        """Packed factors of linears that other ranks own: of its windows every rank sums up all."""
        return 0 if self.hosted else sum(self.factor_bytes) - self.factors()

    def _logits(self, tokens: int) -> int:
        """Logits of so many tokens, where they are there at once."""
        return 0 if self.chunked else self.vocabulary * self.itemsize * tokens

    def _rounded(self) -> int:
        """Weights that autocast has rounded, until a backward pass has gone through them."""
        itemsize = self._compute_itemsize()
        return itemsize * self.weights if itemsize < self.itemsize else 0

    def _loss(self, tokens: int) -> int:
        """What the loss makes of a chunk of logits in float32."""
        copies = _CHUNK_COPIES if self.chunked else 1 if self.itemsize >= _FLOAT else 2
        return copies * _FLOAT * min(tokens * self.vocabulary, CHUNK)

    def _norms(self) -> int:
        """Squared norms of all linears' gradients, for weights of tokens."""
        config = self.config
        needed = config.aims_at_dense and config.token_weights is not False and self.gradients
        return _FLOAT * config.samples * self.seqlen * len(self.sizes) * needed

    def _compute_itemsize(self) -> int:
        dtype = compute_dtype(self.config.compute_dtype, self.model, self.device)
        return self.itemsize if dtype is None else dtype.itemsize

    def _factor_workspace(self, copies: int) -> int:
        """``copies`` of the largest layer's factors, and a factorisation's own workspace."""
        if not self.factored:
            return 0
        squares = [C**2 + self.gradients * R**2 for R, C in self.sizes]
        return _FLOAT * (copies * max(squares) + max(max(R, C) for R, C in self.sizes) ** 2)


def input_groups(decoder: Decoder) -> list[list[tuple[int, int]]]:
    """Of every block's shared inputs C' of the widest reader, and the rows of those that are read by one linear alone,
    or else 0."""
    found: list[list[tuple[int, int]]] = []
    for depth in range(len(decoder.blocks)):
        readers: dict[str, list[PrunableLinear]] = {}
        for linear in decoder.linears:
            if linear.depth == depth:
                readers.setdefault(linear.input_group, []).append(linear)
        found.append(
            [
                (max(x.columns + x.has_bias for x in group), group[0].rows if len(group) == 1 else 0)
                for group in readers.values()
            ]
        )
    return found


def factor_sizes(decoder: Decoder, config: PruneConfig) -> list[list[int]]:
    """Sizes of every block's factors: an A per shared input, as wide as its widest user with a bias, a G per linear.

    A sequential update of N:M in one shot has no A but those of its sweep.
    """
    record = config.method_record
    if record.needs == "nothing":
        return [[] for _ in decoder.blocks]
    without = config.sequential and config.structure_record.m > 0 and config.shots == 1 and not config.dense_fraction
    sizes = []
    for depth, groups in enumerate(input_groups(decoder)):
        rows = [linear.rows for linear in decoder.linears if linear.depth == depth and record.gradients]
        sizes.append([*(C for C, _ in groups if not without), *rows])
    return sizes
