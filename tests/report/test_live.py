from __future__ import annotations

import io
import subprocess
import sys
import threading
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from p2pcodistill.report.live import LiveView, make_view
from p2pcodistill.report.plain import PlainView
from p2pcodistill.report.progress import Progress
from p2pcodistill.report.screen import screen
from p2pcodistill.telemetry.node_events import (
    NodeStopped,
    PeerConnected,
    Refused,
    TrafficMeasured,
    VersionAnnounced,
)
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.simulation_events import FaultInjected, SyntheticMeasured
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
    TeacherSwapped,
    TrainingStarted,
)

TRAINING_STARTED = TrainingStarted(0, 2000, 1000, 1, "cpu", "float32")
GATED = TeacherGated(60, "tokyo", 1, 50, 5.5, 1.5, "its loss is worse")
REFUSED = Refused(None, "unknown-peer", "a key that is not on the list \x1b[31mtried to connect")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def measured(step: int) -> StepMeasured:
    return StepMeasured(step, 1.25, None, 1e-3, 10.0, 0.0, 1.0)


# --- plain lines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_plain_lines_come_with_changes_of_state_and_at_evaluations(clock, stream):
    with PlainView("title", stream, clock, interval_s=10) as view:
        view.update("alone", "berlin", to_record(TRAINING_STARTED))
        for step in range(50, 550, 50):  # every 4 s
            clock.now_s += 4
            view.update("alone", "berlin", to_record(measured(step)))
            view.update("alone", "berlin", to_record(Evaluated(step, 2.0, 0.1)))
        view.update("alone", "berlin", to_record(NodeStopped("berlin", "finished")))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "title"
    assert lines[1] == "alone berlin: training, step 0/2000"
    assert [line.split("step ")[1].split("/")[0] for line in lines[2:-1]] == ["150", "300", "450"]
    assert lines[-1] == "alone berlin: finished, step 500/2000, loss 1.250, held-out 2.000"


def test_a_site_that_rarely_evaluates_is_heard_of_too(clock, stream):
    view = PlainView("title", stream, clock, interval_s=10)
    view.update("alone", "berlin", to_record(TRAINING_STARTED))
    for step in (10, 20, 30):
        clock.now_s += 20
        view.update("alone", "berlin", to_record(measured(step)))
    assert [line.count("step 20") for line in stream.getvalue().splitlines()] == [0, 1]


def test_a_flood_of_refusals_is_told_but_does_not_flood_the_log(clock, stream):
    with PlainView("title", stream, clock, interval_s=10) as view:
        for _ in range(100):
            view.update("pair", "berlin", to_record(REFUSED))
        assert stream.getvalue().count("refused so far") == 1
        clock.now_s += 11
        view.update("pair", "berlin", to_record(REFUSED))
        view.update("pair", "berlin", to_record(REFUSED))
    told = [line for line in stream.getvalue().splitlines() if "refused so far" in line]
    assert [line.split(": ")[1].split()[0] for line in told] == ["1", "101", "102"]
    assert all("unknown-peer: a key that is not on the list" in line for line in told)
    assert "\x1b" not in stream.getvalue()


def test_plain_lines_tell_at_once_who_does_not_teach(clock, stream):
    view = PlainView("title", stream, clock, interval_s=10)
    for event in (
        GATED,
        TeacherReadmitted(70, "tokyo", 1, 50, 1.5, 1.5),
        TeacherExpired(80, "tokyo", 1, 50, 9, 1.0, "stale"),
    ):
        view.update("pair", "berlin", to_record(event))
    assert stream.getvalue().splitlines() == [
        "pair berlin: does not learn from tokyo for now: its loss is worse",
        "pair berlin: learns from tokyo again",
        "pair berlin: does not learn from tokyo for now: stale",
    ]


def test_unknown_records_are_passed_over(clock, stream):
    PlainView("title", stream, clock).update("pair", "berlin", {"event": "from-the-future"})
    assert stream.getvalue() == ""


