"""A run as its shots see it, and the shot objects that it calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from llm_surgeon.checkpoint.run_states import RunStates
from llm_surgeon.checkpoint.states import State, part
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature, estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import Ranks
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.passes import compute_dtype, mean_loss
from llm_surgeon.planning.owners import choose_owners
from llm_surgeon.planning.plan import Plan
from llm_surgeon.progress import Progress
from llm_surgeon.report.schema import ShotReport

_logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

# Tokens for each input of the widest linear from which on weights of tokens pay: an estimate.
_TOKENS_PER_INPUT = 64


@dataclass(eq=False)
class Run:
    """A pruning run as all its shots see it.

    Attributes:
        model: the causal LM that ``decoder`` is part of, pruned in place.
        calibration: windows that curvature and losses are measured on; their ranks are those of the run.
        config: what to prune and how.
        plan: the layout: device, windows per batch, blocks per pass, what is kept.
        correction_data: what low-rank corrections learn from; the calibration windows where left out.
        held_out: windows that the loss is measured on before the first and after the last shot.
        step_windows: windows that the lengths of gradient steps are found on; some of the calibration windows where
            left out.
        evaluation: windows of another text that the loss is measured on like that of ``held_out``.
        states: takes what it has come to, and has what an interrupted one had come to.
        left_out: numbers of windows that the run goes without, among those that were given, by their attribute.
        said: sentences for the report on what did not go as planned.
    """

    model: Any
    decoder: Decoder
    calibration: Calibration
    config: PruneConfig
    plan: Plan
    progress: Progress = field(default_factory=Progress)
    correction_data: Calibration | None = None
    held_out: Calibration | None = None
    step_windows: Calibration | None = None
    evaluation: Calibration | None = None
    states: RunStates = field(default_factory=RunStates)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> Ranks:
        """The processes that share the run."""
        return self.calibration.ranks

    @cached_property
    def owners(self) -> dict[str, int]:
        """The rank that owns each linear, by its name."""
        return self.owners_of(self.decoder, in_turn=self.config.sequential)

    def owners_of(self, decoder: Decoder, *, in_turn: bool = False) -> dict[str, int]:
        """The same where only the linears of ``decoder`` are worked on, all or those of one input at a time."""
        return choose_owners(decoder, self.ranks.count, in_turn=in_turn)

    @cached_property
    def own_linears(self) -> list[PrunableLinear]:
        """The linears that this rank owns."""
        return [linear for linear in self.decoder.linears if self.owners[linear.name] == self.ranks.index]

    def loss(self, windows: Calibration | None = None) -> float:
        """Mean token loss of ``windows``, or of the calibration windows, nats per token, as many tokens at once.

        Of the calibration windows in the dtype that curvature passes, whose losses it is compared with, compute in.
        """
        dtype = self.compute_dtype if windows is None else None
        windows = self.calibration if windows is None else windows
        tokens = self.plan.batch_size * self.calibration.input_ids.shape[1]
        return mean_loss(self.model, windows, max(1, tokens // windows.input_ids.shape[1]), dtype)

    def curvature(self, draw: int, decoder: Decoder | None = None, **options: Any) -> Curvature:
        """Estimate the curvature of the model as it is, of all linears or those of ``decoder``, as the run is laid out.

        Args:
            draw: sampled labels are others for every number.
            **options: further ones of :func:`~llm_surgeon.curvature.estimate.estimate_curvature`.
        """
        return estimate_curvature(
            self.model,
            self.decoder if decoder is None else decoder,
            self.calibration,
            batch_size=self.plan.batch_size,
            fisher=self.config.fisher,
            seed=self.config.seed + draw,
            dtype=self.compute_dtype,
            checkpoint_activations=self.plan.checkpoint_activations,
            progress=self.progress.step,
            **options,
        )

    @cached_property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of the products in passes over the calibration windows; None for the model's own."""
        return compute_dtype(self.config.compute_dtype, self.model, self.plan.device)

    @cached_property
    def token_weights(self) -> bool:
        """True where tokens are weighed by their gradients; unless that is given, where there are enough of them.

        Weights leave fewer tokens to tell one input of a linear from another.
        """
        if self.config.token_weights is not None:
            return self.config.token_weights
        widest = max(linear.columns for linear in self.decoder.linears)
        return self.calibration.counts()[1] >= _TOKENS_PER_INPUT * widest

    def leave_out(self, windows: str, positions: Sequence[int]) -> list[int]:
        """Go on without some windows of an attribute ``windows``; their numbers among those that were given."""
        held, left_out = getattr(self, windows), self.left_out.setdefault(windows, [])
        count = len(held.input_ids) + len(left_out)
        numbers = [number for number in range(count) if number not in left_out]
        gone = [numbers[position] for position in positions]
        left_out += gone
        setattr(self, windows, held.without(positions))
        return gone

    def say(self, sentence: str) -> None:
        """Tell the user, and the report."""
        _logger.warning("%s", sentence)
        self.said.append(sentence[0].upper() + sentence[1:] + ".")

    def weights(self, depth: int | None = None) -> dict[str, Tensor]:
        """What a run may write of the model, for a :class:`State`: all parameters, or those of the linears alone.

        With ``depth`` those of the linears of one block.
        """
        chosen = [linear for linear in self.decoder.linears if depth in (None, linear.depth)]
        linears = {id(p) for linear in chosen for p in linear.module.parameters(recurse=False)}
        everything = self.config.structure_record.whole_model and depth is None
        named = self.model.named_parameters()
        return part("weight", {name: p.detach() for name, p in named if everything or id(p) in linears})

    @torch.no_grad()
    def write_weights(self, state: State) -> None:
        """Write :meth:`weights` of ``state``, some of them at least."""
        for name, weight in state.part("weight").items():
            self.model.get_parameter(name).copy_(weight)

    def each(self, items: Iterable[T], name: Callable[[T], str]) -> Iterator[T]:
        """Yield ``items``, and tell which is under way."""
        every = list(items)
        for done, item in enumerate(every):
            self.progress.step(done, len(every), name(item))
            yield item

    def each_linear(
        self, function: Callable[[PrunableLinear], T], linears: Sequence[PrunableLinear] | None = None
    ) -> Iterator[T]:
        """``function`` of every linear, or of ``linears``, by its owner; see :meth:`each_owned`."""
        return self.each_owned(self.decoder.linears if linears is None else linears, lambda linear: linear, function)

    def each_owned(
        self,
        items: Iterable[S],
        linear_of: Callable[[S], PrunableLinear],
        function: Callable[[S], T],
        owners: Mapping[str, int] | None = None,
    ) -> Iterator[T]:
        """``function`` of every item, by the owner of its linear, and tell which is under way.

        Results are on every rank, see :meth:`~llm_surgeon.distributed.Ranks.spread`.
        """
        every, whose = list(items), self.owners if owners is None else owners

        def owner(item: S) -> int:
            return whose[linear_of(item).name]

        own = self.each((item for item in every if owner(item) == self.ranks.index), lambda item: linear_of(item).name)
        return self.ranks.spread(every, owner, lambda _: function(next(own)))

    def publish(self, linears: Sequence[PrunableLinear], owners: Mapping[str, int] | None = None) -> None:
        """Give every rank the weights that the owners of ``linears`` have written."""
        whose = self.owners if owners is None else owners
        for linear in linears:
            linear.share(self.ranks, whose[linear.name])


