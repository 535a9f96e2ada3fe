"""Agreement of one rank; that of several is tested with the codistiller."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.codistill.agreement import Agreement, Vote
from p2pcodistill.codistill.exchange import Inbox, Offer

TEACHERS = ("berlin", "tokyo")


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
        st.tuples(st.integers(0, 2**62), st.integers(0, 2**62), st.text(max_size=1000)),
    ),
    stop_requested=st.booleans(),
    votes=st.tuples(st.sampled_from(Vote), st.sampled_from(Vote)),
)
def test_bulletin_and_votes_arrive_as_they_were(
    offers: dict[str, tuple[int, int, str]], stop_requested: bool, votes: tuple[Vote, Vote]
) -> None:
    inbox = Inbox({name: Offer(name, *offer) for name, offer in offers.items()}, stop_requested)
    agreement = Agreement(TEACHERS, None)
    agreement.propose(inbox, dict(zip(TEACHERS, votes, strict=True)))
    decision = agreement.conclude()
    assert decision is not None
    assert decision.inbox == inbox
    assert decision.votes == dict(zip(TEACHERS, votes, strict=True))


def test_the_longest_paths_fit() -> None:
    inbox = Inbox({name: Offer(name, 2**62, 2**62, "/" + "x" * 4095) for name in TEACHERS})
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