# --- redrawn in place ------------------------------------------------------------------------------------------------


def site_progress(*events) -> Progress:
    progress = Progress()
    for event in events:
        progress.update(to_record(event))
    return progress


def plain(lines) -> list[str]:
    return [line.plain.rstrip() for line in lines]


@pytest.fixture
def groups(make_events):
    def progress_of(kind: str, site: str, peers=()) -> Progress:
        until_1200 = takewhile(
            lambda event: getattr(event, "step", 0) <= 1200, make_events(kind, site, peers=peers)
        )
        return site_progress(*until_1200)

    return {
        "codistilled": {"berlin": progress_of("codistilled", "berlin", ("tokyo",)),
                        "tokyo": progress_of("codistilled", "tokyo", ("berlin",))},
        "alone": {"berlin": progress_of("alone", "berlin"), "tokyo": progress_of("alone", "tokyo")},
        "pooled": {"pooled": progress_of("pooled", "pooled")},
    }  # fmt: skip


def test_the_screen_shows_everything_at_100_columns(groups):
    lines = plain(screen("title", groups, 100, 30))
    assert max(map(len, lines)) <= 100
    row = lines[4]
    for shown in ("berlin", "━", "1200/2000", "1.533", "1.610", "tokyo 50", "1/1", "38.7 MB", "14.9", "0:5"):
        assert shown in row
    assert [line for line in lines if line in groups] == list(groups)


@pytest.mark.parametrize(
    ("num_columns", "gone"), [(80, ["peers"]), (60, ["peers", "loss", "received", "/s"])]
)
def test_a_narrow_screen_goes_without_what_is_dispensable(groups, num_columns, gone):
    lines = plain(screen("title", groups, num_columns, 24))
    assert max(map(len, lines)) <= num_columns
    for heading in ("step", "out", "sent", "left"):
        assert heading in lines[2]
    assert not any(heading in lines[2] for heading in gone)
    assert "1.610" in lines[4] and "tokyo 50" in lines[4]


def test_refusals_are_on_the_screen(groups):
    for _ in range(3):
        groups["codistilled"]["tokyo"].update(to_record(REFUSED))
    lines = plain(screen("title", groups, 120, 30))
    assert lines[-1].startswith("! tokyo (codistilled) refused 3, the last: unknown-peer: a key")
    assert all(line.isprintable() for line in lines)


def test_teachers_that_are_kept_from_teaching_are_on_the_screen_while_it_lasts(groups):
    groups["codistilled"]["berlin"].update(to_record(GATED))
    line = "! berlin (codistilled) does not learn from tokyo: its loss is worse"
    assert line in plain(screen("title", groups, 100, 30))
    groups["codistilled"]["berlin"].update(to_record(NodeStopped("berlin", "finished")))
    assert line not in plain(screen("title", groups, 100, 30))


def test_what_has_ended_folds_first(groups):
    for site in groups["alone"].values():
        site.update(to_record(NodeStopped("x", "finished")))
    lines = plain(screen("title", groups, 100, 11))
    assert len(lines) <= 10
    assert any(line.startswith("alone  2 sites finished, held-out 1.7") for line in lines)
    assert sum("━" in line for line in lines) == 3


def test_the_groups_at_work_stay_when_nothing_else_fits(groups):
    many = {
        f"seed{n}": {"berlin": site_progress(NodeStopped("berlin", "finished"))} for n in range(30)
    } | groups
    lines = plain(screen("title", many, 100, 12))
    assert len(lines) <= 11
    assert lines[-1].startswith("pooled")


@pytest.mark.parametrize(
    ("num_teachers", "expected"), [(1, "teacher0 50"), (4, "50 50 50 50"), (30, "0 to 50")]
)
def test_staleness_of_few_and_of_many_teachers(num_teachers, expected):
    events = [TRAINING_STARTED]
    for index in range(num_teachers):
        teacher = f"teacher{index}"
        events += [TeacherSwapped(60, teacher, 1, 50), VersionAnnounced(teacher, 1, 100, 10)]
    lines = plain(screen("title", {"full": {"berlin": site_progress(*events)}}, 120, 30))
    assert f" {expected} " in lines[4]


