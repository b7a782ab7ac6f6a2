"""Shots that narrow the residual stream: channels leave embeddings, norms, head, and every reader and writer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llm_surgeon.checkpoint.states import State
from llm_surgeon.config.prune import GRADIENT_IMPORTANCES, PruneConfig
from llm_surgeon.curvature.factors import DampedFactor, numerical_errors
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.loss import count_tokens, differentiable_loss, finite_loss
from llm_surgeon.models.passes import evaluation_mode, frozen, run_model, starting_at
from llm_surgeon.models.repeatable import repeatable
from llm_surgeon.shots.run import Run, Shot
from llm_surgeon.structures.find.residual import Residual, find_residual, kept_width
from llm_surgeon.structures.importance import line_importance, weight_gradients
from llm_surgeon.structures.remove.channels import remove_channels, zero_channels
from llm_surgeon.structures.remove.verify import undone
from surgeon_kernels import damp, gram_accumulate_, rows_columns_update


class WidthShots:
    """Removes channels of the residual stream, the same everywhere.

    What a channel costs at a norm's output x, all who read it compensating, is ``½ E[(∂L/∂x_c)²] / [A⁻¹]_cc`` with
    ``A = E[x xᵀ]``: the column costs of all readers together, as ``Wᵀ g`` summed over them is the gradient there. Its
    cost is the sum over all norms. The readers' other columns (not a head's tied to the embedding) compensate.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.decoder = run, run.config, run.decoder
        self.residual, self._goal = reachable_width(run.model, run.decoder, run.config)
        self.removed = torch.zeros(self.residual.width, dtype=torch.bool, device=run.plan.device)
        self.selections: list[Selection] = []
        self._generator = torch.Generator().manual_seed(run.config.seed)
        self._moments: _Moments | None = None  # of the shot that is under way

    def removal(self) -> str:
        residual, total = self.residual, self.decoder.weights
        weights = weights_removed(self.decoder, residual, self._goal)
        return (
            f"{residual.width - self._goal} of {residual.width} channels, {weights:,} of {total:,} weights, "
            f"{weights / total:.1%}"
        )

    def begin(self, resources: ExitStack) -> None:
        self.selections = self._as_selections()

    def pruned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, shot: Shot) -> float:
        self._moments = self._measure()
        return self._moments.loss

    def select(self, shot: Shot) -> None:
        assert self._moments is not None
        goal = round(shot.fraction * (self.residual.width - self._goal))
        costs = self.run.ranks.broadcast_(self._costs(self._moments)).masked_fill(self.removed, -torch.inf)
        chosen = costs.argsort(stable=True)[:goal]
        if self.config.importance == "kronecker":
            shot.report.predicted_increase = float(costs[chosen].clamp_min(0.0).sum())
        self.removed[chosen] = True
        self.selections = self._as_selections()

    def update(self, shot: Shot) -> None:
        assert self._moments is not None
        self._update_readers(self._moments)
        zero_channels(self.residual, self.removed)
        self._moments = None  # what follows needs the memory

    def state(self) -> State:
        drawn = {"generator": self._generator.get_state()}
        return State({**self.run.weights(), "removed": self.removed.clone(), **drawn}, {})

    def restore(self, state: State) -> None:
        self.run.write_weights(state)
        self.removed.copy_(state.tensors["removed"])
        self._generator.set_state(state.tensors["generator"])
        self.selections = self._as_selections()

    def finish(self) -> None:
        """Take the channels out of the model."""
        remove_channels(self.run.model, self.decoder, self.residual, self.removed)

    def _as_selections(self) -> list[Selection]:
        """Rows and columns of every linear that are gone."""
        return [
            Selection.of_rows_columns(
                self._mask(linear.rows, linear in self.residual.writers),
                self._mask(linear.columns, linear in self.residual.readers),
            )
            for linear in self.decoder.linears
        ]

    def _mask(self, size: int, whole: bool) -> Tensor:
        return self.removed if whole else torch.zeros(size, dtype=torch.bool, device=self.removed.device)

    def _measure(self) -> _Moments:
        """Second moments of every norm's output, with a constant 1 appended, and of the loss's gradient there."""
        run = self.run
        found = _Moments(self.residual.width, self.residual.norms, self.removed.device)
        _, targets = count_tokens(run.model, run.calibration)
        size = run.plan.batch_size
        batches, total = -(-len(run.calibration.input_ids) // size), 0.0
        with (
            frozen(run.model),
            evaluation_mode(run.model),
            repeatable(),
            found.hooked(run.model, self.residual.readers),
            torch.enable_grad(),
        ):
            for done, (ids, mask) in enumerate(run.calibration.batches(size, run.plan.device), 1):
                loss = differentiable_loss(run_model(run.model, ids, mask).logits, ids, mask, "sum")
                loss.backward()
                total += finite_loss(loss, done, batches, range((done - 1) * size, (done - 1) * size + len(ids)))
                run.progress.step(done, batches)
        ranks = run.ranks
        for sums in (*found.outputs.values(), *found.gradients.values()):
            ranks.sum_(sums)
        found.loss, found.tokens = ranks.total(total) / targets, targets
        return found

    def _costs(self, moments: _Moments) -> Tensor:
        importance, residual = self.config.importance, self.residual
        if importance == "kronecker":
            costs = torch.zeros(residual.width, device=self.removed.device)
            for norm in residual.norms:
                inverse = self._factor(moments, norm).inverse.diagonal()[: residual.width]
                costs += 0.5 * moments.gradients[norm] / moments.tokens / inverse
            return costs
        if importance == "random":
            return torch.rand(residual.width, generator=self._generator).to(self.removed.device)
        gradients = None
        if importance in GRADIENT_IMPORTANCES:
            weights = [linear.module.get_parameter("weight") for linear in self.decoder.linears]
            gradients = weight_gradients(self.run.model, weights, self.run.calibration, self.run.progress.step)
        parts = [line_importance(linear, importance, gradients, dim=0) for linear in residual.readers]
        parts += [line_importance(linear, importance, gradients, dim=1) for linear in residual.writers]
        return torch.stack(parts).sum(dim=0)

    def _factor(self, moments: _Moments, norm: nn.Module) -> DampedFactor:
        """``A`` of a norm's output, channels that are gone left out."""
        A = moments.outputs[norm] / moments.tokens
        gone = functional.pad(self.removed, (0, 1))
        return DampedFactor.checked(A.masked_fill_(gone[:, None] | gone, 0.0), self.config.damp_a, "A of a norm")

    def _update_readers(self, moments: _Moments) -> None:
        """Remove the channels' columns from every reader; the others compensate."""
        compensate = self.config.update == "joint"
        for linear in self.residual.readers:
            weight = linear.matrix(torch.float32)  # as the moments are
            norm = moments.norm_of.get(linear.name)
            if compensate and norm is not None:
                A = damp(moments.outputs[norm] / moments.tokens, self.config.damp_a)
                weight = weight + self._delta(weight, A, linear.name)
            weight[:, : linear.columns][:, self.removed] = 0.0
            linear.write(weight)
        if not self.residual.tied:
            head = self.residual.head.weight
            weight = head.detach().float()
            if compensate:
                A = damp(moments.outputs[self.residual.final_norm] / moments.tokens, self.config.damp_a)
                weight = weight + self._delta(weight, A, "the output head")
            with torch.no_grad():
                head.copy_(weight.masked_fill(self.removed, 0.0))

    def _delta(self, weight: Tensor, A: Tensor, name: str) -> Tensor:
        size = weight.shape[1]
        columns = functional.pad(self.removed, (0, size - self.residual.width))
        no_rows = torch.zeros_like(weight[:, 0], dtype=torch.bool)
        with numerical_errors(f"update of {name}"):
            return rows_columns_update(weight, None, A[:size, :size], no_rows, columns, name=name)


def reachable_width(model: Any, decoder: Decoder, config: PruneConfig) -> tuple[Residual, int]:
    """The parameters with the residual width, and the width that ``config`` leaves.

    Raises:
        InputError: ``config`` cannot be met. UnsupportedModelError: the model cannot be narrower, which is tried.
    """
    residual = find_residual(model, decoder)
    heads = getattr(model.config, "num_attention_heads", 1)
    goal = kept_width(residual, config.sparsity, config.round_to, heads, config.min_kept)
    removed = torch.arange(residual.width, device=residual.head.weight.device) >= goal
    with undone(model):
        remove_channels(model, decoder, residual, removed, compared=False)  # for no channel is zero yet
    return residual, goal


def weights_removed(decoder: Decoder, residual: Residual, width: int) -> int:
    """Weights of the decoder's linears that go where the stream keeps ``width`` channels."""
    gone = residual.width - width
    total = 0
    for linear in decoder.linears:
        rows, columns = gone * (linear in residual.writers), gone * (linear in residual.readers)
        total += linear.rows * linear.columns - (linear.rows - rows) * (linear.columns - columns)
    return total


class _Moments:
    """Sums over tokens at the norms' outputs, filled by hooks.

    Attributes:
        outputs: norm -> ``Σ [x, 1] [x, 1]ᵀ``; gradients: norm -> ``Σ (∂L/∂x)²``; norm_of: reader -> the norm it reads.
    """

    def __init__(self, width: int, norms: list[nn.Module], device: torch.device) -> None:
        self.loss, self.tokens = 0.0, 0
        self.outputs = {norm: torch.zeros(width + 1, width + 1, device=device) for norm in norms}
        self.gradients = {norm: torch.zeros(width, device=device) for norm in norms}
        self.norm_of: dict[str, nn.Module] = {}
        self._norms = norms
        self._seen: dict[int, nn.Module] = {}  # address of a norm's output -> norm

    @contextmanager
    def hooked(self, model: Any, readers: list[Any]) -> Iterator[None]:
        with ExitStack() as hooks:
            hooks.enter_context(starting_at(model.get_input_embeddings()))
            for norm in self._norms:
                hooks.enter_context(norm.register_forward_hook(self._note_norm))
            for reader in readers:
                hooks.enter_context(reader.module.register_forward_pre_hook(partial(self._note_reader, reader.name)))
            yield

    def _note_norm(self, norm: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> None:
        gram_accumulate_(self.outputs[norm], x.detach().reshape(-1, x.shape[-1]).float(), ones_column=True)
        x.register_hook(partial(self._note_gradient, norm))
        self._seen[x.data_ptr()] = norm

    def _note_gradient(self, norm: nn.Module, g: Tensor) -> None:
        self.gradients[norm] += g.reshape(-1, g.shape[-1]).float().square().sum(dim=0)

    def _note_reader(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        norm = self._seen.get(args[0].data_ptr())
        if norm is not None:
            self.norm_of.setdefault(name, norm)
