"""Owners: which rank of a run factorises, selects and solves which linear."""

from __future__ import annotations

from typing import NamedTuple

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.models.decoder import Decoder, PrunableLinear

# Products with both factors, ``2 R C (R + C)`` operations each, that a selection and an update take, in those of full
# precision: an estimate.
_PRODUCTS = 4


def choose_owners(decoder: Decoder, count: int, *, in_turn: bool = False) -> dict[str, int]:
    """The rank, of ``count``, that owns each linear, by its name: no rank is to have much more work or memory.

    The dearest goes first, to the rank whose share of all work or all memory, whichever is more, stays least with it.
    Linears that share their input go together, whose factor ``A`` is inverted once; ``in_turn``, where nothing else
    can be worked on meanwhile (a sequential update), they are shared out among the ranks.
    """
    groups: dict[str, list[PrunableLinear]] = {}
    for linear in decoder.linears:
        groups.setdefault(linear.input_group, []).append(linear)
    loads = _Loads(decoder, count)
    if in_turn:
        return {linear.name: rank for group in groups.values() for linear, rank in _shared_out(group, loads)}
    ordered = sorted(groups.values(), key=lambda group: -sum(map(work_of, group)))
    return {linear.name: rank for group in ordered for rank in [loads.give(group)] for linear in group}


class Shares(NamedTuple):
    """Largest shares of a rank in what all ranks do.

    Attributes:
        windows: of the passes over the data.
        work: of factorisations, selections and solutions.
        factors: of what factors take, of which ranks whose linears read one input each have its own ``A``.
    """

    windows: float
    work: float
    factors: float


def largest_shares(decoder: Decoder, config: PruneConfig, count: int) -> Shares:
    """Shares of a run of ``config`` on so many ranks; linears that wait for each other have theirs in turn."""
    owners = choose_owners(decoder, count, in_turn=config.sequential)
    work: dict[str, list[float]] = {}
    inputs: list[dict[str, int]] = [{} for _ in range(count)]  # of every rank C² of those that its linears read
    outputs = [0] * count  # R² of its linears
    for linear in decoder.linears:
        turn = linear.input_group if config.sequential else ""
        work.setdefault(turn, [0.0] * count)[owners[linear.name]] += work_of(linear)
        inputs[owners[linear.name]][linear.input_group] = linear.columns**2
        outputs[owners[linear.name]] += linear.rows**2
    whole = sum(sum(of_ranks) for of_ranks in work.values())
    every = {name: square for of_rank in inputs for name, square in of_rank.items()}
    most = max(sum(of_rank.values()) + squares for of_rank, squares in zip(inputs, outputs, strict=True))
    return Shares(
        -(-config.samples // count) / config.samples,
        sum(max(of_ranks) for of_ranks in work.values()) / whole,
        most / (sum(every.values()) + sum(outputs)),
    )


def _shared_out(group: list[PrunableLinear], loads: _Loads) -> list[tuple[PrunableLinear, int]]:
    busy = [0.0] * loads.count
    found = []
    for linear in sorted(group, key=lambda linear: -work_of(linear)):
        rank = min(range(loads.count), key=lambda rank: (busy[rank], loads.after(rank, [linear])))
        busy[rank] += work_of(linear)
        loads.add(rank, [linear])
        found.append((linear, rank))
    return found


class _Loads:
    """Shares of all work and of all memory that ranks have been given."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        self.count = count
        self._whole = sum(map(work_of, decoder.linears)), sum(map(_numbers, decoder.linears))
        self._shares = [(0.0, 0.0)] * count

    def after(self, rank: int, linears: list[PrunableLinear]) -> float:
        """The larger of both shares of ``rank`` with ``linears``."""
        return max(self._with(rank, linears))

    def add(self, rank: int, linears: list[PrunableLinear]) -> None:
        self._shares[rank] = self._with(rank, linears)

    def give(self, linears: list[PrunableLinear]) -> int:
        rank = min(range(self.count), key=lambda rank: self.after(rank, linears))
        self.add(rank, linears)
        return rank

    def _with(self, rank: int, linears: list[PrunableLinear]) -> tuple[float, float]:
        work, memory = self._shares[rank]
        return (
            work + sum(map(work_of, linears)) / self._whole[0],
            memory + sum(map(_numbers, linears)) / self._whole[1],
        )


def work_of(linear: PrunableLinear) -> float:
    """Operations that a linear takes: inverses of both factors, and products with them."""
    R, C = linear.rows, linear.columns
    return R**3 + C**3 + _PRODUCTS * 2.0 * R * C * (R + C)


def _numbers(linear: PrunableLinear) -> float:
    """Numbers of its packed factors."""
    return (linear.rows**2 + linear.columns**2) / 2
