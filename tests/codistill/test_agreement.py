"""Agreement of one rank; that of several is tested with the codistiller."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.codistill.agreement import Ages, Agreement, Vote
from p2pcodistill.codistill.exchange import ChainFile, Inbox, Offer

TEACHERS = ("berlin", "tokyo")
NUMBERS = st.integers(0, 2**62)
CHAINS = st.lists(st.builds(ChainFile, NUMBERS, NUMBERS, st.text(max_size=20)), min_size=1, max_size=5)


def agreement_of(teachers: tuple[str, ...] = TEACHERS) -> Agreement:
    return Agreement(teachers, None, num_columns=2)


def propose(agreement: Agreement, inbox: Inbox) -> None:
    agreement.propose(inbox, {}, dict.fromkeys(TEACHERS, Vote.WAIT), torch.zeros(2, 2, dtype=torch.int64))


def test_nothing_is_concluded_before_it_was_proposed() -> None:
    assert agreement_of().conclude() is None


def test_a_round_ends_once() -> None:
    agreement = agreement_of()
    propose(agreement, Inbox())
    assert agreement.conclude() is not None
    assert agreement.conclude() is None


@given(
    offers=st.dictionaries(
        st.sampled_from(TEACHERS),
        st.tuples(NUMBERS, NUMBERS, st.text(max_size=1000), CHAINS.map(tuple)),
    ),
    stop_requested=st.booleans(),
    revoked=st.frozensets(st.sampled_from(TEACHERS)),
    announced=st.dictionaries(st.sampled_from(TEACHERS), st.tuples(NUMBERS, NUMBERS)),
    votes=st.tuples(st.sampled_from(Vote), st.sampled_from(Vote)),
    ages=st.tuples(*[st.builds(Ages, st.floats(0, 1e9), st.floats(0, 1e9))] * 2),
    counts=st.lists(NUMBERS, min_size=4, max_size=4),
)
def test_bulletin_votes_and_tally_arrive_as_they_were(
    offers: dict[str, tuple[int, int, str, tuple[ChainFile, ...]]],
    stop_requested: bool,
    revoked: frozenset[str],
    announced: dict[str, tuple[int, int]],
    votes: tuple[Vote, Vote],
    ages: tuple[Ages, Ages],
    counts: list[int],
) -> None:
    inbox = Inbox(
        {name: Offer(name, *offer) for name, offer in offers.items()},
        stop_requested,
        announced,
        revoked=revoked,
    )
    votes_by_name, ages_by_name = (
        dict(zip(TEACHERS, votes, strict=True)),
        dict(zip(TEACHERS, ages, strict=True)),
    )
    tally = torch.tensor(counts).view(2, 2)
    agreement = agreement_of()
    agreement.propose(inbox, ages_by_name, votes_by_name, tally)
    decision = agreement.conclude()
    assert decision is not None
    assert decision.inbox == inbox
    assert decision.ages == ages_by_name
    assert decision.votes == votes_by_name
    assert torch.equal(decision.tally, tally)


def test_the_longest_chains_in_the_deepest_folders_fit() -> None:
    chain = (ChainFile(2**63 - 1, 2**63 - 1, "f" * 64 + ".frame"),) * MAX_CHAIN_FRAMES
    offer = Offer("", 2**63 - 1, 2**63 - 1, "/" + "x" * 4095, chain)
    inbox = Inbox(
        {name: replace(offer, teacher=name) for name in TEACHERS},
        announced=dict.fromkeys(TEACHERS, (2**63 - 1, 2**63 - 1)),
    )
    agreement = agreement_of()
    propose(agreement, inbox)
    decision = agreement.conclude()
    assert decision is not None and decision.inbox == inbox


def test_a_student_without_teachers_still_learns_of_a_stop() -> None:
    agreement = agreement_of(())
    agreement.propose(Inbox(stop_requested=True), {}, {}, torch.zeros(0, 2, dtype=torch.int64))
    decision = agreement.conclude()
    assert decision is not None and decision.inbox.stop_requested


def test_the_lowest_vote_is_the_strictest() -> None:
    assert min(Vote.READY, Vote.WAIT) is Vote.WAIT
    assert min(Vote.WAIT, Vote.GONE) is Vote.GONE
    assert min(Vote.GONE, Vote.REFUSE) is Vote.REFUSE
