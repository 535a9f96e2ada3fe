"""Sites in network namespaces: addresses, links that the kernel shapes, and that nothing is left. Needs root on Linux."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from patience import GENEROUS_S

from p2pcodistill.errors import ConfigError, GroupError, NamespaceError
from p2pcodistill.simulation import namespaces
from p2pcodistill.simulation.namespaces import PORT, SiteNetwork, remove_leftovers, require_namespaces
from p2pcodistill.simulation.processes import simulate


def can_make_namespaces() -> bool:
    """Whether the tests below can run here."""
    try:
        require_namespaces()
        network = SiteNetwork(["probe", "other"])
        try:
            network.open({("probe", "other"): (1.0, None)})
        finally:
            network.close()
    except NamespaceError:
        return False
    return True


needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root on Linux, and iproute2")


@pytest.fixture
def untouched() -> Iterator[None]:
    """The machine's own network is in the end as it was."""
    before = machine_network()
    yield
    assert machine_network() == before


def machine_network() -> tuple[list[str], list[str], str]:
    """The named namespaces, and the devices and routes outside of them."""
    folder = Path("/run/netns")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    devices = sorted(name for _, name in socket.if_nameindex())
    return names, devices, Path("/proc/net/route").read_text()


@pytest.fixture
def network(untouched: None) -> Iterator[SiteNetwork]:
    """Three sites in a row; one link of 8 Mbit/s in one direction, one that is not limited."""
    network = SiteNetwork(["berlin", "tokyo", "lima"])
    try:
        network.open({("berlin", "tokyo"): (8.0, None), ("tokyo", "lima"): (None, None)})
        yield network
    finally:
        network.close()


def host(network: SiteNetwork, site: str) -> tuple[str, int]:
    """Where the site listens."""
    return network.addresses[site].removeprefix("tcp://").partition(":")[0], PORT


def send(network: SiteNetwork, sender: str, receiver: str, num_bytes: int) -> tuple[str, float]:
    """Have one site send so much to another; the address that it came from, and the seconds that it took."""
    with network.make_socket(receiver) as listener:
        listener.bind(host(network, receiver))
        listener.listen()
        with network.make_socket(sender) as near:
            near.settimeout(GENEROUS_S)
            near.connect(host(network, receiver))
            far, (address, _) = listener.accept()
            far.settimeout(GENEROUS_S)
            begun_s = time.monotonic()
            pump = threading.Thread(target=near.sendall, args=(bytes(num_bytes),))
            pump.start()
            with far:
                num_left = num_bytes
                while num_left:
                    num_left -= len(far.recv(min(num_left, 1 << 16)))
            pump.join()
            return address, time.monotonic() - begun_s


@needs_namespaces
def test_each_site_has_an_address_and_reaches_those_it_has_a_link_with(network: SiteNetwork) -> None:
    assert len(set(network.addresses.values())) == 3
    assert send(network, "tokyo", "lima", 1000)[0] == host(network, "tokyo")[0]
    assert send(network, "lima", "tokyo", 1000)[0] == host(network, "lima")[0]
    with network.make_socket("berlin") as near, pytest.raises(OSError, match="unreachable"):
        near.connect(host(network, "lima"))
    with socket.socket() as outside, pytest.raises(OSError, match="assign"):
        outside.bind(host(network, "tokyo"))


@needs_namespaces
def test_the_kernel_limits_the_direction_that_has_a_bandwidth(network: SiteNetwork) -> None:
    num_bytes = 1_000_000

    def fastest_s(sender: str, receiver: str, limit_s: float) -> float:
        """Of several times, as other work on the machine delays some of them."""
        taken_s = []
        while len(taken_s) < 10 and min(taken_s, default=limit_s) >= limit_s:
            taken_s.append(send(network, sender, receiver, num_bytes)[1])
        return min(taken_s)

    slow_s = fastest_s("berlin", "tokyo", 1.6)
    assert 0.8 < slow_s < 1.6, "a second at 8 Mbit/s"
    assert fastest_s("tokyo", "berlin", slow_s / 2) < slow_s / 2
    network.close()
    assert network.carried["berlin", "tokyo"] > 2 * num_bytes
    assert network.carried["tokyo", "lima"] < 10_000


