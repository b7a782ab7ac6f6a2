"""Pruning methods as records: what each needs, how its costs compare, and where its functions are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llm_surgeon.checks import require_choice
from llm_surgeon.config.reference import resolve
from llm_surgeon.config.registry import Registry
from llm_surgeon.errors import InputError

Update = Literal["sequential", "joint", "chunked", "independent", "none"]
UPDATES: tuple[Update, ...] = get_args(Update)
NEEDS = ("nothing", "activations", "gradients")
COMPARISONS = ("network", "layer", "row")


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Its functions are named ``"module:function"``, and imported when they are used, or given themselves.

    Attributes:
        name: the value of the option ``method``.
        title: a few words for reports; the name where left out.
        paper: where it is described, for model cards.
        needs: what calibration data are for: ``"nothing"``, ``"activations"`` (A) or ``"gradients"`` (G and A).
        comparison: within what costs are compared: in the ``"network"`` they estimate the loss itself and share one
            global threshold; else each ``"layer"``, or each ``"row"`` of single weights, has the same sparsity.
        rows_columns: whether whole rows and columns have a cost.
        coupled: whether coupled groups, which make the model smaller, have a cost.
        updates: how the surviving weights can compensate, the default first. All but ``"none"`` need gradients, and
            invert the damped factors. Of a ``sweep``, which compensates by itself, ``"none"``, and ``"sequential"``
            where it can aim at what the dense model computes.
        costs: function ``(linear, factors)`` of a :class:`~llm_surgeon.models.decoder.PrunableLinear` ``[R, C']`` (C' =
            C + 1 with a bias) and :class:`~llm_surgeon.curvature.factors.DampedFactors`, None where nothing is needed.
            These know their ``diagonals``; with gradients also ``inverse_diagonals`` and the matrices, ``of``. It
            returns ``g`` ``[R]`` and ``a`` ``[C']`` of the costs ``½ W² g aᵀ``, or these, ``[R, C']``; not negative.
        line_costs: function ``(linear, factors)`` that returns the costs of rows ``[R]`` and columns ``[C]``; the sums
            of ``costs`` where left out.
        sweep: function ``(model, decoder, calibration, config, progress)`` that selects and updates layer after layer,
            in place of ``costs``, and returns the pruned mask ``[R, C]`` of every linear by name.

    Raises:
        InputError: a value is none of its choices, or there is not one of ``costs`` and ``sweep``.
    """

    name: str
    title: str = ""
    paper: str = ""
    needs: Literal["nothing", "activations", "gradients"] = "nothing"
    comparison: Literal["network", "layer", "row"] = "layer"
    rows_columns: bool = False
    coupled: bool = False
    updates: tuple[str, ...] = ("none",)
    costs: str | Callable[..., Any] | None = None
    line_costs: str | Callable[..., Any] | None = None
    sweep: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        require_choice(f"needs of method {self.name!r}", self.needs, NEEDS)
        require_choice(f"comparison of method {self.name!r}", self.comparison, COMPARISONS)
        for update in self.updates:
            require_choice(f"update of method {self.name!r}", update, UPDATES)
        if not self.updates or (self.compensates and not self.gradients):
            raise InputError(
                f"updates of method {self.name!r} must name one at least, and others than none need gradients"
            )
        if (self.costs is None) == (self.sweep is None):
            raise InputError(f"method {self.name!r} must have either costs or a sweep")

    @property
    def gradients(self) -> bool:
        """True where both factors are estimated, by backward passes, rather than ``A`` or nothing."""
        return self.needs == "gradients"

    @property
    def curvature(self) -> bool:
        """True where factors are estimated before selection."""
        return self.needs != "nothing" and self.sweep is None

    @property
    def comparable(self) -> bool:
        """True where costs of layers compare with each other."""
        return self.comparison == "network"

    @property
    def compensates(self) -> bool:
        """True where surviving weights can be updated, which takes the inverses of the damped factors."""
        return self.sweep is None and any(update != "none" for update in self.updates)

    def function(self, field: Literal["costs", "line_costs", "sweep"]) -> Callable[..., Any]:
        """The function that ``field`` gives or names, imported.

        Raises:
            InputError: it cannot be imported.
        """
        return resolve(getattr(self, field), f"method {self.name!r}")


_COSTS = "llm_surgeon.methods.costs"
_methods = Registry(
    "method",
    Method,
    (
        Method(
            "surgeon",
            "LLM Surgeon: Kronecker-factored curvature of the loss",
            "The LLM Surgeon (van der Ouderaa et al., ICLR 2024)",
            needs="gradients",
            comparison="network",
            rows_columns=True,
            coupled=True,
            updates=UPDATES,
            costs=f"{_COSTS}:surgeon_costs",
            line_costs=f"{_COSTS}:surgeon_line_costs",
        ),
        Method(
            "sparsegpt",
            "SparseGPT: layer-wise reconstruction, layer after layer",
            "SparseGPT (Frantar and Alistarh, ICML 2023)",
            needs="activations",
            updates=("none", "sequential"),
            sweep="llm_surgeon.methods.sparsegpt:prune_sparsegpt",
        ),
        Method(
            "wanda",
            "Wanda: magnitude times input norm",
            "Wanda (Sun et al., ICLR 2024)",
            needs="activations",
            comparison="row",
            costs=f"{_COSTS}:input_costs",
        ),
        Method("magnitude", "Magnitude pruning", rows_columns=True, costs=f"{_COSTS}:magnitude_costs"),
        Method(
            "l-obd",
            "Layer-wise optimal brain damage",
            needs="activations",
            rows_columns=True,
            costs=f"{_COSTS}:input_costs",
        ),
        Method(
            "k-obd",
            "Optimal brain damage with Kronecker-factored curvature",
            needs="gradients",
            comparison="network",
            rows_columns=True,
            costs=f"{_COSTS}:kronecker_costs",
        ),
    ),
)


def register(record: Method) -> None:
    """Add a method, which ``method=`` then takes wherever a method is named.

    Raises:
        InputError: another method has its name.
    """
    _methods.register(record)


def names() -> list[str]:
    """Names of all methods, those of entry points included, which are not imported for it."""
    return _methods.names()


def method(name: object) -> Method:
    """The method of that name; an entry point's is imported with the first call, and registered.

    Raises:
        InputError: there is none, or its entry point cannot be imported or is no :class:`Method` of that name.
    """
    return _methods.find(name)


def methods_where(is_so: Callable[[Method], bool]) -> list[str]:
    """Names of the registered methods for which ``is_so``, for messages."""
    return _methods.where(is_so)
