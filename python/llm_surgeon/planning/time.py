"""Time that a run takes: operations over the rates of matrix products that are measured on the spot."""

from __future__ import annotations

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.planning.owners import Shares

# Bytes a second at which main memory is pinned and given back, in huge pages by 16 threads: 8e9 where the machine has
# the memory, half of that where a virtual machine grows by it. Taken once, then used again.
PINNING_RATE = 5e9
# Seconds in which kernels are compiled and libraries start, on a GPU.
_START = 2.5
# Shares of the rate of large matrix products that passes, Gram matrices and factorisations reach.
_PASS_EFFICIENCY, _GRAM_EFFICIENCY, _FACTORISATION_EFFICIENCY = 0.76, 0.72, 0.65
# What the joint solver takes to one per cent of the optimum (8 to 11 with Llamas, 19 to 21 with an OPT), and how much
# faster than float32 it multiplies on a GPU.
_SOLVER_ITERATIONS, _HALF_SPEED = 12, 10.5
# Products in full precision by which it checks its result, and how much slower than in the iterations they are.
_SOLVER_CHECKS, _CHECK_COST = 2, 3.0
# Products of a further round of swaps: its iterations, its start and its solution, and as long as three take to
# choose.
_ROUND_PRODUCTS = 9
# Passes over all data that a gradient step costs, in forward ones: three over seven eighths, six over what is held out.
# The dense model's logits, where they are the target, are wanted in as many of them as are no backward ones.
_STEP_PASSES, _DENSE_LOGITS = 27 / 8, 13 / 8
# Forward passes of a sequential update: of the dense model, of the other one up to its linears and again, in part, once
# they have changed, and outputs of both where they are added to the stream.
_SWEEP_PASSES = 3.5
# Inverses of A: damped for either part of the target, and for the solver. How often what waits in main memory moves.
_SWEEP_INVERSES, _SWEEP_MOVES = 3, 5
# Of a Cholesky factorisation and of two triangular solves, in inverses and in products with one factor.
_CHOLESKY, _FIT_PRODUCTS = 1 / 3, 2
# Iterations before a sequential update, where weights are counted.
_ROUGH_ITERATIONS = 8


