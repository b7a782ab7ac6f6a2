"""Plan of a run: its layout, and the memory, disk and time that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.passes import compute_dtype
from llm_surgeon.planning.layout import Layout, choose_layout
from llm_surgeon.planning.memory import SLACK, Memory
from llm_surgeon.planning.recovery import RecoveryMemory
from llm_surgeon.planning.time import PINNING_RATE, run_seconds
from llm_surgeon.resources import copy_rate, matmul_rate, process_memory

# Beside tensors on a CPU: what libraries allocate once work begins, and what allocators keep between tensors, a share
# of these. Runs with llama-12m (magnitude, surgeon) peak within a tenth below the plan then.
_LIBRARIES, _CPU_WASTE = 2**27, 0.25


@dataclass(frozen=True)
class Plan:
    """Course of a run and its needs, in bytes and seconds.

    Attributes:
        device: where everything is computed.
        batch_size: windows per forward and backward pass.
        blocks_per_pass: decoder blocks whose factors are accumulated together.
        passes: how often a shot goes through the data for that.
        checkpoint_activations: whether activations are computed again in the backward pass.
        weights_bytes: the model's weights on the device; those of three blocks where they are streamed.
        masks_bytes: what is pruned, a byte a weight.
        dense_bytes: the dense weights, where later shots go back to them.
        factors_bytes: packed Kronecker factors that stay on the device: an A per input, a G per linear, float32.
        inverses_bytes: inverses that are kept, packed like the factors, from the selection to the update; 0 where they
            are computed again.
        curvature_bytes: one pass's activations, logits and their gradient; also its factors where these do not stay.
        selection_bytes: factorisations of the largest layer, and the new masks.
        update_bytes: the largest layer's factors, inverses and the solver's matrices; with gradient steps all weights'
            gradients besides, with a sequential one what it keeps of all windows.
        states_wait: whether that, or what a last fit keeps, is in main memory between the turns of a batch.
        snapshot_bytes: copies of the weights, to restore on failure, in main memory.
        recovery_bytes: what a recovery takes beyond the weights, once all that is let go of; 0 where none follows.
        recovery_windows: windows per forward and backward pass of that.
        process_bytes: what the process takes besides tensors where it computes on a CPU: libraries, the text's tokens,
            and what allocators waste between tensors.
        host_bytes: what is kept in main memory for a GPU: the snapshot, or the weights as they came where these were in
            main memory already, and what is offloaded.
        disk_bytes: the checkpoint that is written, twice with a recovery, in whose time the pruned one is there; of its
            weights alone where the tokenizer is not known.
        seconds: of all shots, and the minutes of a recovery.
    """

    device: torch.device
    batch_size: int
    blocks_per_pass: int
    passes: int
    checkpoint_activations: bool
    weights_bytes: int
    masks_bytes: int
    dense_bytes: int
    factors_bytes: int
    inverses_bytes: int
    curvature_bytes: int
    selection_bytes: int
    update_bytes: int
    states_wait: bool
    snapshot_bytes: int
    recovery_bytes: int
    recovery_windows: int
    process_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """Peak memory on the device, the model included; on a CPU that of the whole process."""
        return self.weights_bytes + self.additional_bytes + self.process_bytes

    @property
    def additional_bytes(self) -> int:
        """Peak memory of tensors beyond the weights; the phases follow each other."""
        phases = max(self.curvature_bytes, self.inverses_bytes + max(self.selection_bytes, self.update_bytes))
        snapshot = self.snapshot_bytes if self.device.type == "cpu" else 0
        pruning = self.masks_bytes + self.dense_bytes + self.factors_bytes + snapshot + phases
        return max(pruning, self.recovery_bytes)

    def by_kind(self) -> dict[str, int]:
        """Bytes on the device by what they are for."""
        return {
            "weights": self.weights_bytes,
            "masks": self.masks_bytes,
            "dense weights": self.dense_bytes,
            "copies to restore": self.snapshot_bytes if self.device.type == "cpu" else 0,
            "factors": self.factors_bytes,
            "curvature pass": self.curvature_bytes,
            "or selection": self.inverses_bytes + self.selection_bytes,
            "or update": self.inverses_bytes + self.update_bytes,
            "or, beside the weights alone, recovery": self.recovery_bytes,
            "libraries and allocators": self.process_bytes,
        }


def make_plan(
    model: nn.Module,
    decoder: Decoder,
    config: PruneConfig,
    *,
    saved_dtype: torch.dtype | None = None,
    held_out: int = 0,
    recovery: RecoverConfig | None = None,
    ranks: Ranks = ALONE,
) -> Plan:
    """Plan a run of ``config`` on a loaded model: two passes over a few tokens and a few timed matrix products.

    Windows go through the model in batches of about 4096 tokens, on a GPU of up to 8192, and of narrow models up to
    32768, as far as their activations, counted in the model's own dtype, fit beside everything else; blocks are
    accumulated together as far as their factors fit once they are offloaded.
    Where not even one window and one block fit, the plan says what they take.

    Args:
        config: ``samples`` and ``seqlen`` must be those of the data.
        saved_dtype: of the written checkpoint; the model's own where left out.
        held_out: windows whose loss is measured before and after.
        recovery: options of what follows, the training of all weights by distillation.
        ranks: processes that share the run: all lay it out alike, for the one that has the least memory.
    """
    memory = Memory(model, decoder, config, ranks)
    after = None if recovery is None else RecoveryMemory(model, decoder, recovery, memory.device)
    training_windows = 0 if after is None else after.windows((1 - SLACK) * memory.limit() - memory.model_weights())
    written = 1 if after is None else 2
    layout = choose_layout(memory)
    inverses = memory.inverses(layout.windows)
    plan = Plan(
        device=memory.device,
        batch_size=layout.windows,
        blocks_per_pass=layout.per_pass,
        passes=len(layout.starts),
        checkpoint_activations=memory.checkpointed,
        weights_bytes=memory.model_weights(),
        masks_bytes=memory.masks(),
        dense_bytes=memory.dense(),
        factors_bytes=memory.factors(),
        inverses_bytes=inverses,
        curvature_bytes=memory.curvature(layout.windows, layout.per_pass),
        selection_bytes=memory.selection(),
        update_bytes=memory.update(layout.windows, inverses),
        states_wait=memory.states_wait(layout.windows),
        snapshot_bytes=memory.snapshot,
        recovery_bytes=0 if after is None else after.bytes(training_windows),
        recovery_windows=training_windows,
        process_bytes=0,
        host_bytes=memory.host(layout.windows),
        disk_bytes=written * sum(p.numel() * (saved_dtype or p.dtype).itemsize for p in model.parameters()),
        seconds=_seconds(memory, layout, held_out, inverted_once=inverses > 0)
        + (0.0 if recovery is None else 60 * (recovery.minutes or 0.0)),
    )
    if memory.on_gpu:
        return plan
    held = max(0, process_memory() - memory.on_host()) + _LIBRARIES
    return replace(plan, process_bytes=held + int(_CPU_WASTE * plan.additional_bytes))


def _seconds(memory: Memory, layout: Layout, held_out: int, inverted_once: bool) -> float:
    """Seconds of all shots, and of pinning main memory."""
    config, device = memory.config, memory.device
    batches = -(-round(memory.shares.windows * config.samples) // layout.windows)
    waiting = memory.states() * memory.states_wait(layout.windows)
    own = next(memory.model.parameters()).dtype if memory.on_gpu else torch.float32
    dtype = compute_dtype(config.compute_dtype, memory.model, device) or own
    return (
        run_seconds(
            config,
            memory.sizes,
            [size for sizes in memory.factor_sizes for size in sizes],
            [each for groups in memory.groups for each in groups],
            head=memory.model.get_output_embeddings().weight.numel(),  # type: ignore[operator]
            held_out=held_out,
            forward_passes=len(layout.starts) * memory.factored,
            backward_passes=layout.backward_passes(len(memory.blocks)) if memory.gradients else 0.0,
            # Activations that were not kept are computed again.
            backward_cost=2 if memory.checkpointed else 1,
            transfer=batches * sum(memory.blocks) / copy_rate(device) if memory.streamed else 0.0,
            moved=len(memory.blocks) * waiting / copy_rate(device) if waiting else 0.0,
            rates=(matmul_rate(device, dtype), matmul_rate(device, torch.float32)),
            on_gpu=memory.on_gpu,
            inverted_once=inverted_once,
            chunked=memory.chunked,
            shares=memory.shares,
        )
        + memory.pinned(layout.windows) / PINNING_RATE
    )