NUM_SITES = st.lists(st.integers(1, 6), max_size=8)


@settings(max_examples=60, deadline=None)
@given(NUM_SITES, st.integers(20, 160), st.integers(6, 50), st.booleans())
def test_the_screen_never_outgrows_the_terminal(num_sites, num_columns, num_rows, refusing):
    events = [TRAINING_STARTED, measured(10), TrafficMeasured(10**9, 10**12, {}, {})] + [REFUSED] * refusing
    groups = {
        f"group{index}": {f"site-with-a-long-name-{n}": site_progress(*events) for n in range(count)}
        for index, count in enumerate(num_sites)
    }
    lines = plain(screen("a title that is rather long for a title", groups, num_columns, num_rows))
    assert len(lines) < max(num_rows, 8)  # below that, refusals stay and scroll
    assert all(len(line) <= num_columns for line in lines)


def test_the_live_view_draws_and_cleans_up():
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=100, height=30, legacy_windows=False)
    threads_before = set(threading.enumerate())
    with LiveView("the title", console) as view:
        view.update("pair", "berlin", to_record(TRAINING_STARTED))
        view.update("pair", "berlin", to_record(measured(1234)))
        view.update("pair", "berlin", to_record(PeerConnected("[bold]tokyo")))
    output = terminal.getvalue()
    assert "the title" in output and "1234/2000" in output
    assert output.endswith("\x1b[?25h")  # the cursor is back
    assert set(threading.enumerate()) == threads_before


def test_the_live_view_cleans_up_after_an_error():
    terminal = Terminal()
    threads_before = set(threading.enumerate())
    with (
        pytest.raises(ZeroDivisionError),
        LiveView("title", Console(file=terminal, force_terminal=True, width=80, height=24)),
    ):
        raise ZeroDivisionError
    assert terminal.getvalue().endswith("\x1b[?25h")
    assert set(threading.enumerate()) == threads_before


def test_make_view_chooses_by_the_stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_view("title", Terminal()), LiveView)
    assert isinstance(make_view("title", io.StringIO()), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view("title", Terminal()), PlainView)


def test_the_live_view_costs_a_node_nothing_heavy():
    heavy = "{'matplotlib', 'jinja2', 'torch', 'numpy'}"
    code = f"import sys, p2pcodistill.report.live; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_whole_simulation_without_training_is_one_line_with_what_there_is_to_show(stream):
    measured = SyntheticMeasured(1200, 2000, 1000, 998, 34.2, 150, 0.9655, 312_000, 12_300_000_000)
    fault = FaultInjected("7", "kill", 800)
    progress = site_progress(measured, fault)
    lines = plain(screen("title", {"synthetic": {"1000 sites": progress}}, 100, 20))
    assert lines[2].split() == ["site", "state", "step", "steps", "sent"]
    assert lines[4].split()[:2] == ["1000", "sites"] and lines[4].endswith("34, at most 150  12.3 GB")
    assert "1200/2000" in lines[4] and "━" in lines[4]
    told = "998 sites up, 97 % of all pairs of sites know of each other, 312,000 versions delivered"
    assert lines[5] == f"synthetic: {told}"
    assert lines[6].endswith("the last: kill of 7 at step 800")
    view = PlainView("title", stream)
    view.update("synthetic", "1000 sites", to_record(measured))
    view.update("synthetic", "1000 sites", to_record(fault))
    assert stream.getvalue().splitlines() == [
        "synthetic 1000 sites: simulating, step 1200/2000, teachers 34, at most 150 steps stale, "
        f"{told}, sent 12.3 GB",
        "synthetic 1000 sites: fault: kill of 7 at step 800",
    ]