@needs_namespaces
def test_a_command_runs_in_the_namespace_of_its_site_as_the_process_that_was_started(
    network: SiteNetwork,
) -> None:
    program = "import os, socket; print(os.getpid(), [name for _, name in socket.if_nameindex()])"
    process = subprocess.Popen(
        [*network.command_prefix("berlin"), sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    told, _ = process.communicate(timeout=GENEROUS_S)
    assert told == f"{process.pid} ['lo', 'to-1']\n"


@needs_namespaces
def test_what_a_killed_simulation_left_behind_is_removed_and_nothing_else(network: SiteNetwork) -> None:
    program = (
        "import os, signal; from p2pcodistill.simulation.namespaces import SiteNetwork\n"
        "network = SiteNetwork(['a', 'b']); network.open({('a', 'b'): (1.0, 1.0)})\n"
        "print(*[network.command_prefix(site)[-1] for site in 'ab'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    foreign = [f"p2pcodistill-test-{os.getpid()}", f"p2pcodistill-1-{2**30}-1-0"]  # of another PID namespace
    for name in foreign:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        assert remove_leftovers() == sorted(done.stdout.split())
        assert remove_leftovers() == []
        assert all(Path("/run/netns", name).exists() for name in foreign)
        assert send(network, "tokyo", "lima", 1000), "those of a living process stay"
    finally:
        for name in foreign:
            subprocess.run(["ip", "netns", "delete", name], check=True)


def test_one_namespace_that_cannot_be_removed_leaves_no_other_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces, "_FOLDER", tmp_path)
    network = SiteNetwork(["stuck", "raced", "berlin"])
    stuck, raced, berlin = (network.command_prefix(site)[-1] for site in ("stuck", "raced", "berlin"))
    for name in (stuck, raced, berlin):
        (tmp_path / name).touch()

    def delete(*command: str) -> str:
        if command[-1] != stuck:
            (tmp_path / command[-1]).unlink()
        if command[-1] != berlin:
            raise NamespaceError(f"cannot remove {command[-1]}")
        return ""

    monkeypatch.setattr(namespaces, "_run", delete)
    with pytest.raises(NamespaceError, match=f"cannot remove {stuck}"):
        network.close()
    assert [path.name for path in tmp_path.iterdir()] == [stuck]
    (tmp_path / stuck).unlink()
    (tmp_path / raced).touch()
    network.close()  # another simulation has removed it in the same moment
    assert list(tmp_path.iterdir()) == []


@needs_namespaces
def test_what_could_be_made_is_removed_when_the_rest_could_not(untouched: None) -> None:
    network = SiteNetwork(["berlin", "tokyo"])
    try:
        with pytest.raises(NamespaceError, match=r"does not let --namespaces do 'tc .*batch"):
            network.open({("berlin", "tokyo"): (1e12, None)})
    finally:
        network.close()


@pytest.mark.parametrize(
    ("module", "name", "value", "told"),
    [
        (sys, "platform", "darwin", "needs Linux"),
        (os, "geteuid", lambda: 1000, r"needs root \(sudo\)"),
        (shutil, "which", lambda _command: None, "needs .*the command 'ip' .* and the command 'tc'"),
    ],
)
def test_where_it_cannot_be_done_one_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any, told: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(NamespaceError, match=told) as error:
        require_namespaces()
    assert "\n" not in str(error.value)


def test_virtual_time_has_no_namespaces(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(
        tomli_w.dumps({"name": "x", "mode": "virtual", "topology": "ring:4", "synthetic": {"num_steps": 50}})
    )
    with pytest.raises(ConfigError, match='--namespaces is for mode = "processes"'):
        simulate(file, run_root=tmp_path / "runs", stream=io.StringIO(), in_namespaces=True)


def write_row(folder: Path) -> Path:
    """Three sites in a row: one link that the kernel shapes, and one whose delay takes a relay."""
    table = {
        "name": "row",
        "topology": "line",
        "sites": [{"name": name} for name in ("berlin", "tokyo", "lima")],
        "arms": [{"name": "codistilled", "kind": "codistilled"}],
        "data": {"max_bytes_per_site": 20_000, "max_held_out_bytes": 2_048},
        "links": [
            {"between": ["berlin", "tokyo"], "bandwidth_mbit": 20.0},
            {"between": ["tokyo", "lima"], "bandwidth_mbit": 20.0, "latency_ms": 5.0},
        ],
        "task": {"embedding_size": 8, "hidden_size": 16, "num_layers": 1, "window_tokens": 16},
        "training": {
            "num_steps": 300,
            "batch_size": 4,
            "precision": "float32",
            "evaluation_interval_steps": 100,
        },
        "codistillation": {"burn_in_steps": 10, "exchange_interval_steps": 20},
    }
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(table))
    return file


@needs_namespaces
def test_a_site_that_fails_leaves_no_namespace(tmp_path: Path, untouched: None) -> None:
    program = "import os, sys; sys.exit(f'netns {os.readlink(\"/proc/self/ns/net\")}')"
    with pytest.raises(GroupError, match=r"exited with status 1.*\nnetns net:") as error:
        simulate(
            write_row(tmp_path),
            run_root=tmp_path / "runs",
            stream=io.StringIO(),
            node_command=(sys.executable, "-c", program),
            in_namespaces=True,
        )
    assert str(Path("/proc/self/ns/net").readlink()) not in str(error.value), "it ran elsewhere"


@needs_namespaces
def test_a_scenario_runs_in_namespaces_and_leaves_none(tmp_path: Path, untouched: None) -> None:
    file = write_row(tmp_path)
    assert simulate(file, run_root=tmp_path / "runs", stream=io.StringIO(), in_namespaces=True) == 0
    arm = tmp_path / "runs" / "latest" / "codistilled-seed0"
    listening, taught = {}, set()
    for site in ("berlin", "tokyo", "lima"):
        for line in (arm / site / "events.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["event"] == "node-started":
                listening[site] = record["listen"]
            if record["event"] == "teacher-swapped":
                taught.add(frozenset((record["teacher"], site)))
    assert listening == {name: f"tcp://10.77.0.{n}:{PORT}" for n, name in enumerate(listening, start=1)}
    assert taught == {frozenset(("berlin", "tokyo")), frozenset(("tokyo", "lima"))}
    told = [json.loads(line) for line in (arm / "simulator.jsonl").read_text().splitlines()]
    carried = {tuple(record["sites"]): record["num_bytes"] for record in told}
    assert set(carried) == {("berlin", "tokyo"), ("tokyo", "lima")} and min(carried.values()) > 10_000
    assert namespaces.remove_leftovers() == []
