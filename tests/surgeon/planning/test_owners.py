"""Owners of linears: fixed, balanced, and linears that share their input together unless they wait for each other."""

from __future__ import annotations

import pytest

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.planning.owners import choose_owners, largest_shares
from tests.surgeon.tiny_models import build


def test_one_rank_owns_everything() -> None:
    decoder = find_decoder(build("llama"))
    assert set(choose_owners(decoder, 1).values()) == {0}
    assert largest_shares(decoder, PruneConfig(samples=8), 1) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("count", [2, 3])
def test_linears_of_one_input_go_together_and_ranks_have_about_as_much(count: int) -> None:
    decoder = find_decoder(build("llama"))
    owners = choose_owners(decoder, count)
    for linear in decoder.linears:
        assert owners[linear.name] == owners[linear.input_group]
    shares = largest_shares(decoder, PruneConfig(update="joint", samples=7), count)
    assert shares.windows == -(-7 // count) / 7
    assert max(shares.work, shares.factors) < 1.25 / count


def test_linears_that_wait_for_each_other_are_shared_out_in_turn() -> None:
    decoder = find_decoder(build("llama"))
    owners = choose_owners(decoder, 2, in_turn=True)
    gates = [linear for linear in decoder.linears if linear.kind in ("mlp.gate_proj", "mlp.up_proj")]
    for depth in (0, 1):
        assert {owners[linear.name] for linear in gates if linear.depth == depth} == {0, 1}
    shares = largest_shares(decoder, PruneConfig(update="sequential"), 2)
    assert 0.5 < shares.work < 1.0
    # The factor A of an input is on every rank that owns one of its readers.
    held, whole = [0, 0], 0
    for group in {linear.input_group for linear in decoder.linears}:
        readers = [linear for linear in decoder.linears if linear.input_group == group]
        whole += readers[0].columns ** 2 + sum(linear.rows**2 for linear in readers)
        for rank in (0, 1):
            own = [linear for linear in readers if owners[linear.name] == rank]
            held[rank] += (readers[0].columns ** 2 if own else 0) + sum(linear.rows**2 for linear in own)
    assert shares.factors == max(held) / whole and sum(held) > whole
