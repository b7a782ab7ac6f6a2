"""Options of a pruning run: one typed, frozen, validated value that every part of the system reads."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llm_surgeon.checks import parse_bytes, shown
from llm_surgeon.config import methods
from llm_surgeon.config import structure as structures
from llm_surgeon.config.fields import check_options, count, number, option, options, present_names
from llm_surgeon.config.methods import Method, Update, method, methods_where
from llm_surgeon.config.structure import SPECIAL_OPTIONS, Structure, structures_with
from llm_surgeon.errors import InputError

Fisher = Literal["empirical", "sampled"]
DenseBy = Literal["loss", "wanda", "none"]
Offload = Literal["none", "cpu"]
GradientTarget = Literal["dense", "labels"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Importance = Literal["kronecker", "taylor1", "taylor2", "taylor-mix", "vector", "magnitude", "random"]
Allocation = Literal["global", "local"]
FISHERS: tuple[Fisher, ...] = get_args(Fisher)
# How the groups of coupled structures can be scored.
IMPORTANCES: tuple[Importance, ...] = get_args(Importance)
GRADIENT_IMPORTANCES = ("taylor1", "taylor2", "taylor-mix", "vector")

# Sections of `surgeon prune --help`.
COMPENSATION, SHOTS, SMALLER = "Compensation and curvature", "Shots", "Smaller models (groups, width, layers)"
CALIBRATION, MEMORY, RESEARCH = "Calibration", "Memory", "Research"

# Rounds of swaps in an update of single weights, and where more than half of them go: estimates.
_SWAPS, _MANY_SWAPS = 4, 8
# Gradient steps of models up to so many prunable weights, whose plan they fit where an update does; and the least
# windows, the last of which tells their length. Estimates.
_STEPS, _STEPS_UP_TO, _STEP_WINDOWS = 4, 2_000_000_000, 8
# Damping of what a linear aims at in a sequential update, and in a last fit: estimates.
_SWEEP_DAMPING, _FIT_DAMPING = 0.3, 0.1
# Rounds of work beyond these are a slip of the keyboard, and would run for ever.
_MOST_ROUNDS = 10_000
_MOST_BLOCKS = 100_000
# Options that some methods only have a use for.
_METHOD_OPTIONS: dict[str, Callable[[Method], bool]] = {
    "fisher": lambda record: record.gradients,
    "checkpoint_activations": lambda record: record.gradients,
    "offload": lambda record: record.curvature,
    "curvature_layers": lambda record: record.curvature,
}
# What torch's generators take, and room for the draws that later shots make with the numbers after it.
LARGEST_SEED = 2**63 - 1 - _MOST_ROUNDS


def parse_blocks(name: str, text: object) -> frozenset[int]:
    """Block numbers such as ``"0-3,30,31"``, the option ``name``."""
    found: set[int] = set()
    for part in str(text).split(",") if text != "" else ():
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if match is None or not isinstance(text, str):
            raise InputError(f"{name} must be block numbers such as '0-3,30,31', not {shown(text)}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"{name} holds {part.strip()}, which ends before it begins")
        if last >= _MOST_BLOCKS:
            raise InputError(f"{name} holds {part.strip()}, and no model has {_MOST_BLOCKS} blocks")
        found.update(range(first, last + 1))
    return frozenset(found)


def _check_memory(name: str, value: object) -> None:
    if not isinstance(value, str):
        count(1, 2**63 - 1)(name, value)
    elif parse_bytes(value) == 0:
        raise InputError(f"{name} must be greater than 0, not {shown(value)}")


@options
@dataclass(frozen=True)
class PruneConfig:
    """Every option of a pruning run; validated when built, and what was left out filled in.

    What is ``None`` after that depends on the model or the machine.
    """

    structure: str = option(
        "2:4",
        "What is removed, any N:M (all but N of each M weights in a row) or",
        lambda _, value: Structure.parse(value),
        choices=structures.names,
    )
    method: str = option("surgeon", "How costs of weights are estimated", choices=methods.names)
    sparsity: float = option(
        None,
        "Fraction of the decoder's linear weights to remove: implied by N:M, 0.5 unstructured, else 0.3.",
        number(0.0, 1.0),
    )

    # Where these are few, much of the quality comes back for little of the speed: layers differ in what they lose.
    dense_fraction: float = option(
        0.0,
        "Fraction of the weights that N:M leaves dense: of the linears that lose most for what they save.",
        number(0.0, 1.0, low_allowed=True),
    )

    update: Update = option(
        None,
        "How surviving weights compensate (sequential for single ones without lora_rank and kron_rank 2, else joint)",
        panel=COMPENSATION,
    )
    # Each round takes a few of the solver's iterations.
    swaps: int = option(
        None,
        "Rounds of swapping kept and pruned weights of a layer in its update: 4, 8 where more than half go.",
        count(0, _MOST_ROUNDS),
        panel=COMPENSATION,
        aliases=("exchanges",),
    )
    # As far as windows that are held out tell: steps make up for what the curvature of single layers does not see.
    gradient_steps: int = option(
        None,
        "Natural-gradient steps of the kept weights after each shot's update, or the last: 4 towards the dense model "
        f"where it has at most {_STEPS_UP_TO:,} prunable weights, else 0.",
        count(0, _MOST_ROUNDS),
        panel=COMPENSATION,
    )
    # Labels train on the calibration data, too; what the dense model predicts there teaches nothing but itself.
    gradient_target: GradientTarget = option(
        None,
        "Towards what they go, outputs of the dense model (as after a sequential update) or the data's labels",
        panel=COMPENSATION,
    )
    gradient_samples: int | None = option(
        None,
        "Windows that tell how long they are, besides the calibration windows: an eighth as many.",
        count(),
        panel=COMPENSATION,
    )
    damp_g: float = option(
        None, "Damping of G, relative to its mean diagonal: 0.1, structured 0.01.", number(), panel=COMPENSATION
    )
    damp_a: float = option(0.01, "Damping of A, relative to its mean diagonal.", number(), panel=COMPENSATION)

    shots: int = option(
        None,
        "Rounds of estimate, select, update: 5, rows-columns 8 per 10 %, sequential N:M 1, without curvature 1.",
        count(most=_MOST_ROUNDS),
        panel=SHOTS,
    )
    min_kept: float = option(
        0.02,
        "Fraction of every layer (its weights, rows, columns, groups) never removed.",
        number(0.0, 1.0, low_allowed=True),
        panel=SHOTS,
    )
    # The paper's section 3.6; each step takes 4096 tokens.
    lora_rank: int = option(
        0,
        "Rank of low-rank corrections trained after each shot and absorbed before the next; 0: none.",
        count(0),
        panel=SHOTS,
    )
    lora_steps: int = option(32, "AdamW steps of each correction.", count(most=_MOST_ROUNDS), panel=SHOTS)
    lora_learning_rate: float = option(1e-4, "Their peak learning rate.", number(), panel=SHOTS)

    importance: Importance = option("kronecker", "How groups are scored", panel=SMALLER)
    allocation: Allocation = option(
        None, "The cheapest anywhere, as for kronecker, or the same fraction of each layer", panel=SMALLER
    )
    # Tensor cores want rows of 16 bytes, so 8 for 16-bit weights; 64 or 128 fill their tiles.
    round_to: int = option(1, "Widths are multiples of this; 8 to 128 for speed on GPUs.", count(), panel=SMALLER)
    # Where a class derives the width of a head from the number of heads (OPT, GPT-NeoX, GPT-2), all heads stay; where a
    # configuration must have a number of heads that divides the width of the model, only such numbers are left.
    uniform: bool = option(
        False, "The same widths in every block, so that stock model classes load the result.", panel=SMALLER
    )
    skip_layers: str = option("", "Blocks left alone, 0-3,30,31.", parse_blocks, panel=SMALLER)
    reconstruct: bool = option(
        None,
        "Fit what is left to the dense model's activations at last: so by default groups and layers without lora_rank.",
        panel=COMPENSATION,
    )

    samples: int = option(128, "Calibration windows.", count(), panel=CALIBRATION)
    # Left out, a run fills it in once the model is known.
    seqlen: int = option(None, "Tokens per window: 2048 or the model's limit.", count(), panel=CALIBRATION)
    skip_bad_batches: bool = option(
        False, "Go on without windows whose pass holds NaN or infinity, which are named.", panel=CALIBRATION
    )
    seed: int = option(0, "Seed of windows and sampled labels.", count(0, LARGEST_SEED), panel=CALIBRATION)

    batch_size: int | None = option(
        None, "Windows per pass: about 4096 tokens, on a GPU by its free memory.", count(), panel=MEMORY
    )
    checkpoint_activations: bool = option(
        False, "Compute activations again in the backward pass: less memory, a third more work.", panel=MEMORY
    )
    offload: Offload = option(
        "none", "Where weights and factors wait: cpu streams them through the GPU, block by block", panel=MEMORY
    )
    # Sums and reported losses of held-out text stay in float32.
    compute_dtype: ComputeDtype = option(
        "auto",
        "Products of a float32 model's passes over the calibration windows; auto is bfloat16 on GPUs that have it",
        panel=MEMORY,
    )
    curvature_layers: int | None = option(
        None, "Decoder blocks per curvature pass: all, or what fits when offloaded.", count(), panel=MEMORY
    )
    gpu_memory: str | int | None = option(None, "Cap on GPU memory, 24GB say.", _check_memory, panel=MEMORY)

    # After shot t of T the fraction 1 - (1 - t/T)^schedule of the sparsity is reached.
    schedule: float = option(1.0, "1: every shot removes as much; more: the early ones more.", number(), panel=RESEARCH)
    fisher: Fisher = option("sampled", "Labels for the curvature, the data's own or the model's", panel=RESEARCH)
    dense_by: DenseBy = option(
        "loss",
        "What tells which linears stay dense: predicted loss, Wanda's scores, or none of them: spread evenly",
        panel=RESEARCH,
    )
    # Two take four more passes a shot and three times the memory for factors: for studies of small models.
    kron_rank: int = option(
        1, "Kronecker products whose sum the curvature of a layer is, 1 or 2.", count(1, 2), panel=RESEARCH
    )
    max_correlated: int = option(
        2000, "Most pruned weights solved for together by the chunked update (the paper's m).", count(), panel=RESEARCH
    )
    tolerance: float = option(
        0.01, "Estimated fraction above the optimum at which the joint solver stops.", number(), panel=RESEARCH
    )
    max_iterations: int = option(200, "Cap on the joint solver's iterations.", count(), panel=RESEARCH)
    target_damping: float = option(
        None,
        "Damping towards the dense weights of what makes up for changed inputs: 0.3 in a sequential update, else 0.1.",
        number(),
        panel=RESEARCH,
    )
    residual_damping: float = option(
        0.1,
        "The same of what makes up for the residual stream's error in a sequential update.",
        number(),
        panel=RESEARCH,
    )
    residual_weight: float = option(
        1.0,
        "Share of the residual stream's error that a sequential update makes up for.",
        number(low_allowed=True),
        panel=RESEARCH,
    )
    token_weights: bool | None = option(
        None,
        "Weigh tokens by their gradients where the dense model is aimed at: where there are many.",
        panel=RESEARCH,
    )

    def __post_init__(self) -> None:
        if self.structure == "structured":
            self._set("structure", "groups")
        check_options(self)
        self._resolve(self.structure_record, self.method_record)
        self._check(self.structure_record, self.method_record)

    @property
    def gpu_memory_bytes(self) -> int | None:
        """``gpu_memory`` in bytes."""
        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory)

    @property
    def method_record(self) -> Method:
        """The record that ``method`` names."""
        return method(self.method)

    @property
    def structure_record(self) -> Structure:
        """The record that ``structure`` names."""
        return Structure.parse(self.structure)

    @property
    def removed_fraction(self) -> float:
        """Fraction of all prunable weights that goes: ``sparsity`` of what does not stay dense."""
        return self.sparsity * (1.0 - self.dense_fraction)

    @property
    def around_dense_weights(self) -> bool:
        """True where every shot moves the kept weights to the optimum around the dense ones, which it keeps for that.

        Only the dense weights are at an optimum of the loss: around those of the last shot there is a gradient, too.
        Low-rank corrections train them, and go on from there.
        """
        return self._solved and self.shots != 1 and self.lora_rank == 0

    @property
    def offloads(self) -> bool:
        """True where weights and factors wait in main memory."""
        return self.offload == "cpu"

    @property
    def sequential(self) -> bool:
        """True where linears are updated in execution order, each at the inputs that the ones before it leave."""
        return self.update == "sequential"

    @property
    def aims_at_dense(self) -> bool:
        """True where linears are at last fitted to what the dense model computes, at the inputs that they then get."""
        return self.sequential or self.reconstruct

    def settled(self, weights: int) -> PruneConfig:
        """These options for a model of so many prunable ``weights``: with ``gradient_steps``, if they were left out."""
        if self.gradient_steps is not None:
            return self
        if self.offloads or self.samples < _STEP_WINDOWS or weights > _STEPS_UP_TO:
            for name, value in self._without_use_of_steps().items():
                if getattr(self, name) != value:
                    raise InputError(
                        f"{name} means nothing without gradient_steps, which are 0 by default of offloaded models, "
                        f"with fewer than {_STEP_WINDOWS} windows and beyond {_STEPS_UP_TO:,} weights: give them"
                    )
            return dataclasses.replace(self, gradient_steps=0)
        return dataclasses.replace(self, gradient_steps=_STEPS)

    def offloaded(self) -> PruneConfig:
        """These options with weights and factors in main memory, and so without gradient steps.

        Raises:
            InputError: other options do not go with that.
        """
        idle: dict[str, Any] = {"gradient_steps": 0, "gradient_samples": None, "gradient_target": None}
        return dataclasses.replace(self, offload="cpu", **idle)

    @property
    def skipped_layers(self) -> frozenset[int]:
        """The decoder blocks that ``skip_layers`` names."""
        return parse_blocks("skip_layers", self.skip_layers)

    @classmethod
    def given(cls, config: PruneConfig | None, options: Mapping[str, Any]) -> PruneConfig:
        """``config``, or what ``options`` make where it is left out; an :class:`InputError` if both are given."""
        if config is not None and options:
            raise InputError("give either config or single options, not both")
        if config is not None and not isinstance(config, PruneConfig):
            raise InputError(f"config must be a PruneConfig, not {shown(config)}")
        return cls.from_mapping(options) if config is None else config

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> PruneConfig:
        """Build from plain data (a YAML file, say); an :class:`InputError` names an unknown key."""
        return cls(**present_names(cls, options))

    @property
    def _solved(self) -> bool:
        """True where the joint solver updates single weights."""
        solver = self.update in ("joint", "sequential") and self.method_record.sweep is None
        return solver and self.structure_record.single_weights

    def _offers(self, update: str) -> bool:
        """True where an update may be the default: what a sequential one does not go with, goes first."""
        others = self.kron_rank == 2 or self.lora_rank > 0
        return update != "sequential" or not others

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve(self, structure: Structure, record: Method) -> None:
        """Fill in what was left out."""
        kronecker = self.importance == "kronecker"

        def fill(name: str, value: object) -> None:
            if getattr(self, name) is None:
                self._set(name, value)

        fill("sparsity", structure.default_sparsity if structure.sparsity is None else structure.sparsity)
        shared = [update for update in record.updates if update in structure.updates and self._offers(update)]
        fill("update", shared[0] if kronecker and shared else "none")
        swaps = _SWAPS if self.sparsity <= 0.5 else _MANY_SWAPS
        fill("swaps", swaps if self._solved and self.kron_rank == 1 else 0)
        fill("damp_g", structure.damp_g)
        one_sweep = self.sequential and (structure.m > 0 or self.lora_rank > 0) and not self._given("schedule")
        once = not record.gradients or not kronecker or one_sweep
        fill("shots", 1 if once else structure.default_shots(self.sparsity))
        fill("allocation", "global" if kronecker else "local")
        # A fit to the dense model would undo what corrections between the shots have learned.
        fitted = structure.coupled and "reconstruct" in structure.options and self.lora_rank == 0
        fill("reconstruct", fitted and self.update == "joint")
        if not self.aims_at_dense or record.sweep is not None:  # else it depends on the model and the windows
            fill("token_weights", False)
        fill("gradient_target", "dense" if self.aims_at_dense else "labels")
        fill("target_damping", _SWEEP_DAMPING if self.sequential else _FIT_DAMPING)
        solved = self.aims_at_dense and record.sweep is None and "gradient_steps" in structure.options
        if not solved or self.kron_rank == 2 or self.lora_rank:  # else it depends on the model and the windows
            fill("gradient_steps", 0)

    def _check(self, structure: Structure, record: Method) -> None:
        """Refuse options that do not go together."""
        if structure.coupled and not record.coupled:
            others = _quoted(methods_where(lambda other: other.coupled))
            raise InputError(f"structure {self.structure!r} needs method {others}: choose an importance instead")
        if not structure.coupled and not structure.single_weights and not record.rows_columns:
            raise InputError(
                f"method {self.method!r} has no definition for rows and columns: "
                f"choose one of {', '.join(methods_where(lambda other: other.rows_columns))}"
            )
        if structure.sparsity is not None and not math.isclose(self.sparsity, structure.sparsity, abs_tol=1e-9):
            raise InputError(
                f"structure {self.structure!r} removes {structure.sparsity:g} of the weights: "
                f"leave sparsity out, or choose 'unstructured' for sparsity {self.sparsity:g}"
            )
        if structure.sparsity is None and self.sparsity + self.min_kept > 1 + 1e-9:
            raise InputError(
                f"sparsity {self.sparsity} cannot be met while min_kept keeps {self.min_kept} of every layer"
            )
        if self.dense_fraction and not structure.m:
            raise InputError(f"dense_fraction has no meaning for structure {self.structure!r}: choose N:M, such as 2:4")
        if self.dense_fraction and not (record.curvature and record.gradients and self._solved and self.kron_rank == 1):
            raise InputError(
                "dense_fraction needs the loss of every layer, which a joint or sequential update with Kronecker "
                f"factors predicts: method {self.method!r} with update {self.update!r} does not"
            )
        if not self.dense_fraction and self._given("dense_by"):
            raise InputError("dense_by means nothing without dense_fraction")
        for name, meant in _METHOD_OPTIONS.items():
            if not meant(record) and self._given(name):
                choices = " or ".join(methods_where(meant))
                raise InputError(f"{name} has no meaning for method {self.method!r}: choose {choices}")
        if self.shots == 1 and structure.shots_in is None and self._given("schedule"):
            raise InputError("schedule has no meaning for one shot: choose more shots")
        for name in SPECIAL_OPTIONS:
            if name not in structure.options and self._given(name):
                choices = " or ".join(structures_with(name))
                raise InputError(f"{name} has no meaning for structure {self.structure!r}: choose {choices}")
        # After the importance, which it may follow from.
        if not structure.coupled and self.allocation == "local":
            raise InputError(f"allocation has no meaning for structure {self.structure!r}: choose groups")
        if self.uniform and self.skip_layers:
            raise InputError("uniform keeps one width for all blocks: leave skip_layers out")
        self._check_update(structure, record)
        if record.sweep is not None and self.shots != 1:
            raise InputError(f"method {self.method!r} goes through the layers once: shots must be 1, not {self.shots}")
        if self.offloads and self.lora_rank:
            raise InputError("lora_rank needs the whole model on one device: leave offload out")
        for name in ("lora_steps", "lora_learning_rate") if self.lora_rank == 0 else ():
            if self._given(name):
                raise InputError(f"{name} means nothing without lora_rank")

    def _check_update(self, structure: Structure, record: Method) -> None:
        if self.update not in record.updates:
            others = _quoted(methods_where(lambda other: self.update in other.updates))
            raise InputError(f"update {self.update!r} needs method {others}, not {self.method!r}")
        if self.update not in structure.updates:
            choices = _quoted(structure.updates)
            raise InputError(f"update {self.update!r} has no meaning for {structure.name}: choose {choices}")
        steps = bool(self.gradient_steps) and not self.reconstruct
        single = "and a structure of single weights"
        needs = {
            "swaps": (self.swaps, f"update 'sequential' or 'joint' {single}"),
            "gradient_steps": (steps, f"update 'sequential' or 'joint' {single}, or reconstruct"),
            "kron_rank 2": (self.kron_rank == 2, f"update 'joint' {single}"),
        }
        for name, (given, needed) in needs.items() if not self._solved else ():
            if given:
                others = _quoted(methods_where(lambda other: "joint" in other.updates))
                raise InputError(f"{name} needs method {others}, {needed}")
        if self.sequential and self.kron_rank == 2:
            raise InputError("update 'sequential' does not go with kron_rank 2")
        if self.sequential and self.shots > 1 and self.lora_rank:
            raise InputError("update 'sequential' begins at the dense weights: with lora_rank it takes one shot")
        unused = {"target_damping": _FIT_DAMPING, "residual_weight": 1.0, "token_weights": False}
        for name, default in unused.items() if not self.aims_at_dense else ():
            if getattr(self, name) != default:
                raise InputError(f"{name} means nothing without update 'sequential' or reconstruct")
        if self.token_weights and record.sweep is not None:
            raise InputError(f"method {self.method!r} knows no gradients: leave token_weights out")
        if self._given("residual_damping") and not self.sequential:
            raise InputError("residual_damping means nothing without update 'sequential'")
        for name, value in self._without_use_of_steps().items():
            if self.gradient_steps == 0 and getattr(self, name) != value:
                raise InputError(f"{name} means nothing without gradient_steps")
        held = self.checkpoint_activations or self.offload != "none"
        if self.kron_rank == 2 and (held or self.swaps):
            raise InputError("kron_rank 2 goes with neither checkpoint_activations nor offload nor swaps")
        for reason in self._without_steps() if self.gradient_steps else ():
            raise InputError(f"gradient_steps {reason}")

    def _without_use_of_steps(self) -> dict[str, object]:
        """Options of gradient steps, and what they are where there are none."""
        return {"gradient_target": "dense" if self.aims_at_dense else "labels", "gradient_samples": None}

    def _without_steps(self) -> list[str]:
        """Why there can be no gradient steps."""
        reasons = {
            "need the gradients of all weights on one device: leave offload out": self.offloads,
            "need a curvature with an inverse, one Kronecker product: leave kron_rank out": self.kron_rank == 2,
            "move the weights that low-rank corrections train: leave lora_rank out": self.lora_rank > 0,
        }
        return [reason for reason, given in reasons.items() if given]

    def _given(self, name: str) -> bool:
        """True where an option asks for something: it has neither its default nor ``False``."""
        return getattr(self, name) not in (getattr(PruneConfig, name), False)


def _quoted(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))
