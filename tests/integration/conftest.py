"""Real node processes for integration tests: make sites, start them, follow their events, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import string
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from patience import GENEROUS_S

from p2pcodistill.group.lifeline import adopt_orphans
from p2pcodistill.identity import Identity
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.records import Record

TINY = {
    "task": {
        "embedding_size": 8,
        "hidden_size": 16,
        "num_layers": 1,
        "window_tokens": 16,
        "max_held_out_bytes": 4096,
    },
    "training": {
        "num_steps": 60,
        "batch_size": 4,
        "evaluation_interval_steps": 20,
        "checkpoint_interval_steps": 10,
        "report_interval_steps": 5,
        "precision": "float32",
    },
    "codistillation": {"burn_in_steps": 5, "exchange_interval_steps": 5, "agreement_interval_steps": 2},
    "group": {"restart_delay_s": 0.1},
}


# Below what the kernel picks from. Tests that run at the same time have a share each, and begin anywhere in it: a port of
# a moment ago may still have connections that are being closed.
_NUM_PORTS = 2000
_FIRST_PORT = 12_000 + _NUM_PORTS * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_OFFSET = random.randrange(_NUM_PORTS)
_PORTS = itertools.cycle(_FIRST_PORT + (_OFFSET + index) % _NUM_PORTS for index in range(_NUM_PORTS))


def merged(*tables: dict[str, Any]) -> dict[str, Any]:
    """Nested tables merged, later ones winning."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both_tables else value
    return result


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now, and that the kernel gives to nobody who dials before a node is there."""
    found: list[int] = []
    while len(found) < count:
        port = next(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


class Site:
    """One site: its file, its node process (when started) and its events."""

    def __init__(self, folder: Path, name: str, port: int, identity: Identity) -> None:
        self.folder, self.name, self.port, self.identity = folder, name, port, identity
        self.file = folder / f"{name}.toml"
        self.run_folder = folder / "runs" / f"test-{name}"
        self.process: asyncio.subprocess.Process | None = None
        self.records: list[Record] = []
        self._tail = EventTail(self.run_folder / "events.jsonl")

    def write(self, table: dict[str, Any]) -> None:
        self.file.write_text(tomli_w.dumps(table))

    def set(self, **tables: Any) -> None:
        """Change keys of the site's file."""
        self.write(merged(tomllib.loads(self.file.read_text()), tables))

    def set_peer(self, name: str, *, address: str | None) -> None:
        """Change where the site's file says that a peer listens; None: nowhere, it dials us."""
        table = tomllib.loads(self.file.read_text())
        for peer in table["peers"]:
            if peer["name"] == name:
                peer.pop("address", None)
                peer |= {"address": address} if address else {}
        self.write(table)

    def model_bytes(self) -> bytes:
        return (self.run_folder / "model.safetensors").read_bytes()

    async def start(self, *arguments: str, command: tuple[str, ...] = ()) -> asyncio.subprocess.Process:
        command = command or (sys.executable, "-m", "p2pcodistill", "node", str(self.file))
        log = (self.folder / f"{self.name}.log").open("ab")
        with log:
            self.process = await asyncio.create_subprocess_exec(*command, *arguments, stdout=log, stderr=log)
        return self.process

    async def pause(self) -> list[psutil.Process]:
        """Wait until training has begun, and stop the ranks there (SIGSTOP); these, to be resumed."""
        await self.until("training-started")
        ranks = [process for process in self.tree() if not process.children()]
        for rank in ranks:
            rank.suspend()
        return ranks

    async def wait(self) -> int:
        """Wait for the node to end, while it still tells of something new; its exit status."""
        assert self.process is not None
        while True:
            num_records = len(self.read())
            try:
                async with asyncio.timeout(GENEROUS_S):
                    return await self.process.wait()
            except TimeoutError:
                if len(self.read()) == num_records:
                    raise AssertionError(f"{self.name} did not end:\n{self.log()}") from None

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def tree(self) -> list[psutil.Process]:
        """The node and all its descendants."""
        assert self.process is not None
        node = psutil.Process(self.process.pid)
        return [node, *node.children(recursive=True)]

    def read(self) -> list[Record]:
        """All events so far."""
        self.records += self._tail.read()
        return self.records

    def all(self, event: str, **fields: Any) -> list[Record]:
        """The events of that name so far whose fields have these values."""
        return [
            record
            for record in self.read()
            if record["event"] == event and all(record.get(key) == value for key, value in fields.items())
        ]

    async def until(
        self, event: str, condition: Callable[[Record], bool] = lambda _: True, *, count: int = 1
    ) -> Record:
        """The `count`-th event of that name that meets the condition, as soon as it is there."""
        num_read = num_found = 0
        try:
            async with asyncio.timeout(GENEROUS_S):
                while True:
                    for record in itertools.islice(self.read(), num_read, None):
                        num_read += 1
                        num_found += record["event"] == event and condition(record)
                        if num_found == count:
                            return record
                    if self.process is None or self.process.returncode is not None:
                        raise AssertionError(f"{self.name} ended before {event!r}:\n{self.log()}")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{self.name} did not say {event!r}:\n{self.log()}") from None

    def log(self) -> str:
        """What there is to say about a failure."""
        texts = [
            self.folder / f"{self.name}.log",
            self.run_folder / "group.log",
            self.run_folder / "events.jsonl",
        ]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in texts if path.exists())


