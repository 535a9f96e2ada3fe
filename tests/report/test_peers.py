"""What sites tell of their links and peers: in the history, in lines, on the screen and in the report."""

from __future__ import annotations

import io

import pytest

from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.html import write_report
from p2pcodistill.report.links import link_rows, link_sentence, mbit
from p2pcodistill.report.plain import PlainView
from p2pcodistill.report.progress import Progress, describe
from p2pcodistill.report.screen import MAX_LINK_LINES, screen
from p2pcodistill.report.summary import summarise
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    FrameFetched,
    LinkMeasured,
    MemberTrustChanged,
    NodeStarted,
    PeerConnected,
    PeerDisconnected,
    PeerQuarantined,
    PeerRecovered,
    PeerSuspected,
    Refused,
    RelayStarted,
    RelayStopped,
    VersionAnnounced,
)
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import TrainingStarted

STARTED = NodeStarted("berlin", "run", "tcp://127.0.0.1:1", 1, ["tokyo", "lima"], 1)
TRAINING = TrainingStarted(0, 100, 1000, 1, "cpu", "float32")
THIN = LinkMeasured("tokyo", 0.912, 1.04, 203.4, 3, 120_000)
WIDE = LinkMeasured("lima", 95.0, None, None, 0, 0)
QUARANTINED = PeerQuarantined("lima", "replayed", 20, 60.0)


def progress_of(*events: Event, times_s: float = 1000.0) -> Progress:
    progress = Progress()
    for event in events:
        progress.update(to_record(event, time_unix_s=times_s))
    return progress


def history_of(*events: Event) -> SiteHistory:
    return SiteHistory.of([to_record(event, time_unix_s=1000.0 + at_s) for at_s, event in enumerate(events)])


def test_a_link_in_words_says_what_was_measured_and_nothing_else() -> None:
    assert link_sentence(THIN) == (
        "0.91 Mbit/s up, 1.0 Mbit/s down, 203 ms there and back, 120.0 kB waiting, lost 3 times"
    )
    assert link_sentence(WIDE) == "95.0 Mbit/s up"
    assert link_sentence(LinkMeasured("oslo", None, None, None, 1, 0)) == "lost once"
    assert link_sentence(LinkMeasured("oslo", None, None, None, 0, 0)) == "not measured yet"
    assert [mbit(rate) for rate in (0.0123, 1.0, 12.34, 940.2)] == ["0.012", "1.0", "12.3", "940"]


def test_the_line_about_a_site_ends_with_its_thinnest_link() -> None:
    assert describe(progress_of(STARTED, TRAINING, WIDE, THIN)).endswith(
        f"thinnest link to tokyo: {link_sentence(THIN)}"
    )
    assert describe(progress_of(STARTED, TRAINING, THIN)).endswith(f", link to tokyo: {link_sentence(THIN)}")


def test_who_does_not_answer_is_known_until_it_does_or_is_gone() -> None:
    suspected = PeerSuspected("tokyo", 12.0)
    assert progress_of(STARTED, suspected).suspected_peers == {"tokyo": 12.0}
    for end in (PeerRecovered("tokyo", 30.0), PeerDisconnected("tokyo", "reset"), STARTED):
        assert progress_of(STARTED, suspected, end).suspected_peers == {}


def test_a_quarantine_is_over_when_its_time_is() -> None:
    progress = progress_of(STARTED, QUARANTINED)
    assert progress.quarantined_peers == {
        "lima": "for 60 s, after 20 refusals, the last of them replayed",
    }
    progress.update(to_record(PeerConnected("tokyo"), time_unix_s=1059.0))
    assert progress.quarantined_peers
    progress.update(to_record(PeerConnected("tokyo"), time_unix_s=1060.0))
    assert not progress.quarantined_peers


def test_plain_lines_tell_at_once_what_peers_do() -> None:
    stream = io.StringIO()
    view = PlainView("title", stream, lambda: 1000.0)
    for event in (
        PeerSuspected("tokyo", 12.0),
        PeerRecovered("tokyo", 31.0),
        QUARANTINED,
        MemberTrustChanged("lima", False, "its key was revoked"),
        RelayStarted("lima", "oslo"),
        RelayStopped("lima"),
    ):
        view.update("ring", "berlin", to_record(event, time_unix_s=1000.0))
    assert stream.getvalue().splitlines() == [
        "ring berlin: tokyo has not answered for 12 s: others are asked before it",
        "ring berlin: tokyo answers again, after 31 s",
        "ring berlin: does not listen to lima for 60 s, after 20 refusals, the last of them replayed",
        "ring berlin: no longer trusts lima: its key was revoked",
        "ring berlin: relays checkpoints of lima to oslo",
        "ring berlin: no longer relays checkpoints of lima",
    ]


def test_refusals_are_told_by_name_where_there_are_several_kinds() -> None:
    stream = io.StringIO()
    with PlainView("title", stream, lambda: 1000.0) as view:
        for reason, num_times in (("replayed", 1), ("bad-signature", 3), ("replayed", 1)):
            view.update("ring", "berlin", to_record(Refused("lima", reason, "so", num_times)))
    assert stream.getvalue().splitlines()[1:] == [
        "ring berlin: 1 refused so far; the last: replayed: from lima: so",
        "ring berlin: 5 (3 bad-signature, 2 replayed) refused so far; the last: replayed: from lima: so",
    ]


