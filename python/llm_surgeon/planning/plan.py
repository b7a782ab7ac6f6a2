"""Lay a run out: windows per pass, blocks per pass, what lies where; and the memory and disk that this takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from llm_surgeon.config.methods import method
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.loss import CHUNK
from llm_surgeon.models.offload import compute_device
from llm_surgeon.planning.activations import measure_activations
from llm_surgeon.planning.result import Plan
from llm_surgeon.planning.time import PINNING_RATE, run_seconds
from llm_surgeon.resources import available_memory, copy_rate, matmul_rate, process_memory
from surgeon_kernels import SymmetricAccumulator

_FLOAT = 4  # bytes of the float32 that factors, costs and updates are computed in
# Tokens per pass: enough to feed the matrix units, few enough to leave memory to other things.
_CPU_TOKENS, _GPU_TOKENS = 4096, 8192
# Matrices of a layer's shape that the joint solver holds: the weight, the mask, and at most 12.6 more at any shape
# (`workspace_matrices` of bench/kernels/joint_update.py; tests/surgeon/planning/test_plan_gpu.py).
_SOLVER_MATRICES = 14
# Those of a solution that waits for the next one, to be exchanged for it: Δ, G Δ A and costs.
_SOLUTION_MATRICES = 3
# Gradients of a block's widest layer that are alive at once in its backward pass.
_BACKWARD_COPIES = 3
# Blocks whose weights are on the device at once when they are streamed: the last, the present and the next one.
_STREAMED_BLOCKS = 3
# Beside tensors on a CPU: what libraries allocate once work begins, and what allocators keep between tensors, a share
# of these. Runs with llama-12m (magnitude, surgeon) peak within a tenth below the plan then.
_LIBRARIES, _CPU_WASTE = 2**27, 0.25
# Share of the memory that is left free: what allocators waste between tensors, and libraries' own workspaces.
_SLACK = 0.08


def make_plan(
    model: nn.Module,
    decoder: Decoder,
    config: PruneConfig,
    *,
    saved_dtype: torch.dtype | None = None,
    held_out: int = 0,
) -> Plan:
    """Plan a run of ``config`` on a loaded model: two passes over a few tokens and a few timed matrix products.

    Windows go through the model in batches of about 4096 tokens, on a GPU of up to 8192, as far as their activations
    fit beside everything else; blocks are accumulated together as far as their factors fit once they are offloaded.

    Args:
        config: ``samples`` and ``seqlen`` must be those of the data.
        saved_dtype: of the written checkpoint; the model's own where left out.
        held_out: windows whose loss is measured before and after.

    Raises:
        InputError: not even one window and one block fit the memory.
    """
    return _Planner(model, decoder, config).plan(saved_dtype, held_out)


class _Planner:
    def __init__(self, model: nn.Module, decoder: Decoder, config: PruneConfig) -> None:
        assert config.seqlen is not None and config.shots is not None
        self.config, self.seqlen, self.shots = config, config.seqlen, config.shots
        self.model, self.decoder = model, decoder
        self.device = compute_device(model, config)
        self.method = method(config.method)
        self.gradients, self.factored = self.method.gradients, self.method.needs != "nothing"
        self.offload = config.offload == "cpu"
        # Factors that lie in main memory between the passes over the data and the layers' turns: not the GPU's.
        self.hosted = self.factored and self._on_gpu and (self.offload or config.curvature_layers is not None)
        self.checkpointed = self.gradients and (config.checkpoint_activations or self.offload)
        self.sizes = [(linear.rows, linear.columns + linear.has_bias) for linear in decoder.linears]
        self.weights = sum(linear.rows * linear.columns for linear in decoder.linears)
        self.itemsize = next(model.parameters()).element_size()
        self.factor_sizes = factor_sizes(decoder, config)
        self.factor_bytes = [_FLOAT * sum(map(SymmetricAccumulator.elements, sizes)) for sizes in self.factor_sizes]
        self.kept = measure_activations(model, decoder, self.seqlen) if self.gradients else None

    def plan(self, saved_dtype: torch.dtype | None, held_out: int) -> Plan:
        parameters = list(self.model.parameters())
        blocks = [sum(p.nbytes for p in block.parameters()) for block in self.decoder.blocks]
        weights = sum(parameter.nbytes for parameter in parameters)
        if self.offload:
            weights += min(sum(blocks), _STREAMED_BLOCKS * max(blocks)) - sum(blocks) * self._on_gpu
        snapshot = self.itemsize * sum(R * C for R, C in self.sizes)
        dense = snapshot * self.config.around_dense_weights
        streamed = self.offload and self._on_gpu
        masks, dense_here = (0, 0) if streamed else (self.weights, dense)
        factors = 0 if self.hosted else sum(self.factor_bytes)
        resident = weights + masks + dense_here + factors
        batch_size, per_pass = self._layout(resident)
        update = self._update_bytes() + self._steps_bytes(batch_size)
        inverses = self._inverses_bytes(resident, update)
        pinned = self._pinned_bytes() if self._on_gpu else 0
        # A pass over the data goes back as far as its first block only.
        starts = range(0, len(blocks), per_pass) if self.factored else range(1)
        backward = sum(len(blocks) - first for first in starts) / len(blocks) if self.gradients else 0.0
        on_host = sum(parameter.nbytes for parameter in parameters if parameter.device.type == "cpu")
        copies = on_host if streamed and on_host else snapshot
        batches = -(-self.config.samples // batch_size)
        transfer = batches * sum(blocks) / copy_rate(self.device) if streamed else 0.0
        head = self.model.get_output_embeddings().weight.numel()  # type: ignore[operator]
        dtype = parameters[0].dtype if self._on_gpu else torch.float32
        plan = Plan(
            device=self.device,
            batch_size=batch_size,
            blocks_per_pass=per_pass,
            passes=len(starts),
            checkpoint_activations=self.checkpointed,
            weights_bytes=weights,
            masks_bytes=masks,
            dense_bytes=dense_here,
            factors_bytes=factors,
            inverses_bytes=inverses,
            curvature_bytes=self._curvature_bytes(batch_size, per_pass),
            selection_bytes=self._selection_bytes(),
            update_bytes=update,
            snapshot_bytes=snapshot,
            process_bytes=0,
            host_bytes=copies + pinned if self._on_gpu else 0,
            disk_bytes=sum(p.numel() * (saved_dtype or p.dtype).itemsize for p in parameters),
            seconds=run_seconds(
                self.config,
                self.sizes,
                self._factors(),
                head=head,
                held_out=held_out,
                forward_passes=len(starts) * self.factored,
                # Activations that were not kept are computed again.
                backward_passes=backward,
                backward_cost=2 if self.checkpointed else 1,
                transfer=transfer,
                rates=(matmul_rate(self.device, dtype), matmul_rate(self.device, torch.float32)),
                on_gpu=self._on_gpu,
                inverted_once=inverses > 0,
            )
            + pinned / PINNING_RATE,
        )
        if self._on_gpu:
            return plan
        held = max(0, process_memory() - on_host) + _LIBRARIES
        return replace(plan, process_bytes=held + int(_CPU_WASTE * plan.additional_bytes))

    def _layout(self, resident: int) -> tuple[int, int]:
        """Windows per batch and blocks per pass: as configured, else what fits beside ``resident`` bytes."""
        samples, blocks = self.config.samples, len(self.decoder.blocks)
        wanted = self.config.batch_size or max(1, (_GPU_TOKENS if self._on_gpu else _CPU_TOKENS) // self.seqlen)
        windows, per_pass = min(samples, wanted), min(blocks, self.config.curvature_layers or blocks)
        if not self._on_gpu:
            return windows, per_pass
        free = (1 - _SLACK) * self._limit() - resident
        # Fewer passes are worth more than larger batches, once a batch fills the GPU: half of the tokens do.
        smallest = windows
        if self.config.batch_size is None:
            while windows > 1 and self._curvature_bytes(windows, 1) > free / 2:
                windows -= 1
            smallest = max(1, windows // 2)
        if self.hosted and self.config.curvature_layers is None:
            passes, windows = min(
                (-(-blocks // self._blocks_that_fit(n, free)), -n) for n in range(smallest, windows + 1)
            )
            windows, per_pass = -windows, -(-blocks // passes)  # of equal size
        return windows, per_pass

    def _blocks_that_fit(self, windows: int, free: float) -> int:
        """Blocks, at least one, whose factors fit ``free`` bytes beside the activations of so many windows."""
        blocks = range(len(self.decoder.blocks), 1, -1)
        return next((count for count in blocks if self._curvature_bytes(windows, count) <= free), 1)

    def _inverses_bytes(self, resident: int, update: int) -> int:
        """All inverses, where the update needs them and they fit beside ``resident`` bytes."""
        config = self.config
        needed = config.pattern.single_weights and config.update != "none"
        if not self._on_gpu or self.hosted or not needed or config.kron_rank > 1:
            return 0
        inverses = sum(self.factor_bytes)
        working = max(self._selection_bytes(), update)
        return inverses if resident + inverses + working <= (1 - _SLACK) * self._limit() else 0

    def _factors(self) -> list[int]:
        return [size for sizes in self.factor_sizes for size in sizes]

    def _pinned_bytes(self) -> int:
        """Pinned memory for what is kept there: factors, masks, streamed weights, dense weights."""
        pinned = sum(self.factor_bytes) if self.hosted else 0
        if self.offload:
            pinned += self.weights + sum(p.nbytes for block in self.decoder.blocks for p in block.parameters())
            pinned += self.itemsize * sum(R * C for R, C in self.sizes) * self.config.around_dense_weights
        return pinned

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _limit(self) -> int:
        """Bytes that the run may have on the device, the model's included."""
        held = sum(p.nbytes for p in self.model.parameters() if p.device == self.device)
        available = available_memory(self.device) + held
        cap = self.config.gpu_memory_bytes
        if cap is None:
            return available
        # The cap is on all that PyTorch takes: what else the process holds there counts against it.
        others = torch.cuda.memory_allocated(self.device) - held if self._on_gpu else 0
        return min(cap - others, available)

    def _curvature_bytes(self, windows: int, per_pass: int) -> int:
        tokens = windows * self.seqlen
        vocabulary, hidden = self.model.get_output_embeddings().weight.shape  # type: ignore[operator]
        # The loss is computed before the backward pass begins: the larger of the two counts.
        loss = _FLOAT * min(tokens * vocabulary, CHUNK) * (1 if self.itemsize >= _FLOAT else 2)
        widest = max(max(R, C) for R, C in self.sizes)
        logits = vocabulary * self.itemsize * tokens
        if self.kept is None:  # forward only: the widest linear's input and output
            activations = int(tokens * self.itemsize * (hidden + 2 * widest)) + logits + loss
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

    def _selection_bytes(self) -> int:
        masks = 0 if self.offload and self._on_gpu else self.weights
        return masks + self._factor_workspace(2)

    def _update_bytes(self) -> int:
        largest = max(R * C for R, C in self.sizes)
        if not self.method.compensates:
            return 4 * _FLOAT * largest
        # The factors of a layer, their inverses where weights go singly, and the solver's matrices.
        if not self.config.pattern.single_weights:
            return self._factor_workspace(1) + _FLOAT * largest * 6
        held = _SOLVER_MATRICES + _SOLUTION_MATRICES * bool(self.config.exchanges)
        return self._factor_workspace(2) + _FLOAT * largest * held

    def _steps_bytes(self, windows: int) -> int:
        """What gradient steps take beyond an update: gradients, or directions and the weights before; activations."""
        if not self.config.gradient_steps:
            return 0
        beyond = max(0, self._curvature_bytes(windows, 1) - self._update_bytes())
        return max(_FLOAT, 2 * self.itemsize) * self.weights + beyond

    def _factor_workspace(self, copies: int) -> int:
        """``copies`` of the largest layer's factors, and a factorisation's own workspace."""
        if not self.factored:
            return 0
        squares = [C**2 + self.gradients * R**2 for R, C in self.sizes]
        return _FLOAT * (copies * max(squares) + max(max(R, C) for R, C in self.sizes) ** 2)


def factor_sizes(decoder: Decoder, config: PruneConfig) -> list[list[int]]:
    """Sizes of every block's factors: an A per shared input, as wide as its widest user with a bias, a G per linear."""
    sizes: list[list[int]] = []
    record = method(config.method)
    for depth in range(len(decoder.blocks)):
        linears = [linear for linear in decoder.linears if linear.depth == depth and record.needs != "nothing"]
        widths: dict[str, int] = {}
        for linear in linears:
            widths[linear.input_group] = max(linear.columns + linear.has_bias, widths.get(linear.input_group, 0))
        sizes.append([*widths.values(), *(linear.rows for linear in linears if record.gradients)])
    return sizes
