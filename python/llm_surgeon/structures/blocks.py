"""Removal of whole decoder blocks: the cheapest by measured loss, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.capture import mean_loss
from llm_surgeon.config import GRADIENT_IMPORTANCES, PruneConfig
from llm_surgeon.errors import InputError, NumericalError, UnsupportedModelError
from llm_surgeon.models import Decoder
from llm_surgeon.report.schema import ShotReport
from llm_surgeon.select import Selection
from llm_surgeon.shots import ShotLoop
from llm_surgeon.structures.importance import line_importance, weight_gradients
from llm_surgeon.structures.narrow import check_reloads, probe_logits, same_logits, undone_on_failure
from llm_surgeon.structures.reconstruct import reconstruct
from llm_surgeon.structures.residual import find_ends


class BlockLoop(ShotLoop):
    """Removes the fewest whole blocks that hold the sparsity asked for, one per shot.

    With ``importance="kronecker"`` a block's cost is the rise of the calibration loss without it, measured by a
    forward pass for every block still there: a block is no small perturbation that curvature could tell of. The other
    importances are those of its weights, summed. With ``reconstruct`` the blocks that stay take over, by least squares,
    what a linear map can of those that go.
    """

    def _run(self) -> None:
        config = self.config
        self._sizes, target = reachable_blocks(self.decoder, config)
        if config.reconstruct:
            try:
                self._writers = {writer.kind for writer in find_ends(self.model, self.decoder)[1]}
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{error}; blocks can be removed with reconstruct false") from error
        self.removed: list[int] = []
        while sum(self._sizes[depth] for depth in self.removed) < target:
            self._shot(len(self.removed) + 1)
        if config.reconstruct:
            with self._phase("reconstruction", self.reports[-1].seconds):
                self._reconstruct()
        with skipped(self.decoder.blocks, self.removed):
            self._record_loss_after(self.reports[-1], mean_loss(self.model, self.calibration, self.batch_size))

    def finish(self) -> None:
        """Take the blocks out of the model."""
        remove_blocks(self.model, self.decoder, self.removed)

    def _shot(self, index: int) -> None:
        seconds: dict[str, float] = {}
        left = [d for d in range(len(self.decoder.blocks)) if d not in {*self.removed, *self.config.skipped_layers}]
        with self._phase("selection", seconds):
            with skipped(self.decoder.blocks, self.removed):
                loss = mean_loss(self.model, self.calibration, self.batch_size)
                costs = self._costs(left, loss)
            chosen = min(left, key=lambda depth: costs[depth])
            self.removed.append(chosen)
            after = costs[chosen] if self.config.importance == "kronecker" else None
        for position, linear in enumerate(self.decoder.linears):
            if linear.depth == chosen:
                everything = torch.ones_like(self.selections[position].pruned)
                self.selections[position] = Selection.of_rows_columns(everything[:, 0], everything[0])
        gone = self._sparsity()
        self.reports.append(ShotReport(index, gone, gone, loss_before=loss, predicted_increase=after, seconds=seconds))
        if index > 1:
            self._record_loss_after(self.reports[-2], loss)

    def _reconstruct(self) -> None:
        self._before_update()
        reconstruct(
            self.model,
            self.decoder,
            self.decoder.blocks,
            self._writers,
            self.calibration,
            damping=self.config.damp_a,
            batch_size=self.batch_size,
            skipped=self.removed,
            progress=self.progress.step,
        )

    def _costs(self, left: list[int], loss: float) -> dict[int, float]:
        importance = self.config.importance
        costs = {}
        if importance == "kronecker":
            for done, depth in enumerate(left):
                self.progress.step(done, len(left), f"block {depth}")
                with skipped(self.decoder.blocks, [*self.removed, depth]):
                    costs[depth] = mean_loss(self.model, self.calibration, self.batch_size) - loss
            return costs
        if importance == "random":
            generator = torch.Generator().manual_seed(self.config.seed + len(self.removed))
            return dict(zip(left, torch.rand(len(left), generator=generator).tolist(), strict=True))
        gradients = None
        linears = [linear for linear in self.decoder.linears if linear.depth in left]
        if importance in GRADIENT_IMPORTANCES:
            weights = [linear.module.get_parameter("weight") for linear in linears]
            gradients = weight_gradients(self.model, weights, self.calibration, self.progress.step)
        costs = dict.fromkeys(left, 0.0)
        for linear in linears:
            costs[linear.depth] += float(line_importance(linear, importance, gradients, dim=1).sum())
        return costs


def reachable_blocks(decoder: Decoder, config: PruneConfig) -> tuple[list[int], int]:
    """Weights of every block, and how many must go; :class:`InputError` where ``config`` cannot be met."""
    assert config.sparsity is not None
    blocks = len(decoder.blocks)
    sizes = [0] * blocks
    for linear in decoder.linears:
        sizes[linear.depth] += linear.rows * linear.columns
    if config.skipped_layers and max(config.skipped_layers) >= blocks:
        raise InputError(f"skip_layers names block {max(config.skipped_layers)}, and the model has {blocks}")
    target = math.ceil(config.sparsity * sum(sizes) - 1e-6)
    candidates = sum(size for depth, size in enumerate(sizes) if depth not in config.skipped_layers)
    if config.skip_layers and candidates < target:
        raise InputError(f"sparsity {config.sparsity:g} cannot be met while blocks {config.skip_layers} stay")
    if blocks == 1 or target > sum(sizes) - min(sizes):
        stay = f"one of {blocks} blocks" if blocks > 1 else "its only block"
        raise InputError(f"sparsity {config.sparsity:g} would empty the model: {stay} must stay")
    return sizes, target


def remove_blocks(model: PreTrainedModel, decoder: Decoder, removed: list[int]) -> None:
    """Take decoder blocks out of ``model``: the list, the blocks' own numbers, and the configuration.

    Raises:
        NumericalError: the shorter model computes something else than the model that skips the blocks; it is as it was.
    """
    with skipped(decoder.blocks, removed):
        before = probe_logits(model)
    blocks = len(decoder.blocks)
    kept = [depth for depth in range(blocks) if depth not in removed]
    name = decoder.linears[0].name.removesuffix(f".{decoder.linears[0].depth}.{decoder.linears[0].kind}")
    with undone_on_failure(model):
        config: Any = model.config
        changes = [
            {key: getattr(config.per_layer_config[depth], key) for key in config.per_layer_attributes or ()}
            for depth in kept
        ]
        if config.per_layer_attributes:
            config.per_layer_config = None
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == blocks:  # one entry for each block: their types
                setattr(config, key, [value[depth] for depth in kept])
        config.num_hidden_layers = len(kept)
        if any(changes):
            config.per_layer_config = dict(enumerate(changes))
        modules = getattr(config, "pruned_modules", {})
        if modules:
            config.pruned_modules = {str(n): modules[str(d)] for n, d in enumerate(kept) if str(d) in modules}
        for position, depth in enumerate(kept):
            for module in decoder.blocks[depth].modules():
                if vars(module).get("layer_idx") == depth:
                    vars(module)["layer_idx"] = position
        model.set_submodule(name, nn.ModuleList(decoder.blocks[depth] for depth in kept))
        if not same_logits(probe_logits(model), before):
            raise NumericalError("the shorter model's logits differ from those of the model that skips the blocks")
        check_reloads(model)


@contextmanager
def skipped(blocks: list[nn.Module], removed: list[int]) -> Iterator[None]:
    """Blocks pass their input on, for a while."""

    def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden

    handles = [blocks[depth].register_forward_hook(forward, with_kwargs=True) for depth in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