def lines_of(*events: Event, num_rows: int = 30) -> list[str]:
    groups = {"ring": {"berlin": progress_of(STARTED, TRAINING, *events)}}
    return [line.plain for line in screen("title", groups, 120, num_rows)]


def test_the_screen_names_who_is_not_listened_to_and_who_does_not_answer() -> None:
    lines = lines_of(QUARANTINED, PeerSuspected("tokyo", 12.0))
    assert lines[-2:] == [
        "! berlin (ring) does not listen to lima for 60 s, after 20 refusals, the last of them replayed",
        "! berlin (ring) gets no answer from tokyo: others are asked before it",
    ]


def test_the_screen_shows_the_thinnest_links_where_there_is_room() -> None:
    lines = lines_of(WIDE, THIN)
    assert lines[-2:] == [
        f"~ berlin (ring) to tokyo: {link_sentence(THIN)}",
        f"~ berlin (ring) to lima: {link_sentence(WIDE)}",
    ]
    num_without = len(lines) - 2
    assert len(lines_of(WIDE, THIN, num_rows=num_without + 2)) == num_without + 1, "the cursor has the last"
    assert len(lines_of(WIDE, THIN, num_rows=num_without + 1)) == num_without
    many = [LinkMeasured(f"s{index}", 1.0 + index, None, None, 0, 0) for index in range(9)]
    shown = [line for line in lines_of(*many) if line.startswith("~")]
    assert len(shown) == MAX_LINK_LINES and "to s0:" in shown[0]


def test_what_was_measured_and_refused_adds_up_over_the_lives_of_a_node() -> None:
    history = history_of(
        STARTED,
        THIN,
        LinkMeasured("tokyo", 0.5, 2.0, 190.0, 4, 7),
        Refused("lima", "replayed", "so", 2),
        Refused(None, "unknown-peer", "so"),
        QUARANTINED,
        STARTED,
        LinkMeasured("tokyo", None, None, 210.0, 1, 0),
        PeerSuspected("tokyo", 12.0),
    )
    tokyo, lima = history.peers["tokyo"], history.peers["lima"]
    assert (tokyo.upload_mbit, tokyo.download_mbit, tokyo.round_trip_ms) == (0.912, 2.0, 190.0)
    assert (tokyo.num_connection_losses, tokyo.max_queued_bytes, tokyo.num_suspicions) == (5, 120_000, 1)
    assert (lima.num_refusals, lima.num_quarantines, lima.is_measured) == (2, 1, False)
    assert history.refusals == {"replayed": 2, "unknown-peer": 1} and history.num_refusals == 3
    assert link_rows({"berlin": history}) == [
        ["berlin", "tokyo", "0.91", "2.0", "190", "5", "120.0 kB", "0", "0", "1"],
        ["berlin", "lima", "–", "–", "–", "0", "–", "2", "1", "0"],
    ]


def test_what_is_fetched_for_others_is_not_from_a_teacher() -> None:
    fetched = FrameFetched("oslo", 1, 50, "keyframe", 1000, 24, 0.5)
    history = history_of(
        STARTED, RelayStarted("oslo", "lima"), VersionAnnounced("oslo", 1, 50, 1000), fetched, fetched
    )
    assert history.fetched == {} and history.num_bytes_relayed == {"oslo": 2048}
    progress = progress_of(
        STARTED, RelayStarted("oslo", "lima"), VersionAnnounced("oslo", 1, 50, 1000), fetched
    )
    assert progress.staleness_steps == {}


@pytest.fixture
def told_arms(make_arms):
    arms = make_arms(sites=("berlin", "tokyo", "lima"))
    told = history_of(
        STARTED, THIN, Refused("lima", "replayed", "so", 2), QUARANTINED, PeerSuspected("tokyo", 9.0)
    )
    berlin = arms[0].sites["berlin"]
    berlin.peers, berlin.refusals, berlin.num_refusals = told.peers, told.refusals, told.num_refusals
    return arms


def test_the_summary_has_it_by_peer_and_notes_say_what_is_odd(told_arms) -> None:
    summary = summarise("ring", told_arms, 2000)
    berlin = summary["arms"][0]["sites"]["berlin"]
    assert berlin["num_refusals_by_reason"] == {"replayed": 2}
    assert berlin["peers"]["tokyo"]["upload_mbit"] == 0.912
    assert berlin["peers"]["lima"]["num_quarantines"] == 1
    notes = " ".join(summary["notes"])
    assert "berlin (codistilled) refused 2 thing(s) that arrived (2 replayed); its events say why." in notes
    assert "berlin (codistilled) did not listen to lima for a while, 1 time(s)" in notes
    assert "berlin (codistilled) got no answer from tokyo for a while, 1 time(s)" in notes


def test_the_report_has_a_table_of_links_where_they_were_measured(told_arms, make_arms, tmp_path) -> None:
    path = tmp_path / "report.html"
    for arms, is_told in ((told_arms, True), (make_arms(), False)):
        write_report(
            path,
            title="ring",
            summary=summarise("ring", arms, 2000),
            arms=arms,
            configuration_text="",
            versions={},
        )
        assert ("measured of its links" in path.read_text()) == is_told
        assert ("<td>203</td>" in path.read_text()) == is_told
