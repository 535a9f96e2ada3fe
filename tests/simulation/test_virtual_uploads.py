"""Upload caps and the size of chunks in virtual time: as node files say, and as real nodes do."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES, MIN_CHUNK_BYTES
from p2pcodistill.config import NodeConfig
from p2pcodistill.links import LEAST_CHUNK_BYTES
from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.files import loopback, write_node_files, write_scenario
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.links import PERFECT, neighbour_pairs, upload_caps
from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.run import VirtualSettings
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticSchedule
from p2pcodistill.simulation.virtual.synthetic_run import SyntheticRun
from p2pcodistill.simulation.virtual.uploads import CappedUploads
from p2pcodistill.strict import load_toml, parse_model
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FrameFetched
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.transport.shaper import UploadCaps
from p2pcodistill.uploads import MAX_REQUESTS

MBIT = 125_000.0
MODEL = SyntheticModel(num_fp16_bytes=8_000_000, keyframe_bytes=4_000_000, delta_bytes=1_000_000)
SCHEDULE = SyntheticSchedule(num_versions=2, interval_steps=1000, step_time_s=0.1, first_step=10)


def fetched(
    spec: str, caps: dict[str, UploadCaps], shape: LinkShape = PERFECT
) -> tuple[SyntheticRun, dict[tuple[str, str, str], float]]:
    """A run, and how long each frame took, by origin, student and kind."""
    took_s: dict[tuple[str, str, str], float] = {}

    def note(_time_s: float, site: str, event: Event) -> None:
        if isinstance(event, FrameFetched):
            took_s[event.origin, site, event.kind] = event.duration_s

    members = default_members(spec)
    assert members is not None
    topology = build_topology(spec, members)
    shapes = dict.fromkeys(neighbour_pairs(topology), (shape, shape))
    settings = VirtualSettings(caps=caps)
    run = SyntheticRun(topology, MODEL, SCHEDULE, settings=settings, shapes=shapes, on_event=note)
    run.run()
    assert run.is_complete
    return run, took_s


# --- the caps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [UploadCaps(4 * MBIT), UploadCaps(None, {"1": 4 * MBIT})])
def test_what_a_site_sends_keeps_to_its_caps(caps: UploadCaps) -> None:
    run, took_s = fetched("pair", {"0": caps})

    assert took_s["0", "1", "keyframe"] == pytest.approx(4e6 / (4 * MBIT), rel=0.1)
    assert took_s["0", "1", "delta"] == pytest.approx(1e6 / (4 * MBIT), rel=0.3)
    assert took_s["1", "0", "keyframe"] < 0.1, "the other one has no cap"
    num_bytes = run.network.links["0", "1"].wire_from("0").num_bytes_sent
    assert num_bytes == pytest.approx(5e6, rel=0.05)


def test_a_cap_of_the_site_is_shared_by_those_who_ask_and_one_of_a_link_is_not() -> None:
    _, shared = fetched("star:3", {"0": UploadCaps(4 * MBIT)})
    _, own = fetched("star:3", {"0": UploadCaps(None, {"1": 4 * MBIT})})

    for student in ("1", "2"):
        assert shared["0", student, "keyframe"] == pytest.approx(8e6 / (4 * MBIT), rel=0.1)
    assert own["0", "1", "keyframe"] == pytest.approx(8.0, rel=0.1)
    assert own["0", "2", "keyframe"] < 0.1


def test_requests_wait_for_the_cap_are_not_served_twice_and_go_with_their_session() -> None:
    clock, served = VirtualClock(), []

    def serve(peer: str, frame_id: str, index: int) -> None:
        served.append((clock.now_s, peer, index))
        uploads.spend(peer, 1000)

    uploads = CappedUploads(UploadCaps(1000.0), clock, serve)
    for index in (0, 1, 1, 2):
        assert uploads.ask("berlin", "frame", index)
    clock.run(1.5)
    assert served == [(0.0, "berlin", 0), (pytest.approx(1.0), "berlin", 1)]

    uploads.forget("berlin")
    clock.run(10.0)
    assert len(served) == 2
    assert all(uploads.ask("berlin", "frame", index) for index in range(MAX_REQUESTS + 1))
    assert not uploads.ask("berlin", "frame", MAX_REQUESTS + 1)


def test_control_never_waits_and_counts() -> None:
    clock, served = VirtualClock(), []
    uploads = CappedUploads(
        UploadCaps(1000.0), clock, lambda _peer, _frame, index: served.append(clock.now_s)
    )
    uploads.spend("tokyo", 3000)

    uploads.ask("berlin", "frame", 0)
    clock.run(10.0)

    assert served == [pytest.approx(3.0)]


# --- chunks ------------------------------------------------------------------------------------------------------


def chunk_sizes(run: SyntheticRun) -> list[int]:
    """Of the frames of site 0, oldest first, as on the links."""
    scale = run.network.settings.bytes_scale
    return [frame.signed.manifest.chunk_bytes * scale for frame in run.network.sites["0"].store.frames("0")]


def test_chunks_are_smaller_where_a_student_is_behind_a_thin_link() -> None:
    thin, _ = fetched("pair", {}, LinkShape(bandwidth_mbit=2.0))
    thinnest, _ = fetched("pair", {}, LinkShape(bandwidth_mbit=0.5))
    capped, _ = fetched("pair", {"0": UploadCaps(2 * MBIT)})
    fast, _ = fetched("pair", {}, LinkShape(bandwidth_mbit=100.0))

    assert chunk_sizes(fast) == [DEFAULT_CHUNK_BYTES] * 2
    assert chunk_sizes(thin) == [DEFAULT_CHUNK_BYTES, DEFAULT_CHUNK_BYTES // 4], (
        "what it carries is seen first"
    )
    assert chunk_sizes(thinnest) == [DEFAULT_CHUNK_BYTES, LEAST_CHUNK_BYTES]
    assert chunk_sizes(capped) == [DEFAULT_CHUNK_BYTES // 4] * 2, "a cap is known"
    assert thin.network.settings.chunk_bytes >= MIN_CHUNK_BYTES


# --- scenario files ----------------------------------------------------------------------------------------------


def test_node_files_and_virtual_sites_have_the_same_caps(tmp_path: Path) -> None:
    path = tmp_path / "capped.toml"
    content = {
        "name": "capped",
        "mode": "virtual",
        "topology": "ring",
        "sites": [{"name": "a", "max_upload_mbit": 3}, *({"name": name} for name in ("b", "c", "d"))],
        "arms": [{"name": "codistilled", "kind": "codistilled"}],
        "data": {"paths": ["text.txt"], "max_bytes_per_site": 2000, "max_held_out_bytes": 1000},
        "links": [{"between": "all", "max_upload_mbit": 2}, {"between": ["c", "b"], "max_upload_mbit": 0.5}],
    }
    path.write_text(tomli_w.dumps(content))
    (tmp_path / "text.txt").write_text("what anyone may say\n" * 5000)
    scenario = load_scenario(path)
    topology = build_topology(scenario.topology, scenario.site_names)

    caps = upload_caps(scenario, topology)

    assert caps["a"] == UploadCaps(3 * MBIT, {"b": 2 * MBIT, "d": 2 * MBIT})
    assert caps["b"] == UploadCaps(None, {"a": 2 * MBIT, "c": 0.5 * MBIT})
    folder = tmp_path / "run"
    folder.mkdir()
    scenario = write_scenario(scenario, prepare_data(scenario), folder)
    job = make_jobs(scenario)[0]
    for place in write_node_files(job, scenario, folder, addresses=[loopback(port) for port in range(4)]):
        config = parse_model(NodeConfig, load_toml(place.node_file), source="the node's file")
        of_node = UploadCaps.of(config)
        neighbours = topology.neighbours_of(place.site)
        of_links = {peer: rate for peer, rate in of_node.link_bytes_s.items() if peer in neighbours}
        assert UploadCaps(of_node.site_bytes_s, of_links) == caps[place.site]
