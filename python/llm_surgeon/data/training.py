"""Windows to train on: a text gone through again and again, cut elsewhere each time."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.data.calibration import Calibration, require_length, require_room
from llm_surgeon.errors import InputError

# Rounds through the text that are cut differently where as many windows are asked for as there may be.
MOST_ROUNDS = 8


def training_windows(
    ids: Tensor, count: int, seqlen: int, seed: int, *, apart: Tensor | None = None, rounds: int | None = None
) -> Calibration:
    """At most ``count`` windows of ``seqlen`` tokens of the stream ``ids``, in rounds through all of it.

    A round cuts the stream into windows that do not overlap, from another random place on, in random order; so every
    token is seen equally often, which windows at random places do not give.

    Args:
        apart: bool ``[len(ids)]``, tokens that no window may hold.
        rounds: at most so many; left out, as many as ``count`` takes.

    Raises:
        InputError: the stream holds no window, or the windows are too many for the memory.
    """
    require_length(ids, seqlen)
    generator = torch.Generator().manual_seed(seed)
    windows = ids.unfold(0, seqlen, 1)
    allowed = torch.arange(len(windows))
    if apart is not None:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), apart.cumsum(0)])  # of each place
        allowed = allowed[before[seqlen:] == before[:-seqlen]]
        if not len(allowed):
            raise InputError(f"no {seqlen} tokens in a row are left beside those held out: pass more text")
    most = count if rounds is None else min(count, rounds * len(windows) // seqlen + 1)
    require_room(most, seqlen)
    found: list[Tensor] = []
    while most > 0:
        first = int(torch.randint(seqlen, (), generator=generator))
        starts = allowed[allowed % seqlen == first]
        starts = starts[torch.randperm(len(starts), generator=generator)][:most]
        found.append(starts)
        most -= len(starts)
    return Calibration(windows[torch.cat(found)])