class Sites:
    """Makes sites that know each other, and ends whatever they left running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Site] = []

    def make(self, *names: str, **tables: Any) -> list[Site]:
        """Sites on loopback that list each other, with the tiny model; `tables` override it."""
        ports = free_ports(len(names))
        made = []
        for index, (name, port) in enumerate(zip(names, ports, strict=True)):
            identity = Identity.from_secrets(bytes([index + 1]) * 32, bytes([index + 101]) * 32)
            identity.save(self.folder / f"{name}.key")
            made.append(Site(self.folder, name, port, identity))
            write_text(self.folder / f"{name}.txt", seed=index)
        for site in made:
            peers = [
                {
                    "name": s.name,
                    "address": f"tcp://127.0.0.1:{s.port}",
                    "public_identity": str(s.identity.public),
                }
                for s in made
                if s is not site
            ]
            own = {
                "name": site.name,
                "run": "test",
                "listen": f"tcp://127.0.0.1:{site.port}",
                "peers": peers,
                "task": {"data": [str(self.folder / f"{site.name}.txt")]},
            }
            site.write(merged(TINY, own, tables))
        self.all += made
        return made

    @staticmethod
    async def start_together(*made: Site) -> None:
        """Start sites whose training ends soon: none of them is at the end before all others have begun."""
        for site in made:
            await site.start()
        for ranks in await asyncio.gather(*(site.pause() for site in made)):
            for rank in ranks:
                rank.resume()

    def elsewhere(self, name: str) -> Sites:
        """A folder of its own, where sites of the same names can be made; cleaned with this one."""
        folder = self.folder / name
        folder.mkdir()
        other = Sites(folder)
        other.all = self.all
        return other

    async def clean(self) -> list[psutil.Process]:
        """Kill the nodes that still run, and only them; the processes that did not go with their node."""
        for site in self.all:
            if site.process is not None and site.process.returncode is None:
                site.kill()
                await site.wait()
        ours = [p for p in psutil.Process().children(recursive=True) if is_ours(p)]
        _, outlived = psutil.wait_procs(ours, timeout=GENEROUS_S)
        for process in outlived:
            process.kill()
        psutil.wait_procs(outlived)
        return outlived


def is_ours(process: psutil.Process) -> bool:
    """Whether a living process belongs to a node."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "p2pcodistill" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def write_text(path: Path, *, seed: int, num_bytes: int = 40_000) -> None:
    """Text that a tiny model can learn something from: words of a seeded vocabulary."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(200)]
    text = ""
    while len(text) < num_bytes:
        text += " ".join(rng.choices(words, k=10)) + ".\n"
    path.write_text(text)


@pytest.fixture(scope="session", autouse=True)
def orphans_in_sight() -> None:
    """Orphans become this process's children, so that nothing escapes `Sites.clean`."""
    adopt_orphans()


@pytest.fixture
async def sites(tmp_path: Path) -> AsyncIterator[Sites]:
    made = Sites(tmp_path)
    yield made
    leftover = await made.clean()
    assert leftover == [], f"processes outlived their node: {leftover}"
