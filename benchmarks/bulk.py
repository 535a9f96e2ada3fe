"""What the benchmarks of bulk transfers share: nodes with a worker that publishes random bytes on command, and waiting.

The nodes do not know what they move, so no tensors are needed: the worker of the first site hands over a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.site_pair import SITES, running_nodes, write_node_files
from p2pcodistill.simulation.shaping import LinkShape, ShapedLink

TIMEOUT_S = 300.0
_POLL_S = 0.005
_SETTINGS = {"max_frame_bytes": 1 << 30}


def prepare_nodes(folder: Path, num_bytes: int, settings: Mapping[str, Any] | None = None) -> None:
    """The files of two nodes, and a payload of so many bytes for the first to publish."""
    write_random_bytes(folder / "payload", num_bytes)
    write_node_files(folder, "benchmarks.bulk", _SETTINGS | dict(settings or {}))


@asynccontextmanager
async def linked_nodes(
    folder: Path, num_bytes: int, shape: LinkShape, settings: Mapping[str, Any] | None = None
) -> AsyncIterator[tuple[ShapedLink, dict[str, subprocess.Popen[bytes]]]]:
    """Two running nodes, by name, of which the second, a student, dials the first through a link of this shape."""
    teacher, student = SITES
    prepare_nodes(folder, num_bytes, settings)
    link = ShapedLink(listen_address(folder / f"{teacher}.toml"), shape)
    set_peer_address(folder / f"{student}.toml", teacher, await link.open())
    set_peer_address(folder / f"{teacher}.toml", student, None)
    try:
        with running_nodes(folder) as nodes:
            yield link, nodes
    finally:
        await link.close()


def write_random_bytes(path: Path, num_bytes: int) -> None:
    """A file of bytes that nothing can compress."""
    with path.open("wb") as file:
        for _ in range(num_bytes >> 20):
            file.write(os.urandom(1 << 20))
        file.write(os.urandom(num_bytes % (1 << 20)))


def publish(folder: Path, number: int) -> None:
    """Let the first site publish the file `payload` once more, as step `number` (1, 2, …)."""
    (folder / f"go-{number}").touch()


def worker() -> None:
    """The training script: rank 0 of the first site publishes on command; all wait until they are told to stop."""
    import threading

    from p2pcodistill.config import GroupSpec
    from p2pcodistill.group.lifeline import die_with_parent
    from p2pcodistill.group.link import RankLink
    from p2pcodistill.group.link_messages import FrameReady, StopRequested

    die_with_parent()
    spec = GroupSpec.model_validate_json(Path(os.environ["P2PCODISTILL_GROUP"]).read_text())
    folder, stop = Path(sys.argv[1]).parent, threading.Event()

    def on_message(message: object) -> None:
        if isinstance(message, StopRequested):
            stop.set()

    link = RankLink(spec.link_address, spec.link_token, on_message)
    link.connect(TIMEOUT_S)
    (folder / f"{spec.site}-joined").touch()
    payload, schema, number = folder / "payload", hashlib.sha256(b"schema").digest(), 1
    if spec.site != SITES[0]:
        stop.wait()
    while not stop.wait(_POLL_S):
        if not (folder / f"go-{number}").exists():
            continue
        path = spec.outbox_folder / f"{number}.frame"
        os.link(payload, path)
        num_bytes = payload.stat().st_size
        link.send(FrameReady(str(path), number, None, "raw", schema, num_bytes))
        number += 1
    link.close(5)


def set_peer_address(node_file: Path, peer: str, address: str | None) -> None:
    """Let a site dial another address of `peer`, or none."""
    table = tomllib.loads(node_file.read_text())
    for listed in table["peers"]:
        if listed["name"] == peer:
            listed.pop("address", None)
            listed |= {"address": address} if address else {}
    node_file.write_text(tomli_w.dumps(table))


def listen_address(node_file: Path) -> str:
    """Where a site listens."""
    return str(tomllib.loads(node_file.read_text())["listen"])


def events_of(run_folder: Path, name: str) -> list[dict[str, Any]]:
    """The events of that name that a node has written so far."""
    path = run_folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        if f'"event":"{name}"' in line:
            try:
                records.append(json.loads(line))
            except ValueError:  # it is being written
                break
    return records


def wait_for(
    condition: Callable[[], Any], what: str, *, timeout_s: float = TIMEOUT_S, poll_s: float = _POLL_S
) -> Any:
    """The first truthy value of `condition`, which is looked at every `poll_s`. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(poll_s)
    return value
