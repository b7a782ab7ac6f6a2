"""Structures as records: which weights go together, what that leaves of a model, and defaults that depend on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llm_surgeon.checks import meant, require_choice, shown
from llm_surgeon.config.reference import resolve
from llm_surgeon.config.registry import Registry
from llm_surgeon.errors import InputError

# Options that have a meaning for some structures only.
SPECIAL_OPTIONS = (
    "importance",
    "round_to",
    "uniform",
    "skip_layers",
    "reconstruct",
    "lora_rank",
    "gradient_steps",
    "offload",
    "curvature_layers",
)


@dataclass(frozen=True)
class Structure:
    """A structure: which weights go together.

    Attributes:
        name: the value of the option ``structure``, such as ``"groups"`` or ``"2:4"``.
        shots: class of its shot object, see :class:`~llm_surgeon.shots.run.Shots`: itself, or ``"module:class"``,
            which is imported when a run needs it.
        title: what goes, in words.
        coupled: coupled groups go, for good: the model becomes smaller. Otherwise zeros stay in their places.
        single_weights: weights are chosen one by one, rather than in whole rows and columns.
        whole_model: a run writes parameters beyond those of the decoder's linears.
        updates: how surviving weights may compensate.
        options: those of :data:`SPECIAL_OPTIONS` that have a meaning for it.
        sparsity: the fraction of weights that it removes; ``None`` where the user chooses it.
        default_sparsity: the fraction where the user chooses none.
        default_shots: the number of shots for a sparsity, of methods that estimate their costs anew in each.
        shots_in: ``(decoder, config)`` to the number of shots where the model tells it, which raises an
            :class:`InputError` where ``config`` cannot be met: itself, or ``"module:function"``.
        damp_g: default of the option.
        n, m: of N:M, which keeps ``n`` of every ``m`` weights; else 0.

    Raises:
        InputError: an option is none of :data:`SPECIAL_OPTIONS`.
    """

    name: str
    shots: str | Callable[..., Any]
    title: str = ""
    coupled: bool = False
    single_weights: bool = False
    whole_model: bool = False
    updates: tuple[str, ...] = ("joint", "none")
    options: frozenset[str] = frozenset()
    sparsity: float | None = None
    default_sparsity: float = 0.3
    default_shots: Callable[[float], int] = lambda sparsity: 5
    shots_in: str | Callable[..., int] | None = None
    damp_g: float = 0.01
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        for option in sorted(self.options):
            require_choice(f"option of structure {self.name!r}", option, SPECIAL_OPTIONS)

    @classmethod
    def parse(cls, text: str) -> Structure:
        """The structure of that name, or N:M.

        Raises:
            InputError: there is none.
        """
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text) if isinstance(text, str) else None
        if match is None:
            if text not in names():
                choices = ", ".join(map(repr, names()))
                raise InputError(
                    f"unknown structure {shown(text)}{meant(text, names())}: choose {choices} or N:M, such as '2:4'"
                )
            return _structures.find(text)
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise InputError(f"structure {text!r} keeps {n} of every {m} weights: N:M needs 0 < N < M")
        title = f"{m - n} of every {m} consecutive weights of a row"
        return replace(_structures.find("unstructured"), name=text, title=title, sparsity=(m - n) / m, n=n, m=m)

    @property
    def shot_class(self) -> Callable[..., Any]:
        """The class of its shot object, imported."""
        return resolve(self.shots, f"structure {self.name!r}")

    def count_shots(self, decoder: Any, config: Any) -> int:
        """The number of shots that ``config`` takes with the model of ``decoder``.

        Raises:
            InputError: ``config`` cannot be met, as far as the sizes of the layers tell.
        """
        if self.shots_in is None:
            return config.shots
        return resolve(self.shots_in, f"structure {self.name!r}")(decoder, config)

    @property
    def packs(self) -> bool:
        """True where GPUs have sparse matrix products, which models can be packed for: 2:4."""
        return (self.n, self.m) == (2, 4)


def register(structure: Structure) -> None:
    """Add a structure, which ``structure=`` then takes wherever one is named.

    Raises:
        InputError: another one has its name.
    """
    _structures.register(structure)


def names() -> list[str]:
    """Names of all structures but N:M, those of entry points included, which are not imported for it."""
    return _structures.names()


def structures_with(option: str) -> list[str]:
    """Names of the structures that an option of :data:`SPECIAL_OPTIONS` has a meaning for, for messages."""
    found = _structures.where(lambda structure: option in structure.options)
    return [name for each in found for name in ((each, "N:M") if each == "unstructured" else (each,))]


_OF_WEIGHTS = frozenset({"lora_rank", "offload", "curvature_layers"})
_WEIGHTS = "llm_surgeon.shots.weights:WeightShots"
_structures = Registry(
    "structure",
    Structure,
    (
        Structure(
            "unstructured",
            _WEIGHTS,
            "single weights, anywhere in a matrix",
            single_weights=True,
            updates=("joint", "chunked", "independent", "none", "sequential"),
            options=_OF_WEIGHTS | {"gradient_steps"},
            default_sparsity=0.5,
            damp_g=0.1,
        ),
        Structure(
            "rows-columns",
            _WEIGHTS,
            "whole rows and columns of the weight matrices",
            updates=("joint", "independent", "none"),
            options=_OF_WEIGHTS | {"reconstruct"},
            default_shots=lambda sparsity: max(1, round(80 * sparsity)),
        ),
        Structure(
            "groups",
            "llm_surgeon.structures.groups:GroupShots",
            "neurons and attention heads, taken out of the model",
            coupled=True,
            options=frozenset(
                {"importance", "round_to", "uniform", "skip_layers", "reconstruct", "lora_rank", "gradient_steps"}
            ),
        ),
        Structure(
            "width",
            "llm_surgeon.structures.width:WidthShots",
            "channels of the residual stream, taken out of the model",
            coupled=True,
            whole_model=True,
            options=frozenset({"importance", "round_to"}),
        ),
        Structure(
            "layers",
            "llm_surgeon.structures.layers:BlockShots",
            "whole decoder blocks, taken out of the model",
            coupled=True,
            options=frozenset({"importance", "skip_layers", "reconstruct"}),
            default_shots=lambda sparsity: 1,
            shots_in="llm_surgeon.structures.layers:count_blocks",
        ),
    ),
)
