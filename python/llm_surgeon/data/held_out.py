"""Windows of the calibration text that pruning never sees, to measure what it cost on."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.data.calibration import Calibration, calibration_windows, require_length, window_starts

# At most so many windows are held out, and so few are too few where a longer look finds none: the end is cut off then.
MOST, _FEWEST = 16, 4
# Of a text too short for windows between the calibration windows, the last part that is cut off.
_END = 1 / 8


def split(ids: Tensor, samples: int, seqlen: int, seed: int) -> tuple[Calibration, Calibration | None]:
    """Calibration windows of the stream ``ids``, and windows ``[at most 16, seqlen]`` that share no token with them.

    The calibration windows are those of :func:`~llm_surgeon.data.calibration.calibration_windows`, and the others lie
    between them, spread over the text. Where fewer than 4 fit there, the last eighth of the text is cut off first and
    the calibration windows are drawn from what stands before it. A text of fewer than 8 windows is too short to hold
    any out: ``None``.

    Raises:
        InputError: the text is shorter than a window.
    """
    require_length(ids, seqlen)
    between = _between(window_starts(len(ids), samples, seqlen, seed), len(ids), seqlen)
    if len(between) >= _FEWEST:
        chosen = between[torch.linspace(0, len(between) - 1, min(MOST, len(between))).long()]
        return calibration_windows(ids, samples, seqlen, seed), Calibration(ids[chosen[:, None] + torch.arange(seqlen)])
    count = min(MOST, int(_END * len(ids)) // seqlen)
    if count == 0:
        return calibration_windows(ids, samples, seqlen, seed), None
    cut = len(ids) - count * seqlen
    return calibration_windows(ids[:cut], samples, seqlen, seed), Calibration(ids[cut:].view(count, seqlen))


def _between(starts: Tensor, length: int, seqlen: int) -> Tensor:
    """Starts of as many windows as fit into the stretches that no window from ``starts`` on touches, in order."""
    begins = starts.unique()  # sorted
    stretches = zip([0, *(begins + seqlen).tolist()], [*begins.tolist(), length], strict=True)
    return torch.tensor(
        [s for first, end in stretches for s in range(first, end - seqlen + 1, seqlen)], dtype=torch.int64
    )
