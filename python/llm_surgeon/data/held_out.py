"""Windows of the calibration text that no calibration window shares a token with: to measure what pruning cost on,
which it never sees, and further ones, which tell how far to go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_surgeon.data.calibration import Calibration, calibration_windows, require_length, window_starts

# At most so many windows are held out, and so few are too few where a longer look finds none: the end is cut off then.
MOST, _FEWEST = 16, 4
# Of a text too short for windows between the calibration windows, the last part that is cut off.
_END = 1 / 8


class Split(NamedTuple):
    """Calibration windows and held-out ones of a stream.

    Attributes:
        apart: bool ``[len(ids)]``, True at the tokens of ``held_out``.
    """

    calibration: Calibration
    held_out: Calibration | None
    apart: Tensor


def split(ids: Tensor, samples: int, seqlen: int, seed: int) -> Split:
    """Calibration windows of the stream ``ids``, and windows ``[at most 16, seqlen]`` that share no token with them.

    The calibration windows are those of :func:`~llm_surgeon.data.calibration.calibration_windows`, and the others lie
    between them, spread over the text. Where fewer than 4 fit there, the last eighth of the text is cut off first and
    the calibration windows are drawn from what stands before it. A text of fewer than 8 windows is too short to hold
    any out: ``None``.

    Raises:
        InputError: the text is shorter than a window.
    """
    require_length(ids, seqlen)
    end, starts = len(ids), _between(window_starts(len(ids), samples, seqlen, seed), len(ids), seqlen)
    if len(starts) >= _FEWEST:
        starts = starts[_spread(len(starts), MOST)]
    else:
        end -= min(MOST, int(_END * len(ids)) // seqlen) * seqlen
        starts = torch.arange(end, len(ids) - seqlen + 1, seqlen) if end < len(ids) else starts[:0]
    places, apart = starts[:, None] + torch.arange(seqlen), torch.zeros(len(ids), dtype=torch.bool)
    apart[places.flatten()] = True
    held_out = Calibration(ids[places]) if len(starts) else None
    return Split(calibration_windows(ids[:end], samples, seqlen, seed), held_out, apart)


def further(ids: Tensor, samples: int, seqlen: int, seed: int, count: int) -> Calibration | None:
    """At most ``count`` windows more between those of :func:`split`, spread over the text; None where none fit."""
    between = _between(window_starts(len(ids), samples, seqlen, seed), len(ids), seqlen)
    left = torch.ones(len(between), dtype=torch.bool)
    left[_spread(len(between), MOST)] = False
    between = between[left]
    if len(between) == 0:
        return None
    chosen = between[_spread(len(between), count)]
    return Calibration(ids[chosen[:, None] + torch.arange(seqlen)])


def spread(windows: Tensor) -> Tensor:
    """At most as many of ``windows`` ``[n, seqlen]`` as are held out of a text, from the first to the last."""
    return windows[_spread(len(windows), MOST)]


def _spread(length: int, most: int) -> Tensor:
    """At most ``most`` indices from the first to the last of ``length``."""
    return torch.linspace(0, length - 1, min(most, length)).long()


def _between(starts: Tensor, length: int, seqlen: int) -> Tensor:
    """Starts of as many windows as fit into the stretches that no window from ``starts`` on touches, in order."""
    begins = starts.unique()  # sorted
    stretches = zip([0, *(begins + seqlen).tolist()], [*begins.tolist(), length], strict=True)
    return torch.tensor(
        [s for first, end in stretches for s in range(first, end - seqlen + 1, seqlen)], dtype=torch.int64
    )
