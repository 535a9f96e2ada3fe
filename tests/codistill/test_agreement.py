"""Agreement of one rank; that of several is tested with the codistiller."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.codistill.agreement import Agreement, Vote
from p2pcodistill.codistill.exchange import ChainFile, Inbox, Offer

TEACHERS = ("berlin", "tokyo")
NUMBERS = st.integers(0, 2**62)
CHAINS = st.lists(st.builds(ChainFile, NUMBERS, NUMBERS, st.text(max_size=20)), min_size=1, max_size=5)


def test_nothing_is_concluded_before_it_was_proposed() -> None:
    assert Agreement(TEACHERS, None).conclude() is None


def test_a_round_ends_once() -> None:
    agreement = Agreement(TEACHERS, None)
    agreement.propose(Inbox(), dict.fromkeys(TEACHERS, Vote.WAIT))
    assert agreement.conclude() is not None
    assert agreement.conclude() is None


@given(
    offers=st.dictionaries(
        st.sampled_from(TEACHERS),
        st.tuples(NUMBERS, NUMBERS, st.text(max_size=1000), CHAINS.map(tuple)),
    ),
    stop_requested=st.booleans(),
    votes=st.tuples(st.sampled_from(Vote), st.sampled_from(Vote)),
)
def test_bulletin_and_votes_arrive_as_they_were(
    offers: dict[str, tuple[int, int, str, tuple[ChainFile, ...]]],
    stop_requested: bool,
    votes: tuple[Vote, Vote],
) -> None:
    inbox = Inbox({name: Offer(name, *offer) for name, offer in offers.items()}, stop_requested)
    agreement = Agreement(TEACHERS, None)
    agreement.propose(inbox, dict(zip(TEACHERS, votes, strict=True)))
    decision = agreement.conclude()
    assert decision is not None
    assert decision.inbox == inbox
    assert decision.votes == dict(zip(TEACHERS, votes, strict=True))


def test_the_longest_chains_in_the_deepest_folders_fit() -> None:
    chain = (ChainFile(2**63 - 1, 2**63 - 1, "f" * 64 + ".frame"),) * MAX_CHAIN_FRAMES
    offer = Offer("", 2**63 - 1, 2**63 - 1, "/" + "x" * 4095, chain)
    inbox = Inbox({name: replace(offer, teacher=name) for name in TEACHERS})
    agreement = Agreement(TEACHERS, None)
    agreement.propose(inbox, dict.fromkeys(TEACHERS, Vote.WAIT))
    decision = agreement.conclude()
    assert decision is not None and decision.inbox == inbox


def test_a_student_without_teachers_still_learns_of_a_stop() -> None:
    agreement = Agreement((), None)
    agreement.propose(Inbox(stop_requested=True), {})
    decision = agreement.conclude()
    assert decision is not None and decision.inbox.stop_requested


def test_the_lowest_vote_is_the_strictest() -> None:
    assert min(Vote.READY, Vote.WAIT) is Vote.WAIT
    assert min(Vote.WAIT, Vote.GONE) is Vote.GONE
    assert min(Vote.GONE, Vote.REFUSE) is Vote.REFUSE
