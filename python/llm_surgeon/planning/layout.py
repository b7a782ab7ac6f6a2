"""Layout of the passes over the data: windows per batch, and blocks whose factors are accumulated together."""

from __future__ import annotations

from typing import NamedTuple

from llm_surgeon.planning.memory import Memory

# Tokens per pass: enough to feed the matrix units, few enough to leave memory to other things. A GPU needs the more of
# them the narrower a model is, until its kernels take longer than the host does to launch them: so many numbers in a
# hidden state, within bounds (estimates).
_CPU_TOKENS, _GPU_TOKENS, _MOST_GPU_TOKENS = 4096, 8192, 65536
_GPU_NUMBERS = 2**25


class Layout(NamedTuple):
    """Windows per batch, blocks per pass, and the blocks at which the passes of a shot begin."""

    windows: int
    per_pass: int
    starts: range

    def backward_passes(self, blocks: int) -> float:
        """Whole backward passes in a shot: each goes back as far as its first block only."""
        return sum(blocks - first for first in self.starts) / blocks


def choose_layout(memory: Memory) -> Layout:
    """The layout as configured, else as it fits ``memory``."""
    config, blocks = memory.config, len(memory.blocks)
    tokens = max(_GPU_TOKENS, min(_MOST_GPU_TOKENS, _GPU_NUMBERS // memory.width)) if memory.on_gpu else _CPU_TOKENS
    wanted = config.batch_size or max(1, tokens // memory.seqlen)
    windows, per_pass = min(config.samples, wanted), min(blocks, config.curvature_layers or blocks)
    if memory.on_gpu:
        free = memory.free()
        # Fewer passes are worth more than larger batches, once a batch fills the GPU: half of the tokens do.
        smallest = windows
        if config.batch_size is None:
            while windows > 1 and memory.curvature(windows, 1) > free / 2:
                windows -= 1
            smallest = max(1, windows // 2)
        if memory.hosted and config.curvature_layers is None:
            passes, windows = min(
                (-(-blocks // _blocks_that_fit(memory, n, free)), -n) for n in range(smallest, windows + 1)
            )
            windows, per_pass = -windows, -(-blocks // passes)  # of equal size
    return Layout(windows, per_pass, range(0, blocks, per_pass) if memory.factored else range(1))


def _blocks_that_fit(memory: Memory, windows: int, free: float) -> int:
    """Blocks, at least one, whose factors fit ``free`` bytes beside the activations of so many windows."""
    counts = range(len(memory.blocks), 1, -1)
    return next((count for count in counts if memory.curvature(windows, count) <= free), 1)
