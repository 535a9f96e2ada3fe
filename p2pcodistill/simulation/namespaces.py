"""Sites in network namespaces of their own: an address for each, and links that the kernel makes and shapes (Linux, root).

Two neighbours are joined by a pair of virtual Ethernet devices, one in the namespace of each, with a token bucket (`tc tbf`)
for each direction whose bandwidth is limited. Nothing of the machine's own network is touched, and all that is made lies in
namespaces whose names begin with `p2pcodistill-` and the process that made them, by its PID namespace and number: removing
those removes everything. A simulation that was killed leaves them behind; the next one finds and removes them.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from p2pcodistill.errors import NamespaceError

PORT = 5600
"""That every site listens on, at its own address."""
MAX_SITES = 60_000
_PREFIX = "p2pcodistill"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-(\d+)-\d+")
_FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_BURST_S = 0.01
_MIN_BURST_BYTES = 3200
_MAX_QUEUE_MS = 50

Rates: TypeAlias = tuple[float | None, float | None]
"""Megabits a second from the first of two sites to the second, and back; None: unlimited."""

Made = TypeVar("Made")
_counter = itertools.count()


def require_namespaces() -> None:
    """Raise NamespaceError where this process cannot make network namespaces, as far as can be told without trying."""
    missing = []
    if sys.platform != "linux":
        missing.append("Linux")
    elif os.geteuid() != 0:
        missing.append("root (sudo)")
    missing += [
        f"the command {command!r} (iproute2)" for command in ("ip", "tc") if not shutil.which(command)
    ]
    if missing:
        raise NamespaceError(
            f"--namespaces needs {' and '.join(missing)}: without --namespaces, sites share this machine's loopback"
        )


class SiteNetwork:
    """The namespaces of sites that run at the same time, each with an address; for one use."""

    def __init__(self, sites: Sequence[str]) -> None:
        assert len(sites) <= MAX_SITES
        owner = f"{_PREFIX}-{_pid_namespace()}-{os.getpid()}-{_start_ticks(os.getpid())}"
        self._index = {site: index for index, site in enumerate(sites)}
        self._namespaces = {site: f"{owner}-{next(_counter)}" for site in sites}
        self._pairs: tuple[tuple[str, str], ...] = ()
        self.carried: dict[tuple[str, str], int] = {}
        """Bytes that each pair of sites has sent each other over its devices, headers included; known after `close`."""

    @property
    def addresses(self) -> dict[str, str]:
        """Where each site listens."""
        return {site: f"tcp://{self._host(site)}:{PORT}" for site in self._index}

    def command_prefix(self, site: str) -> tuple[str, ...]:
        """What runs a command, appended to it, in the namespace of `site`; the process stays the same."""
        return ("ip", "netns", "exec", self._namespaces[site])

    def make_socket(self, site: str) -> socket.socket:
        """A TCP socket of this process that is in the namespace of `site`."""
        return _in_namespace(self._namespaces[site], socket.socket)

    def open(self, rates: Mapping[tuple[str, str], Rates]) -> None:
        """Make the namespaces, and a pair of devices for each pair of sites in `rates`. Raises NamespaceError."""
        self._pairs = tuple(rates)
        for namespace in self._namespaces.values():
            _run("ip", "netns", "add", namespace)
        devices: dict[str, list[str]] = {site: [] for site in self._index}
        shapes: dict[str, list[str]] = {site: [] for site in self._index}
        for (a, b), (there_mbit, back_mbit) in rates.items():
            # Both ends are made where they belong: nothing ever appears outside.
            _run(
                *("ip", "link", "add", self._device(b), "netns", self._namespaces[a]),
                *("type", "veth", "peer", "name", self._device(a), "netns", self._namespaces[b]),
            )
            for site, peer, rate_mbit in ((a, b, there_mbit), (b, a, back_mbit)):
                device = self._device(peer)
                devices[site] += [
                    f"link set {device} up",
                    f"route add {self._host(peer)}/32 dev {device} src {self._host(site)}",
                ]
                if rate_mbit is not None:
                    burst_bytes = max(_MIN_BURST_BYTES, round(rate_mbit * 1e6 / 8 * _BURST_S))
                    shapes[site].append(
                        f"qdisc add dev {device} root tbf rate {rate_mbit:f}mbit burst {burst_bytes} "
                        f"latency {_MAX_QUEUE_MS}ms"
                    )
        for site, namespace in self._namespaces.items():
            lines = [f"addr add {self._host(site)}/32 dev lo", "link set lo up", *devices[site]]
            _run("ip", "-n", namespace, "-batch", "-", lines=lines)
            if shapes[site]:
                _run("tc", "-n", namespace, "-batch", "-", lines=shapes[site])

    def close(self) -> None:
        """Remove all of it. Processes that are still there keep their namespace, nameless, until they end."""
        for a, b in self._pairs:
            sent = [self._num_bytes_sent(site, peer) for site, peer in ((a, b), (b, a))]
            self.carried[a, b] = sum(sent)
        self._pairs = ()
        _remove_all(self._namespaces.values())

    def _host(self, site: str) -> str:
        number = self._index[site] + 1
        return f"10.77.{number >> 8}.{number & 255}"

    def _device(self, peer: str) -> str:
        return f"to-{self._index[peer]}"

    def _num_bytes_sent(self, site: str, peer: str) -> int:
        command = ("ip", "-n", self._namespaces[site], "-s", "-j", "link", "show", "dev", self._device(peer))
        try:
            (device,) = json.loads(_run(*command))
        except NamespaceError:  # it could not all be made
            return 0
        return int(device["stats64"]["tx"]["bytes"])


def remove_leftovers() -> list[str]:
    """Remove the namespaces of simulations that are no more; returns their names. Others stay: those of other programs, and
    of other PID namespaces (containers), of whose processes nothing can be told here. Raises NamespaceError."""
    here, left = _pid_namespace(), []
    for path in sorted(_FOLDER.glob(f"{_PREFIX}-*")):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) != here:
            continue
        if _start_ticks(int(match[2])) != int(match[3]):
            left.append(path.name)
    _remove_all(left)
    return left


def _pid_namespace() -> int:
    """The number of the PID namespace that this process is in; 0 where the system has none."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _start_ticks(pid: int) -> int | None:
    """When a process began, in the kernel's ticks, to tell it from another that got its number later; None: it is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else int(after_name[19])


def _remove_all(namespaces: Iterable[str]) -> None:
    """Remove those that are there. Raises the first NamespaceError when all were tried."""
    failures: list[NamespaceError] = []
    for namespace in namespaces:
        try:
            if (_FOLDER / namespace).exists():
                _run("ip", "netns", "delete", namespace)
        except NamespaceError as error:
            if (_FOLDER / namespace).exists():  # else somebody else has removed it in the same moment
                failures.append(error)
    if failures:
        raise failures[0]


def _run(*command: str, lines: Sequence[str] = ()) -> str:
    """Run one of iproute2's commands; what it printed. Raises NamespaceError with what it complained of."""
    try:
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    except OSError as error:
        raise NamespaceError(f"cannot run {command[0]!r}: {error.strerror}") from None
    if done.returncode != 0:
        why = done.stderr.strip().partition("\n")[0] or f"status {done.returncode}"
        raise NamespaceError(f"this machine does not let --namespaces do {' '.join(command)!r}: {why}")
    return done.stdout


def _in_namespace(namespace: str, make: Callable[[], Made]) -> Made:
    """What `make` returns when it is called in the network of `namespace`, on a thread that lives for that only."""
    made: list[Made] = []
    failed: list[OSError] = []

    def run() -> None:
        try:
            entry = os.open(_FOLDER / namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(entry, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
            finally:
                os.close(entry)
            made.append(make())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="in-namespace")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