class Shot:
    """One round of measure, select, update.

    Attributes:
        fraction: of what the whole run removes, what is to be gone after this shot.
        last: no shot follows. A structure that cannot tell beforehand says so while it selects or updates.
        report: the shot's own; ``measure``, ``select`` and ``update`` fill in what they find.
    """

    def __init__(self, index: int, fraction: float, last: bool, report: ShotReport, progress: Progress) -> None:
        self.index, self.fraction, self.last, self.report = index, fraction, last, report
        self._progress, self._begun = progress, 0.0
        self._phase: str | None = None

    def phase(self, name: str) -> None:
        """Begin a phase, which ends the one before: its seconds go into the report."""
        self.end_phase()
        self._progress.phase(name)
        self._phase, self._begun = name, time.perf_counter()

    def end_phase(self) -> None:
        """End the phase under way, if there is one, once the device has done its work."""
        if self._phase is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.report.seconds[self._phase] = time.perf_counter() - self._begun
            self._phase = None


class Shots(Protocol):
    """The shot object of a structure: what differs between structures in a run, which ``runner.run_shots`` carries out.

    It is made of a :class:`Run`, once the model has been checked. The constructor finds what can be removed, takes no
    memory to speak of, changes nothing, and raises an :class:`InputError` or an :class:`UnsupportedModelError` where
    the sparsity cannot be met or the model cannot do without. Then come ``begin``, for every shot ``measure``,
    ``select``, ``update`` and ``state``, and ``finish``; in a run that goes on, ``restore`` after ``begin``. What one
    call leaves to the next the object keeps, and lets go of as soon as it can: factors and gradients are as large as
    the model.

    Attributes:
        selections: of every linear of the decoder what is pruned so far, ``[R, C]``; read after every update.
    """

    selections: list[Selection]

    def removal(self) -> str:
        """Say what goes, with the numbers of this run: the end of the sentence "would remove ..."."""

    def begin(self, resources: ExitStack) -> None:
        """Make what the shots share, empty ``selections`` included; ``resources`` are closed after the last shot."""

    def pruned(self) -> AbstractContextManager[object]:
        """Context manager in which the model computes what it will once it is finished."""

    def measure(self, shot: Shot) -> float:
        """Measure what the costs of this shot need, on the model as the last shot left it.

        Returns:
            The mean loss of the calibration windows, nats per token: mostly a by-product, else ``run.loss()``.
        """

    def select(self, shot: Shot) -> None:
        """Choose what is to be gone after this shot, ``shot.fraction`` of all, what went earlier included.

        Sets ``selections``, and ``shot.report.threshold`` where one cost bounds what goes. No weight changes.
        """

    def update(self, shot: Shot) -> None:
        """Make what was selected zero, and let the rest compensate for it.

        Sets ``shot.report.predicted_increase``, ``solver`` and ``jitter`` where they are known, ``selections`` again
        where they became others, and ``shot.last`` where only this tells. Further work begins a phase of its own.
        """

    def state(self) -> State:
        """What this shot leaves to the next one: of the model (``run.weights()``, where it writes any) and here.

        Nothing of it may be changed before the next shot's ``update``: other threads copy it meanwhile.
        """

    def restore(self, state: State) -> None:
        """Go on from the :meth:`state` of another run; called after ``begin``, on the dense model."""

    def finish(self) -> None:
        """Take what is zero out of the model for good, where the structure makes it smaller; last call of a run."""
