"""Shots that remove whole decoder blocks: the cheapest by measured loss, one at a time."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack

import torch
from transformers import PreTrainedModel

from llm_surgeon.checkpoint.states import State
from llm_surgeon.config.prune import GRADIENT_IMPORTANCES, PruneConfig
from llm_surgeon.errors import InputError, UnsupportedModelError
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.shots.reconstruct import fit_to_dense
from llm_surgeon.shots.run import Run, Shot
from llm_surgeon.structures.find.residual import find_ends
from llm_surgeon.structures.importance import line_importance, weight_gradients
from llm_surgeon.structures.remove.blocks import remove_blocks, skipped
from llm_surgeon.structures.remove.verify import undone


class BlockShots:
    """Removes whole blocks, one per shot, as long as each brings the weights that are gone nearer to the sparsity.

    With ``importance="kronecker"`` a block's cost is the rise of the calibration loss without it, measured by a
    forward pass for every block still there: a block is no small perturbation that curvature could tell of. The other
    importances are those of its weights, summed. Of blocks of several sizes the cheapest per weight goes. With
    ``reconstruct`` the blocks that stay take over, by least squares, what a linear map can of those that go.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.decoder = run, run.config, run.decoder
        self._count = reachable_blocks(run.model, run.decoder, run.config)
        self.removed: list[int] = []
        self.selections: list[Selection] = []
        self._loss = 0.0  # of the shot that is under way

    def removal(self) -> str:
        weights, blocks = block_weights(self.decoder), len(self.decoder.blocks)
        if len(set(weights)) > 1:
            about = round(self.config.sparsity * sum(weights))
            return f"whole ones of {blocks} blocks of several sizes, about {about:,} of {sum(weights):,} weights"
        gone = sum(weights) * self._count // blocks
        return f"{self._count} of {blocks} blocks, {gone:,} of {sum(weights):,} weights, {self._count / blocks:.1%}"

    def begin(self, resources: ExitStack) -> None:
        self.selections = self._as_selections()

    def pruned(self) -> AbstractContextManager[None]:
        return skipped(self.decoder.blocks, self.removed)

    def measure(self, shot: Shot) -> float:
        with self.pruned():
            self._loss = self.run.loss()
        return self._loss

    def select(self, shot: Shot) -> None:
        left, weights = self._candidates(), block_weights(self.decoder)
        with self.pruned():
            costs = self._costs(left)
        chosen = min(left, key=lambda depth: costs[depth] / weights[depth])
        self.removed.append(chosen)
        self.selections = self._as_selections()
        shot.last = not self._candidates()
        # Whole blocks go: what is asked for after a shot is what it comes to.
        shot.report.target_sparsity = sum(weights[depth] for depth in self.removed) / sum(weights)
        if self.config.importance == "kronecker":
            shot.report.predicted_increase = costs[chosen]

    def update(self, shot: Shot) -> None:
        if self.config.reconstruct and shot.last:
            shot.phase("reconstruction")
            fit_to_dense(self.run, self.selections, skipped=self.removed)

    def state(self) -> State:
        fitted = self.config.reconstruct and not self._candidates()  # else no weight has changed
        return State(self.run.weights() if fitted else {}, {"removed": list(self.removed)})

    def restore(self, state: State) -> None:
        self.run.write_weights(state)
        self.removed = list(state.note["removed"])
        self.selections = self._as_selections()

    def finish(self) -> None:
        """Take the blocks out of the model."""
        remove_blocks(self.run.model, self.decoder, self.removed)

    def _as_selections(self) -> list[Selection]:
        """Rows and columns of every linear that are gone: all of some blocks."""
        selections = []
        for linear in self.decoder.linears:
            device, gone = linear.module.get_parameter("weight").device, linear.depth in self.removed
            rows, columns = (torch.full((size,), gone, device=device) for size in (linear.rows, linear.columns))
            selections.append(Selection.of_rows_columns(rows, columns, (linear.rows * gone, linear.columns * gone)))
        return selections

    def _candidates(self) -> list[int]:
        """Blocks that may go next and leave enough to go on with: at equal distances more goes, in any case a block."""
        weights = block_weights(self.decoder)
        left = [d for d in range(len(weights)) if d not in {*self.removed, *self.config.skipped_layers}]
        missing = self.config.sparsity * sum(weights) - sum(weights[depth] for depth in self.removed)
        nearer = [d for d in left if abs(missing - weights[d]) <= abs(missing) * (1 + 1e-9)]
        if len(self.removed) == len(weights) - 1:
            return []
        if not nearer:
            return [] if self.removed else [min(left, key=lambda depth: weights[depth])]
        enough = [d for d in nearer if not _out_of_reach(missing - weights[d], weights, set(left) - {d}, self.config)]
        return enough or nearer

    def _costs(self, left: list[int]) -> dict[int, float]:
        importance = self.config.importance
        costs = {}
        if importance == "kronecker":
            for depth in self.run.each(left, "block {}".format):
                with skipped(self.decoder.blocks, [depth]):
                    costs[depth] = self.run.loss() - self._loss
            return costs
        if importance == "random":
            generator = torch.Generator().manual_seed(self.config.seed + len(self.removed))
            return dict(zip(left, torch.rand(len(left), generator=generator).tolist(), strict=True))
        gradients = None
        linears = [linear for linear in self.decoder.linears if linear.depth in left]
        if importance in GRADIENT_IMPORTANCES:
            weights = [linear.module.get_parameter("weight") for linear in linears]
            gradients = weight_gradients(self.run.model, weights, self.run.calibration, self.run.progress.step)
        costs = dict.fromkeys(left, 0.0)
        for linear in linears:
            costs[linear.depth] += float(line_importance(linear, importance, gradients, dim=1).sum())
        return costs