def run_seconds(
    config: PruneConfig,
    sizes: list[tuple[int, int]],
    factors: list[int],
    inputs: list[tuple[int, int]],
    *,
    head: int,
    held_out: int,
    forward_passes: int,
    backward_passes: float,
    backward_cost: int,
    transfer: float,
    moved: float,
    rates: tuple[float, float],
    on_gpu: bool,
    inverted_once: bool,
    chunked: bool,
    shares: Shares,
) -> float:
    """Seconds of all shots, with P weights of the linears and the output head, N tokens, n the factors' sizes::

        shots * (2 P N for every pass + N sum(n²) for the factors, the half that is computed
                 + sum(n³) for inverses and 2/3 sum(n³) for their diagonals before + the solver's products;
                   for rows and columns the diagonals and three products)
        + 2 P N for the final loss, and for the share of N that is held out twice; some seconds before a GPU runs

    Gradient steps after a sequential update take A of one more pass, and inverses. The last update of such a run, or a
    last fit, has passes of its own besides, and N (3 C'² + 2 R C') for its moments, R of linears that alone read an
    input; a fit one more for gradients where G or tokens' weights need them. A pass takes no less time than the weights
    that are streamed meanwhile.

    Args:
        sizes: ``(R, C')`` of every linear; head: weights of the output head; held_out: windows.
        factors: n; inputs: ``(C', R)`` of every shared input, see :func:`~llm_surgeon.planning.memory.input_groups`.
        forward_passes, backward_passes: through the data in a shot; backward ones may go back a part of the way.
        backward_cost: of a backward pass, in forward ones.
        transfer: seconds in which a pass's weights are streamed.
        moved: seconds in which what a sequential update keeps of all windows is copied once for every block.
        rates: operations per second of matrix products in the model's dtype, and in float32.
        inverted_once: the inverses are computed with their diagonals.
        chunked: gradient steps keep the dense model's hidden states, and multiply by the head alone when they want its
            logits, see :class:`~llm_surgeon.methods.step_objective.StepObjective`.
        shares: of a rank, where several share the run; what they exchange counts for nothing (docs/scale.md).
    """
    tokens = round(shares.windows * config.samples) * config.seqlen
    half, single = rates
    through_head = 2 * head * tokens / (half * _PASS_EFFICIENCY)
    forward = 2 * sum(R * C for R, C in sizes) * tokens / (half * _PASS_EFFICIENCY) + through_head
    passes = forward_passes * max(forward, transfer) + backward_passes * max(backward_cost * forward, transfer)
    for_gradients = max(forward, transfer) + max(backward_cost * forward, transfer) if not backward_passes else passes
    passes += tokens * sum(n**2 for n in factors) / (half * _GRAM_EFFICIENCY)
    cubes = shares.work * sum(n**3 for n in factors) / (single * _FACTORISATION_EFFICIENCY)
    products = shares.work * sum(2 * R * C * (R + C) for R, C in sizes)
    faster, checks = (_HALF_SPEED, _SOLVER_CHECKS * _CHECK_COST) if on_gpu else (1.0, _SOLVER_CHECKS)
    product = products / (single * faster)
    iterations = min(config.max_iterations, _SOLVER_ITERATIONS)
    # A first solution for the swaps; each of their further rounds; the solution.
    rounds = (iterations + (config.swaps - 1) * _ROUND_PRODUCTS) if config.swaps else 0
    update = 0.0
    if config.method_record.compensates:
        singly = config.structure_record.single_weights
        update = (2 / 3 if not singly else 1 if inverted_once else 5 / 3) * cubes
        if not singly:
            update += 3 * product
        elif config.update == "joint":
            update += (rounds + iterations + checks) * product
        elif config.sequential:
            update += (min(iterations, _ROUGH_ITERATIONS) + checks) * product
    moments = tokens * sum(3 * C**2 + 2 * R * C for C, R in inputs) / (half * _GRAM_EFFICIENCY)
    sweep = max(_SWEEP_PASSES * forward + moments, _SWEEP_MOVES * moved)
    last = update
    if config.sequential and config.method_record.compensates:
        # Every rank that owns a reader of an input inverts its A.
        inverses = _SWEEP_INVERSES * sum(C**3 for C, _ in inputs) + shares.work * sum(R**3 for R, _ in sizes)
        last = sweep + inverses / (single * _FACTORISATION_EFFICIENCY) + (rounds + iterations + checks) * product
        if not config.structure_record.m or config.dense_fraction:  # costs of all weights
            last += 2 / 3 * cubes
    if config.dense_fraction and config.dense_by == "loss":  # of every linear, before it is known which are pruned
        last += cubes + iterations * product
    if config.reconstruct:
        last += sweep + shares.work * _CHOLESKY * sum(C**3 for _, C in sizes) / (single * _FACTORISATION_EFFICIENCY)
        last += shares.work * _FIT_PRODUCTS * sum(2 * R * C**2 for R, C in sizes) / single
        if not config.structure_record.coupled or config.token_weights is not False:
            last += for_gradients
    # A gradient step: forward, twice as much backward, losses of what is held out, and a direction.
    steps = (config.gradient_steps or 0) * (_STEP_PASSES * forward + (iterations + checks) * product)
    if config.gradient_steps and config.gradient_target == "dense":
        steps += config.gradient_steps * _DENSE_LOGITS * (through_head if chunked else forward)
        steps += forward - through_head if chunked else 0.0
    steps *= 1 if config.aims_at_dense else config.shots
    if config.sequential and config.gradient_steps:
        steps += max(forward, transfer) + tokens * sum(C**2 for C, _ in inputs) / (half * _GRAM_EFFICIENCY)
        inverses = shares.work * (sum(C**3 for C, _ in inputs) + sum(R**3 for R, _ in sizes))
        steps += inverses * (1 if inverted_once else config.gradient_steps) / (single * _FACTORISATION_EFFICIENCY)
    total = config.shots * passes + (config.shots - 1) * update + last + steps
    return total + (1 + 2 * held_out / config.samples) * max(forward, transfer) + _START * on_gpu
