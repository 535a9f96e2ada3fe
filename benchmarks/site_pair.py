"""Real nodes on loopback, two by default, with a worker of the benchmark's own, for what is measured between sites."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from p2pcodistill.identity import Identity

SITES = ("berlin", "tokyo")
_STOP_S = 30.0
_ROOT = str(Path(__file__).parent.parent)


def write_node_files(
    folder: Path, worker_module: str, settings: Mapping[str, Any], *, sites: Sequence[str] = SITES
) -> None:
    """A node file for each site, with `worker()` of that module as its training script and the results' file as argument."""
    identities = {site: Identity.generate() for site in sites}
    sockets = {site: socket.create_server(("127.0.0.1", 0)) for site in sites}
    ports = {site: sock.getsockname()[1] for site, sock in sockets.items()}
    for sock in sockets.values():
        sock.close()
    script = folder / "worker.py"
    script.write_text(f"from {worker_module} import worker\nworker()\n")
    for index, site in enumerate(sites):
        identities[site].save(folder / f"{site}.key")
        peers = [
            {
                "name": other,
                "address": f"tcp://127.0.0.1:{ports[other]}",
                "public_identity": str(identities[other].public),
            }
            for other in sites
            if other != site
        ]
        group = {
            "script": str(script),
            "script_arguments": [str(folder / f"{site}.json")],
            "max_restarts": 0,
        }
        table = {
            "name": site,
            "listen": f"tcp://127.0.0.1:{ports[site]}",
            "peers": peers,
            "run_folder": site,
            "group": group,
            "training": {"seed": index},
            "linger_s": 120.0,
        }
        (folder / f"{site}.toml").write_text(tomli_w.dumps(table | dict(settings)))


@contextmanager
def running_nodes(folder: Path, sites: Sequence[str] = SITES) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The nodes of these sites, by name; those that still run in the end are stopped, and killed if that takes long."""
    nodes = {site: start_node(folder, site) for site in sites}
    try:
        yield nodes
    finally:
        for node in nodes.values():
            node.terminate()
        for node in nodes.values():
            try:
                node.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def run_nodes(folder: Path, *, timeout_s: float) -> None:
    """Run both nodes to their end. Raises RuntimeError with a log when one fails, TimeoutExpired when one does not end."""
    nodes = [start_node(folder, site) for site in SITES]
    try:
        statuses = [node.wait(timeout=timeout_s) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    for site, status in zip(SITES, statuses, strict=True):
        if status:
            raise RuntimeError(f"the node {site} failed: {status}\n" + (folder / f"{site}.log").read_text())


def start_node(folder: Path, site: str) -> subprocess.Popen[bytes]:
    """The node process of one site."""
    command = [sys.executable, "-m", "p2pcodistill", "node", str(folder / f"{site}.toml")]
    with (folder / f"{site}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": _ROOT})
