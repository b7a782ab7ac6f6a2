"""Weights that updates start from."""

from __future__ import annotations

from torch import Tensor

from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.shots.run import Run


class AnchorWeights:
    """``[W | b]`` that updates move: of the last shot, or the dense ones, which are kept then (in ``memory``)."""

    def __init__(self, run: Run, memory: PinnedMemory) -> None:
        self._config, self._device, self._memory = run.config, run.plan.device, memory
        self._dense: dict[str, Tensor] = {}  # by linear, before the first shot
        self._moved = False

    def of(self, linear: PrunableLinear, weight: Tensor) -> Tensor:
        """The anchor of a linear, ``weight`` itself, as the last shot left it, where that is the anchor."""
        if not self._config.around_dense_weights:
            return weight
        if linear.name not in self._dense:
            own = weight.to(linear.weight.dtype)
            self._dense[linear.name] = self._memory.copy(own) if self._config.offloads else own
            return weight
        return self._dense[linear.name].to(self._device, non_blocking=True).to(weight.dtype)

    def state(self) -> dict[str, Tensor]:
        """The anchors by linear, where they are no longer the dense weights."""
        return dict(self._dense) if self._moved else {}

    def restore(self, linears: list[PrunableLinear], state: dict[str, Tensor]) -> None:
        """Take the anchors of ``linears``, the dense model's still, or of a :meth:`state`."""
        for linear in linears:
            self.of(linear, linear.matrix(device=self._device))
        for name, anchor in state.items():
            self._dense[name].copy_(anchor)
        self._moved = bool(state)

    def follow(self, linear: PrunableLinear, change: Tensor) -> None:
        """Move the anchor of a linear, too, whose weights were moved by ``-change``."""
        if linear.name in self._dense:
            self._dense[linear.name] -= change.to(self._device)
            self._moved = True
