"""Which links of a job are shaped, who dials them, and what a partition does to them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from patience import GENEROUS_S

from p2pcodistill.simulation.links import JobLinks, link_shapes, neighbour_pairs
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.topology.build import build_topology
from p2pcodistill.topology.graph import Topology


def load(folder: Path, **changes: Any) -> tuple[ScenarioConfig, Topology]:
    content = {
        "name": "four",
        "sites": [{"name": name} for name in ("a", "b", "c", "d")],
        "topology": "ring",
        "arms": [{"name": "codistilled", "kind": "codistilled"}],
    }
    path = folder / "four.toml"
    path.write_text(tomli_w.dumps(content | changes))
    scenario = load_scenario(path)
    return scenario, build_topology(scenario.topology, scenario.site_names)


def test_what_the_scenario_says_comes_before_what_the_graph_file_says(tmp_path: Path) -> None:
    (tmp_path / "far.edgelist").write_text(
        'a b {"bandwidth_mbit": 2, "latency_ms": 50}\nb a {"bandwidth_mbit": 1}\nb c {"loss_ratio": 0.1}\nc d\n'
    )
    scenario, topology = load(
        tmp_path,
        topology="far.edgelist",
        links=[{"between": ["c", "b"], "bandwidth_mbit": 9, "jitter_ms": 3, "reset_interval_s": 5}],
    )
    assert list(neighbour_pairs(topology)) == [("a", "b"), ("b", "c"), ("c", "d")]
    nine = LinkShape(bandwidth_mbit=9, jitter_ms=3, reset_interval_s=5)
    assert link_shapes(scenario, topology) == {
        ("a", "b"): (LinkShape(bandwidth_mbit=2, latency_ms=50), LinkShape(bandwidth_mbit=1)),
        ("b", "c"): (nine, nine),
        ("c", "d"): (LinkShape(), LinkShape()),
    }


async def test_only_what_is_shaped_or_cut_off_goes_through_a_relay_and_one_side_dials_it(
    tmp_path: Path,
) -> None:
    scenario, topology = load(
        tmp_path,
        links=[{"between": ["b", "a"], "bandwidth_mbit": 8}],
        faults=[
            {"kind": "partition", "sites": ["c"], "at_s": 0},
            {"kind": "heal", "sites": ["c"], "at_s": 1},
        ],
    )
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    real = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    links = JobLinks(scenario, topology, dict.fromkeys("abcd", real), seed=0)
    await links.open()
    try:
        assert links.address("a", "d", real) == links.address("d", "a", real) == real
        for dialler, peer in ("ab", "bc", "cd"):
            assert links.address(peer, dialler, real) is None
            address = links.address(dialler, peer, real)
            assert address is not None and address != real

        async def connects() -> bool:
            host, _, port = str(links.address("b", "c", real)).removeprefix("tcp://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                return await reader.read() == b""
            except ConnectionResetError:
                return False
            finally:
                writer.close()

        assert await connects()
        partition, _ = scenario.faults
        links.separate(partition)
        assert not await connects()
        links.heal(["c"])
        assert await connects()
        carried = {tuple(event.sites): event.num_cuts for event in links.measure()}
        assert carried.keys() == {("a", "b"), ("b", "c"), ("c", "d")}
    finally:
        await links.close()
        server.close()
        await server.wait_closed()


async def test_a_black_hole_between_two_sites_is_no_black_hole_for_others(tmp_path: Path) -> None:
    faults = [{"kind": "black-hole", "sites": ["b"], "from_sites": ["c"], "at_s": 0}]
    scenario, topology = load(tmp_path, faults=faults)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    real = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    links = JobLinks(scenario, topology, dict.fromkeys("abcd", real), seed=0)
    await links.open()
    try:
        assert links.address("a", "b", real) == real, "which needs no relay"
        links.separate(scenario.faults[0])
        host, _, port = str(links.address("b", "c", real)).removeprefix("tcp://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        over = asyncio.create_task(reader.read())
        async with asyncio.timeout(GENEROUS_S):
            while True:
                if links.measure()[0].num_swallowed:
                    break
                await asyncio.sleep(0.01)
        assert not over.done(), "the connection stays"
        links.heal(["b"])
        assert await over == b""
        writer.close()
    finally:
        await links.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("seed", [1, 2])
async def test_links_of_perfect_scenarios_need_no_relay(tmp_path: Path, seed: int) -> None:
    scenario, topology = load(tmp_path)
    links = JobLinks(scenario, topology, dict.fromkeys("abcd", "tcp://127.0.0.1:1"), seed=seed)
    await links.open()
    assert links.measure() == []
    await links.close()
