"""How long a run takes: operations over the rates of matrix products that are measured on the spot."""

from __future__ import annotations

from llm_surgeon.config import PruneConfig

# Bytes a second at which main memory is pinned, about, with a driver of 2026: taken once, then used again.
PINNING_RATE = 1e9
# Shares of the rate of large matrix products that passes, Gram matrices and factorisations reach.
_PASS_EFFICIENCY, _GRAM_EFFICIENCY, _FACTORISATION_EFFICIENCY = 0.76, 0.83, 0.65
# What the joint solver takes to one per cent of the optimum, and how much faster than float32 it multiplies on a GPU.
_SOLVER_ITERATIONS, _HALF_SPEED = 20, 10.5
# Products in full precision by which it checks its result, and how much slower than in the iterations they are.
_SOLVER_CHECKS, _CHECK_COST = 2, 3.0


def run_seconds(
    config: PruneConfig,
    sizes: list[tuple[int, int]],
    factors: list[int],
    *,
    head: int,
    forward_passes: int,
    backward_passes: float,
    backward_cost: int,
    transfer: float,
    rates: tuple[float, float],
    on_gpu: bool,
    inverted_once: bool,
) -> float:
    """Seconds of all shots, with P weights of the linears and the output head, N tokens, n the factors' sizes::

        shots * (2 P N for every pass + N sum(n²) for the factors, the half that is computed
                 + sum(n³) for inverses and 2/3 sum(n³) for their diagonals before + the solver's products)
        + 2 P N for the final loss

    A pass takes no less time than the weights that are streamed meanwhile.

    Args:
        sizes: ``(R, C')`` of every linear; head: weights of the output head.
        forward_passes, backward_passes: through the data in a shot; backward ones may go back a part of the way.
        backward_cost: of a backward pass, in forward ones.
        transfer: seconds in which a pass's weights are streamed.
        rates: operations per second of matrix products in the model's dtype, and in float32.
        inverted_once: the inverses are computed with their diagonals.
    """
    assert config.seqlen is not None and config.shots is not None and config.exchanges is not None
    tokens = config.samples * config.seqlen
    half, single = rates
    forward = 2 * (sum(R * C for R, C in sizes) + head) * tokens / (half * _PASS_EFFICIENCY)
    seconds = forward_passes * max(forward, transfer) + backward_passes * max(backward_cost * forward, transfer)
    seconds += tokens * sum(n**2 for n in factors) / (half * _GRAM_EFFICIENCY)
    if config.method == "surgeon":
        times = 1 if inverted_once else 5 / 3
        seconds += times * sum(n**3 for n in factors) / (single * _FACTORISATION_EFFICIENCY)
        products = sum(2 * R * C * (R + C) for R, C in sizes)
        if not config.pattern.single_weights:
            seconds += 3 * products / single
        elif config.update == "joint":
            faster, checks = (_HALF_SPEED, _SOLVER_CHECKS * _CHECK_COST) if on_gpu else (1.0, _SOLVER_CHECKS)
            iterations = min(config.max_iterations, _SOLVER_ITERATIONS)
            seconds += (1 + config.exchanges) * (iterations + checks) * products / (single * faster)
    return config.shots * seconds + max(forward, transfer)
