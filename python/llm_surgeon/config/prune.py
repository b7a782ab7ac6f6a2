"""What to prune and how: one typed, frozen, validated value that every part of the system reads."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_surgeon.checks import (
    LARGEST_COUNT,
    require_bool,
    require_choice,
    require_int,
    require_known,
    require_number,
    require_positive_int,
    shown,
)
from llm_surgeon.config.methods import UPDATES, method, methods_where
from llm_surgeon.config.structure import Structure, structures_with
from llm_surgeon.errors import InputError

FISHERS = ("empirical", "sampled")
OFFLOADS = ("none", "cpu")

# How the groups of coupled structures can be scored.
GRADIENT_IMPORTANCES = ("taylor1", "taylor2", "taylor-mix", "vector")
IMPORTANCES = ("kronecker", *GRADIENT_IMPORTANCES, "magnitude", "random")
ALLOCATIONS = ("global", "local")
# Rounds of exchanges in a joint update of single weights: more hardly lower its objective any further.
_EXCHANGES = 4
# Rounds of work beyond these are a slip of the keyboard, and would run for ever.
_MOST_ROUNDS = 10_000
_MOST_BLOCKS = 100_000
# What torch's generators take, and room for the draws that later shots make with the numbers after it.
LARGEST_SEED = 2**63 - 1 - _MOST_ROUNDS


@dataclass(frozen=True)
class PruneConfig:
    """Every option of a pruning run; validated when built, resolved defaults filled in.

    Attributes:
        structure: ``"2:4"`` or any ``"N:M"``, ``"unstructured"``, ``"rows-columns"``; or ``"groups"`` (also called
            ``"structured"``), neurons and attention heads, ``"width"``, channels of the residual stream, or
            ``"layers"``, whole decoder blocks, which make the model smaller.
        method: a name in :mod:`~llm_surgeon.config.methods`.
        sparsity: fraction of the decoder's linear weights to remove, in (0, 1). Implied by N:M; otherwise 0.5
            (unstructured) or 0.3 (rows-columns, groups) when left out.
        update: how the surviving weights compensate (``method="surgeon"`` only): ``"joint"``, ``"chunked"``,
            ``"independent"`` or ``"none"``. Rows and columns have one exact closed form, named ``"joint"``. A joint
            update of single weights makes up for all that was pruned since the dense weights, the others for what
            their shot prunes.
        max_correlated: most pruned weights solved for together by the chunked update (the paper's m).
        shots: rounds of estimate, select, update. Left out: 5; for rows-columns 8 for every 10 % removed (the
            paper's settings); 1 for methods and importances that do not re-estimate.
        kron_rank: Kronecker products that the curvature of a layer is the sum of, 1 or 2. Two take four more passes a
            shot, three times the memory for factors, and update "joint"; for studies of small models.
        exchanges: rounds, within a joint update, of choosing anew which weights of a layer are pruned, by what the
            others' compensation makes of them; each takes a few of the solver's iterations. Left out: 4 for joint
            updates of single weights (with ``kron_rank`` 1), otherwise 0.
        gradient_steps: steps along the natural gradient of the kept weights after each shot, as far as windows that are
            held out tell (the last eighth): they make up for what the curvature of single layers does not see, and
            train on the calibration data, too. Joint updates of single weights only.
        schedule: after shot t of T the fraction ``1 - (1 - t/T)^schedule`` of the sparsity is reached: 1 is linear,
            more prunes more in the early shots.
        damp_g, damp_a: damping, relative to the mean diagonal of G and A. ``damp_g`` left out: 0.1, or 0.01
            for rows-columns and groups.
        fisher: labels for the curvature: the data's own (``"empirical"``) or drawn from the model
            (``"sampled"``).
        tolerance: the joint solver stops when its objective is within this estimated fraction of the optimum.
        max_iterations: cap on the joint solver's iterations.
        min_kept: fraction of every layer (of its weights, its rows and its columns, its groups) never removed.
        importance: how groups are scored: ``"kronecker"``, or as LLM-Pruner does, ``"taylor1"``, ``"taylor2"``,
            ``"taylor-mix"``, ``"vector"``, ``"magnitude"``, ``"random"``.
        allocation: of groups, ``"global"`` (the cheapest per weight anywhere) or ``"local"`` (the same fraction of
            every layer, LLM-Pruner's default). Left out: global for Kronecker costs, local otherwise.
        round_to: widths that groups leave are multiples of this. On a GPU tensor cores want rows of 16 bytes, so 8 for
            16-bit weights; 64 or 128 fill their tiles.
        uniform: groups leave the same widths in every block, so that stock model classes load the result. Where a
            class derives the width of a head from the number of heads (OPT, GPT-NeoX, GPT-2), all heads stay; where a
            configuration must have a number of heads that divides the width of the model, only such numbers are left.
        skip_layers: decoder blocks that lose no groups: ``"0-3,30,31"``.
        reconstruct: after the last shot fit every linear, by least squares with ``damp_a``, to what the dense model
            computes on the calibration data. Left out: where groups or layers are compensated for
            (``update="joint"``).
        samples, seqlen: calibration windows and their length in tokens (``seqlen`` left out: 2048 or the
            model's own limit, whichever is shorter).
        batch_size: windows per forward and backward pass (left out: about 4096 tokens, or by a GPU's free memory).
        checkpoint_activations: compute activations again in the backward pass instead of keeping them: slower, for
            long sequences and little memory.
        lora_rank: rank of the low-rank corrections trained on every linear layer after each shot and absorbed before
            the next (the paper's section 3.6); 0: none.
        lora_steps, lora_learning_rate: AdamW steps of each correction, on 4096 tokens of the calibration data each.
        offload: ``"cpu"`` keeps weights and factors in main memory and streams them through the GPU, block by block;
            activations are computed again then. For runs on a GPU, like ``gpu_memory``.
        curvature_layers: decoder blocks whose curvature is accumulated in one pass over the data (left out: all; with
            ``offload`` as many as fit). What is accumulated then waits in main memory.
        gpu_memory: cap on the GPU memory that PyTorch may take, ``"24GB"`` say.
        seed: seed of calibration windows and sampled labels.
    """

    structure: str = "2:4"
    method: str = "surgeon"
    sparsity: float | None = None
    update: str | None = None
    max_correlated: int = 2000
    shots: int | None = None
    kron_rank: int = 1
    exchanges: int | None = None
    gradient_steps: int = 0
    schedule: float = 1.0
    damp_g: float | None = None
    damp_a: float = 0.01
    fisher: str = "empirical"
    tolerance: float = 0.01
    max_iterations: int = 200
    min_kept: float = 0.02
    importance: str = "kronecker"
    allocation: str | None = None
    round_to: int = 1
    uniform: bool = False
    skip_layers: str = ""
    reconstruct: bool | None = None
    samples: int = 128
    seqlen: int | None = None
    batch_size: int | None = None
    checkpoint_activations: bool = False
    lora_rank: int = 0
    lora_steps: int = 32
    lora_learning_rate: float = 1e-4
    offload: str = "none"
    curvature_layers: int | None = None
    gpu_memory: str | int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.structure == "structured":
            self._set("structure", "groups")
        structure = Structure.parse(self.structure)
        record = method(self.method)
        require_choice("fisher", self.fisher, FISHERS)
        self._resolve_coupled(structure)
        require_choice("offload", self.offload, OFFLOADS)
        if self.offload != "none" and not record.curvature:
            raise InputError(f"offload {self.offload!r} is for methods with curvature, not {self.method!r}")
        if self.offload != "none" and (self.lora_rank or structure.coupled):
            raise InputError("lora_rank and groups need the whole model on one device: leave offload out")
        if self.curvature_layers is not None and structure.coupled:
            raise InputError("groups need all of their curvature on one device: leave curvature_layers out")
        if self.gpu_memory is not None and not isinstance(self.gpu_memory, str):
            require_int("gpu_memory", self.gpu_memory, 1, 2**63 - 1)
        if self.gpu_memory_bytes == 0:
            raise InputError(f"gpu_memory must be greater than 0, not {shown(self.gpu_memory)}")
        if structure.kind == "rows-columns" and not record.rows_columns:
            raise InputError(
                f"method {self.method!r} has no definition for rows and columns: "
                f"choose one of {', '.join(methods_where(lambda other: other.rows_columns))}"
            )
        self._resolve_sparsity(structure)
        self._resolve_update(structure)
        self._resolve_shots(structure)
        if self.damp_g is None:
            self._set("damp_g", 0.1 if structure.single_weights else 0.01)
        require_positive_int("max_correlated", self.max_correlated)
        require_positive_int("max_iterations", self.max_iterations)
        require_positive_int("samples", self.samples)
        self._resolve_exchanges(structure)
        for name in ("seqlen", "batch_size", "curvature_layers"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        for name in ("damp_g", "damp_a", "tolerance", "schedule"):
            require_number(name, getattr(self, name), 0.0, math.inf)
        require_number("lora_learning_rate", self.lora_learning_rate, 0.0, math.inf)
        require_positive_int("lora_steps", self.lora_steps, _MOST_ROUNDS)
        require_int("lora_rank", self.lora_rank, 0, LARGEST_COUNT)
        for name in ("lora_steps", "lora_learning_rate") if self.lora_rank == 0 else ():
            if getattr(self, name) != getattr(PruneConfig, name):
                raise InputError(f"{name} means nothing without lora_rank")
        require_number("min_kept", self.min_kept, 0.0, 1.0, low_allowed=True)
        assert self.sparsity is not None
        if structure.kind != "n:m" and self.sparsity + self.min_kept > 1 + 1e-9:
            raise InputError(
                f"sparsity {self.sparsity} cannot be met while min_kept keeps {self.min_kept} of every layer"
            )
        require_bool("checkpoint_activations", self.checkpoint_activations)
        require_int("seed", self.seed, 0, LARGEST_SEED)

    @property
    def gpu_memory_bytes(self) -> int | None:
        """``gpu_memory`` in bytes."""
        from llm_surgeon.resources import parse_bytes  # brings torch: options are also listed without it

        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory)

    @property
    def pattern(self) -> Structure:
        """The parsed ``structure``."""
        return Structure.parse(self.structure)

    @property
    def around_dense_weights(self) -> bool:
        """Whether every shot moves the kept weights to the optimum around the dense ones, which it keeps for that.

        Only the dense weights are at an optimum of the loss: around those of the last shot there is a gradient, too.
        Low-rank corrections train them, and go on from there.
        """
        joint = self.update == "joint" and self.pattern.single_weights
        return joint and self.shots != 1 and self.lora_rank == 0

    @property
    def skipped_layers(self) -> frozenset[int]:
        """The decoder blocks that ``skip_layers`` names."""
        found: set[int] = set()
        for part in self.skip_layers.split(",") if self.skip_layers else ():
            match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
            if match is None:
                raise InputError(
                    f"skip_layers must be block numbers such as '0-3,30,31', not {shown(self.skip_layers)}"
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise InputError(f"skip_layers holds {part.strip()}, which ends before it begins")
            if last >= _MOST_BLOCKS:
                raise InputError(f"skip_layers holds {part.strip()}, and no model has {_MOST_BLOCKS} blocks")
            found.update(range(first, last + 1))
        return frozenset(found)

    @classmethod
    def given(cls, config: PruneConfig | None, options: Mapping[str, Any]) -> PruneConfig:
        """``config``, or what ``options`` make where it is left out; an :class:`InputError` if both are given."""
        if config is not None and options:
            raise InputError("give either config or single options, not both")
        return cls.from_mapping(options) if config is None else config

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> PruneConfig:
        """Build from plain data (a YAML file, say); an :class:`InputError` names an unknown key."""
        require_known(options, [field.name for field in dataclasses.fields(cls)])
        return cls(**options)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_exchanges(self, structure: Structure) -> None:
        require_int("kron_rank", self.kron_rank, 1, 2)
        solved = self.update == "joint" and structure.single_weights
        if self.exchanges is None:
            self._set("exchanges", _EXCHANGES if solved and self.kron_rank == 1 else 0)
        require_int("exchanges", self.exchanges, 0, _MOST_ROUNDS)
        if self.exchanges and not solved:
            raise InputError("exchanges need method 'surgeon', update 'joint' and a structure of single weights")
        if self.kron_rank == 2 and not solved:
            raise InputError("kron_rank 2 needs method 'surgeon', update 'joint' and a structure of single weights")
        if self.kron_rank == 2 and (self.checkpoint_activations or self.offload != "none" or self.exchanges):
            raise InputError("kron_rank 2 goes with neither checkpoint_activations nor offload nor exchanges")
        require_int("gradient_steps", self.gradient_steps, 0, _MOST_ROUNDS)
        if self.gradient_steps:
            if not solved:
                raise InputError(
                    "gradient_steps need method 'surgeon', update 'joint' and a structure of single weights"
                )
            if self.kron_rank == 2 or self.offload != "none" or self.checkpoint_activations or self.lora_rank:
                raise InputError(
                    "gradient_steps go with neither kron_rank 2 nor offload nor checkpoint_activations nor lora_rank"
                )

    def _resolve_sparsity(self, structure: Structure) -> None:
        implied = structure.sparsity
        if self.sparsity is None:
            default = 0.5 if structure.single_weights else 0.3
            self._set("sparsity", default if implied is None else implied)
        require_number("sparsity", self.sparsity, 0.0, 1.0)
        if implied is not None and not math.isclose(self.sparsity or 0.0, implied, abs_tol=1e-9):
            raise InputError(
                f"structure {self.structure!r} removes {implied:g} of the weights: "
                f"leave sparsity out, or choose 'unstructured' for sparsity {self.sparsity:g}"
            )

    def _resolve_update(self, structure: Structure) -> None:
        updates = method(self.method).updates
        if self.update is None:
            self._set("update", updates[0] if self.importance == "kronecker" else "none")
        require_choice("update", self.update, UPDATES)
        if self.update not in updates:
            others = " or ".join(map(repr, methods_where(lambda other: self.update in other.updates)))
            raise InputError(f"update {self.update!r} needs method {others}, not {self.method!r}")
        fits = structure.kind in ("groups", "layers") and self.update == "joint"
        if self.reconstruct is None:
            self._set("reconstruct", fits)
        if not isinstance(self.reconstruct, bool) or (self.reconstruct and structure.kind not in ("groups", "layers")):
            raise InputError(
                f"reconstruct must be true or false, and true for groups and layers only, not {shown(self.reconstruct)}"
            )
        if structure.kind == "rows-columns" and self.update == "chunked":
            raise InputError("update 'chunked' has no meaning for rows-columns: 'joint' is their exact closed form")
        if structure.coupled and self.update not in ("joint", "none"):
            raise InputError(f"update {self.update!r} has no meaning for {structure.kind}: choose 'joint' or 'none'")

    def _resolve_coupled(self, structure: Structure) -> None:
        require_choice("importance", self.importance, IMPORTANCES)
        if self.allocation is None:
            self._set("allocation", "global" if self.importance == "kronecker" else "local")
        require_choice("allocation", self.allocation, ALLOCATIONS)
        require_positive_int("round_to", self.round_to)
        require_bool("uniform", self.uniform)
        if not isinstance(self.skip_layers, str):
            raise InputError(f"skip_layers must be text such as '0-3,30,31', not {shown(self.skip_layers)}")
        self.skipped_layers  # noqa: B018 (refuses what it cannot read)
        if structure.coupled and not method(self.method).coupled:
            needed = " or ".join(map(repr, methods_where(lambda other: other.coupled)))
            raise InputError(f"structure {structure.kind!r} needs method {needed}: choose an importance instead")
        if self.uniform and self.skip_layers:
            raise InputError("uniform keeps one width for all blocks: leave skip_layers out")
        if structure.kind == "width" and self.skip_layers:
            raise InputError("skip_layers has no meaning for width: channels leave every block")
        if structure.kind in ("width", "layers") and self.lora_rank:
            raise InputError(f"lora_rank has no meaning for {structure.kind}: recover the pruned model instead")
        if structure.kind == "layers" and self.round_to != 1:
            raise InputError("round_to has no meaning for layers: whole blocks go")
        for name in ("importance", "round_to", "uniform", "skip_layers"):
            if name not in structure.options and getattr(self, name) != getattr(PruneConfig, name):
                choices = " or ".join(structures_with(name))
                raise InputError(f"{name} has no meaning for structure {self.structure!r}: choose {choices}")

    def _resolve_shots(self, structure: Structure) -> None:
        if self.shots is None:
            assert self.sparsity is not None
            multi = {"rows-columns": max(1, round(80 * self.sparsity)), "layers": 1}.get(structure.kind, 5)
            again = method(self.method).gradients and self.importance == "kronecker"
            self._set("shots", multi if again else 1)
        require_positive_int("shots", self.shots, _MOST_ROUNDS)
        if method(self.method).sweep is not None and self.shots != 1:
            raise InputError(f"method {self.method!r} goes through the layers once: shots must be 1, not {self.shots}")
