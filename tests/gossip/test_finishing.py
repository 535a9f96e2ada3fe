"""Who has finished training: what only the member itself can say, and until when it counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import FloodedError, MalformedError, SignatureError, UnknownPeerError
from p2pcodistill.gossip.events import PeerClosed, PeerOpened, TrainingFinished
from p2pcodistill.gossip.finishing import MAX_STATEMENTS, Finishing
from p2pcodistill.gossip.membership import MAX_CREDIBLE_INCARNATION, members_digest
from p2pcodistill.gossip.messages import PROTOCOL_VERSION, Finished, Hello
from p2pcodistill.gossip.trust import MAX_REFUSALS
from p2pcodistill.identity import PublicIdentity
from p2pcodistill.telemetry.node_events import PeerQuarantined

INCARNATION = 5


def finishing(sites: Any, site: str = "berlin", **known_incarnations: int) -> Finishing:
    return Finishing(
        site,
        "run",
        sites.members,
        sign=sites.identities[site].sign,
        known_incarnation=lambda member: known_incarnations.get(member, 0),
    )


def connect(node: Any, peer: str, *, incarnation: int = INCARNATION, known_incarnation: int = 0) -> None:
    node.feed(PeerOpened(peer))
    digest = members_digest(node.sites.members)
    node.receive(peer, Hello(PROTOCOL_VERSION, "run", digest, bytes(32), incarnation, known_incarnation))


def test_what_a_site_says_of_itself_others_believe_whoever_brings_it(sites: Any) -> None:
    tokyo, berlin = finishing(sites, "tokyo"), finishing(sites)
    assert not tokyo.has_finished and tokyo.statement_of("tokyo") is None
    statement = tokyo.finish(INCARNATION)
    assert tokyo.has_finished and tokyo.statement_of("tokyo") == statement

    assert berlin.hear("lima", statement)
    assert not berlin.hear("tokyo", statement), "known already"

    assert berlin.is_finished("tokyo") and berlin.statement_of("tokyo") == statement
    assert not berlin.is_finished("lima") and not berlin.has_finished


@pytest.mark.parametrize(
    "change",
    [
        {"signer": "lima"},
        {"signer": "stranger"},
        {"run": "another run"},
    ],
)
def test_what_the_member_did_not_sign_for_this_run_is_refused(sites: Any, change: dict[str, str]) -> None:
    berlin = finishing(sites)
    forged = sites.finished("tokyo", incarnation=INCARNATION, **change)

    with pytest.raises(SignatureError, match="lima says that tokyo has finished, which tokyo has not signed"):
        berlin.hear("lima", forged)
    assert not berlin.is_finished("tokyo")


@given(
    st.integers(0, MAX_CREDIBLE_INCARNATION), st.sampled_from(["berlin", "lima", "oslo"]), st.integers(0, 511)
)
def test_nothing_of_a_statement_can_be_changed(sites: Any, incarnation: int, member: str, bit: int) -> None:
    true = sites.finished("tokyo", incarnation=INCARNATION)
    flipped = (int.from_bytes(true.signature, "big") ^ (1 << bit)).to_bytes(64, "big")
    false = [Finished("tokyo", INCARNATION, flipped), Finished(member, INCARNATION, true.signature)]
    if incarnation != INCARNATION:
        false.append(Finished("tokyo", incarnation, true.signature))
    for statement in false:
        oslo = finishing(sites, "tokyo" if statement.member == "oslo" else "oslo")
        with pytest.raises(SignatureError):
            oslo.hear("lima", statement)
        assert not oslo.is_finished(statement.member)


def test_of_strangers_nothing_is_believed(sites: Any) -> None:
    with pytest.raises(UnknownPeerError, match="'stranger' has finished, who is no member"):
        finishing(sites).hear("lima", sites.finished("stranger"))


def test_a_member_that_was_launched_again_has_not_finished(sites: Any) -> None:
    old, new = (sites.finished("tokyo", incarnation=i) for i in (INCARNATION, INCARNATION + 1))
    told = finishing(sites)
    assert told.hear("lima", old)
    told.greet("tokyo", INCARNATION)
    assert told.is_finished("tokyo"), "the same life"
    told.greet("tokyo", INCARNATION + 1)
    assert not told.is_finished("tokyo") and told.statement_of("tokyo") is None
    assert not told.hear("lima", old), "who passes it on is behind"
    assert told.hear("lima", new) and told.is_finished("tokyo")

    told.greet("tokyo", 1)
    assert not told.is_finished("tokyo"), "a new machine, which has not seen its peers yet"
    for past in (old, new):
        assert not told.hear("lima", past) and not told.is_finished("tokyo"), "those are of the old machine"
    assert told.hear("tokyo", sites.finished("tokyo", incarnation=1)) and told.is_finished("tokyo")
    assert not told.hear("lima", new)
    told.greet("tokyo", 1)
    assert told.is_finished("tokyo"), "another session of the same life"
    told.greet("tokyo", 2)
    assert not told.hear("lima", new) and not told.is_finished("tokyo")
    assert told.hear("tokyo", sites.finished("tokyo", incarnation=INCARNATION + 2)), (
        "told of its past meanwhile"
    )

    met = finishing(sites)
    met.greet("tokyo", INCARNATION)
    met.greet("tokyo", 1)
    assert not met.hear("lima", old) and not met.is_finished("tokyo"), "nobody had said so before"

    announced = finishing(sites, tokyo=INCARNATION + 1)
    assert not announced.hear("lima", old) and not announced.is_finished("tokyo")
    assert announced.hear("lima", new) and announced.is_finished("tokyo")


def test_no_member_uses_up_the_incarnations_that_there_are(sites: Any) -> None:
    berlin = finishing(sites)
    beyond = MAX_CREDIBLE_INCARNATION + 1
    with pytest.raises(
        MalformedError, match=f"tokyo has finished under incarnation {beyond}, which cannot be"
    ):
        berlin.hear("tokyo", sites.finished("tokyo", incarnation=beyond))
    berlin.greet("tokyo", beyond)
    assert berlin.hear("tokyo", sites.finished("tokyo", incarnation=beyond)), "if it was launched so"


def test_who_finishes_again_and_again_is_passed_on_a_few_times_and_then_refused(sites: Any) -> None:
    berlin = finishing(sites)
    statements = [sites.finished("tokyo", incarnation=i) for i in range(MAX_STATEMENTS + 1)]
    berlin.greet("tokyo", 0)
    for statement in statements[:-1]:
        assert berlin.hear("tokyo", statement)
    for _ in range(2):
        with pytest.raises(FloodedError, match="tokyo has said more than 20 times that it has finished"):
            berlin.hear("tokyo", statements[-1])
        assert not berlin.hear("lima", statements[-1]), "no fault of whoever passes it on"
    assert berlin.statement_of("tokyo") == statements[-2]

    berlin.greet("tokyo", MAX_STATEMENTS)
    assert berlin.hear("tokyo", statements[-1]), "it was launched again"


def test_what_one_site_has_verified_no_other_in_the_process_verifies(
    sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[bytes] = []
    verify = PublicIdentity.verify

    def count(self: PublicIdentity, signature: bytes, message: bytes) -> None:
        verified.append(message)
        verify(self, signature, message)

    monkeypatch.setattr(PublicIdentity, "verify", count)
    true = sites.finished("tokyo", incarnation=12345)
    forged = sites.finished("tokyo", incarnation=12345, signer="lima")
    for name in ("berlin", "lima"):
        with pytest.raises(SignatureError):
            finishing(sites, name).hear("oslo", forged)
        assert finishing(sites, name).hear("oslo", true)
    assert len(verified) == 3, "what does not verify is tried anew each time"


def test_a_site_does_not_take_its_own_past_for_its_end(sites: Any) -> None:
    tokyo = finishing(sites, "tokyo")
    assert not tokyo.hear("lima", sites.finished("tokyo", incarnation=INCARNATION))
    assert not tokyo.has_finished


def test_it_outlives_the_session_until_another_life_begins(sites: Any) -> None:
    node = sites.node("berlin", students=("tokyo",))
    connect(node, "tokyo")
    node.receive("tokyo", sites.finished("tokyo", incarnation=INCARNATION))
    node.feed(PeerClosed("tokyo", "it is done"))
    assert node.gossip.students_finished
    connect(node, "tokyo", incarnation=INCARNATION + 1)
    assert not node.gossip.students_finished
    assert node.refusals() == []


def test_who_forges_the_end_of_others_is_refused_by_name_and_quarantined(sites: Any) -> None:
    node = sites.node("berlin", teachers=("tokyo",), students=("tokyo", "lima"))
    connect(node, "oslo")
    for attempt in range(MAX_REFUSALS):
        node.receive("oslo", sites.finished(("tokyo", "lima")[attempt % 2], signer="oslo"))
    node.feed(TrainingFinished())

    assert node.refusals()[:MAX_REFUSALS] == [("oslo", "bad-signature")] * MAX_REFUSALS
    assert [event.peer for event in node.events if isinstance(event, PeerQuarantined)] == ["oslo"]
    assert not node.gossip.students_finished and not node.gossip.teachers_told


def test_who_has_finished_and_learns_of_a_past_life_says_so_again(sites: Any) -> None:
    node = sites.node("berlin", students=("tokyo", "lima"))
    connect(node, "lima")
    node.feed(TrainingFinished())
    assert node.take_messages()[-1] == ("lima", sites.finished("berlin"))

    node.publish(sites.frame("berlin", 1, incarnation=0))
    connect(node, "tokyo", known_incarnation=7)

    assert node.store.incarnation == 8
    ends = {peer: message for peer, message in node.take_messages() if isinstance(message, Finished)}
    assert ends == dict.fromkeys(("lima", "tokyo"), sites.finished("berlin", incarnation=8))
