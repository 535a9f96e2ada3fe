"""A site's file read again while the node runs: what takes effect at once, and what waits for a restart.

At once: `revoked`, and the addresses of peers. All else is either what the run depends on or built into what is running.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pcodistill.config import NodeConfig
from p2pcodistill.transport.base import check_address


@dataclass(frozen=True, slots=True)
class Reload:
    """What the file read again means: `config` is in force from now on, `needs_restart` are the keys that are ignored."""

    config: NodeConfig
    revoked: tuple[str, ...]
    restored: tuple[str, ...]
    addresses: dict[str, str | None]
    """The peers that listen elsewhere now, or (None) dial us."""
    needs_restart: tuple[str, ...]


def compare(old: NodeConfig, new: NodeConfig) -> Reload:
    """What changes from `old`, which is in force, to `new`. Raises ConfigError or AddressError when `new` cannot be."""
    _ = new.ordered_members
    listed = {peer.name: peer for peer in new.peers}
    peers = tuple(
        peer.model_copy(update={"address": listed[peer.name].address}) if peer.name in listed else peer
        for peer in old.peers
    )
    addresses = {
        peer.name: peer.address
        for before, peer in zip(old.peers, peers, strict=True)
        if peer.address != before.address
    }
    for address in addresses.values():
        if address is not None:
            check_address(address, listen=False)
    members = {peer.name for peer in peers}
    revoked = tuple(name for name in dict.fromkeys(new.revoked) if name in members)
    config = old.model_copy(update={"peers": peers, "revoked": revoked})
    others = [key for key in NodeConfig.model_fields if key not in ("peers", "revoked")]
    ignored = [key for key in others if getattr(new, key) != getattr(old, key)]
    if {peer.name: peer for peer in peers} != listed:
        ignored.append("peers")
    return Reload(
        config,
        tuple(name for name in revoked if name not in old.revoked),
        tuple(name for name in dict.fromkeys(old.revoked) if name not in revoked),
        addresses,
        tuple(ignored),
    )