def block_weights(decoder: Decoder) -> list[int]:
    """Weights of the linears of each block."""
    weights = [0] * len(decoder.blocks)
    for linear in decoder.linears:
        weights[linear.depth] += linear.rows * linear.columns
    return weights


def _out_of_reach(missing: float, weights: list[int], left: set[int], config: PruneConfig) -> bool:
    """True if the blocks ``left`` hold fewer than the ``missing`` weights; one of all blocks must stay."""
    free = [weights[depth] for depth in left]
    most = sum(free) - (0 if config.skip_layers else min(free, default=0))
    return missing - most > min(weights) / 2


def count_blocks(decoder: Decoder, config: PruneConfig) -> int:
    """Number of blocks that go: the one nearest to the sparsity, and one at least; about so many if their sizes differ.

    Raises:
        InputError: ``config`` cannot be met.
    """
    blocks, weights = len(decoder.blocks), block_weights(decoder)
    if config.skipped_layers and max(config.skipped_layers) >= blocks:
        raise InputError(f"skip_layers names block {max(config.skipped_layers)}, and the model has {blocks}")
    count = max(1, math.floor(config.sparsity * blocks + 0.5))
    if len(set(weights)) > 1:  # not their number matters
        free = set(range(blocks)) - config.skipped_layers
        missed = not free or _out_of_reach(config.sparsity * sum(weights), weights, free, config)
        count = blocks if missed else min(count, max(1, len(free) - (not config.skip_layers)))
    if config.skip_layers and blocks - len(config.skipped_layers) < count:
        raise InputError(f"sparsity {config.sparsity:g} cannot be met while blocks {config.skip_layers} stay")
    if count >= blocks:
        stay = f"one of {blocks} blocks" if blocks > 1 else "its only block"
        raise InputError(f"sparsity {config.sparsity:g} would empty the model: {stay} must stay")
    return count


def reachable_blocks(model: PreTrainedModel, decoder: Decoder, config: PruneConfig) -> int:
    """:func:`count_blocks`, once it was tried that the model can go without one.

    Raises:
        InputError: ``config`` cannot be met. UnsupportedModelError: the model cannot be shorter.
    """
    count = count_blocks(decoder, config)
    if config.reconstruct:
        try:
            find_ends(model, decoder)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}; blocks can be removed with reconstruct false") from error
    first = next(depth for depth in range(len(decoder.blocks)) if depth not in config.skipped_layers)
    with undone(model):
        remove_blocks(model, decoder, [first])
    return count
