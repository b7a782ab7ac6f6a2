"""What is planned of a run: its layout, and the memory, disk and time that it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """How a run goes and what it needs, in bytes and seconds.

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
            gradients besides.
        snapshot_bytes: copies of the weights, to restore on failure, in main memory.
        process_bytes: what the process takes besides tensors where it computes on a CPU: libraries, the text's tokens,
            and what allocators waste between tensors.
        host_bytes: what is kept in main memory for a GPU: the snapshot, or the weights as they came where these were in
            main memory already, and what is offloaded.
        disk_bytes: the checkpoint that is written; of its weights alone where the tokenizer is not known.
        seconds: of all shots.
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
    snapshot_bytes: int
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
        return self.masks_bytes + self.dense_bytes + self.factors_bytes + snapshot + phases

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
            "libraries and allocators": self.process_bytes,
        }
