"""A hostile node in a process of its own: `python -m p2pcodistill.simulation.hostile_node DEED --die-with-parent PID FILE`.

It takes the place of the node of FILE, which has ended: the same key, address and store. DEED is what `does` says in a
scenario, or `ruin`: then it publishes checkpoints of the right form with random weights.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast, get_args

from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.config import NodeConfig
from p2pcodistill.errors import ConfigError, UserError
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import PROTOCOL_VERSION, Hello
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.identity import Identity
from p2pcodistill.simulation.fault_config import Misdeed
from p2pcodistill.simulation.hostile import TICK_S, Deed, HostileSite, Spoken
from p2pcodistill.strict import load_toml, parse_model
from p2pcodistill.topology.build import build_topology
from p2pcodistill.transport.base import Closed, Opened, Received
from p2pcodistill.transport.zeromq import PeerEndpoint, ZeroMQTransport

PUBLISH_INTERVAL_S = 2.0
_MAX_DECODED_BYTES = 1 << 34
_BURST_MESSAGES = 50
_PAUSE_S = 0.005


def main(arguments: Sequence[str]) -> int:
    """Speak until killed. Exit status 2, with one line on standard error, where it cannot."""
    does, _, parent, file = arguments
    die_with_parent(int(parent))
    assert does in (*get_args(Misdeed), "ruin")
    try:
        asyncio.run(HostileNode(cast("Deed", does), Path(file)).run())
    except UserError as error:
        print(f"p2pcodistill: {error}", file=sys.stderr)
        return 2
    return 0


class HostileNode:
    """Joins a `HostileSite` to ZeroMQ."""

    def __init__(self, does: Deed, node_file: Path) -> None:
        config = parse_model(NodeConfig, load_toml(node_file), source=str(node_file))
        base_folder, name, members = node_file.parent, config.name, config.ordered_members
        identity = Identity.load(base_folder / (config.identity or f"{name}.key"))
        topology = build_topology(config.topology, members, base_folder=base_folder)
        known = {peer.name: peer.identity for peer in config.peers} | {name: identity.public}
        keys = {member: known[member] for member in members}
        neighbours = topology.neighbours_of(name)
        self._name, self._does = name, does
        self._interval_steps = config.codistillation.exchange_interval_steps
        folder = base_folder / (config.run_folder or f"runs/{config.run}-{name}")
        self._store = FrameStore(folder / "store", site=name, keys=keys)
        own = self._store.frames(name)
        if does == "ruin" and not own:
            raise ConfigError(f"{name} has published nothing yet that could be ruined: choose a later moment")
        self._hostile = HostileSite(
            name,
            identity,
            does,
            hello=Hello(
                PROTOCOL_VERSION,
                config.run,
                members_digest(keys),
                topology.digest,
                self._store.incarnation,
                0,
            ),
            newest=own[-1].signed if own else None,
            others=[member for member in members if member != name],
        )
        endpoints = {
            peer.name: PeerEndpoint(peer.identity, peer.address if peer.name in neighbours else None)
            for peer in config.peers
        }
        self._transport = ZeroMQTransport(identity, config.listen, endpoints)

    async def run(self) -> None:
        """Until cancelled."""
        await self._transport.open()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._speak())
                if self._does == "ruin":
                    tasks.create_task(self._publish())
        finally:
            await self._transport.close()
            self._store.close()

    async def _listen(self) -> None:
        while True:
            match await self._transport.receive():
                case Opened(peer):
                    await self._send(self._hostile.opened(peer))
                case Closed(peer, _):
                    self._hostile.closed(peer)
                case Received(peer, _, payload):
                    await self._send(self._hostile.received(peer, payload))

    async def _speak(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self._send(self._hostile.tick())

    async def _publish(self) -> None:
        while True:
            step = self._hostile.last_step + self._interval_steps
            data, codec, schema_hash = await asyncio.to_thread(ruin, self._store, self._name, step)
            await self._send(self._hostile.publish(data, step, codec, schema_hash))
            await asyncio.sleep(PUBLISH_INTERVAL_S)

    async def _send(self, spoken: Iterable[Spoken]) -> None:
        for number, (peer, lane, payload) in enumerate(spoken, start=1):
            self._transport.send(peer, lane, payload)  # what is not taken is not said
            if number % _BURST_MESSAGES == 0:  # more at once, and this end would break the connection
                await asyncio.sleep(_PAUSE_S)


def ruin(store: FrameStore, site: str, step: int) -> tuple[bytes, str, bytes]:
    """A keyframe (bytes, codec, schema hash) of `step` with the tensors of the site's newest checkpoint, its weights random.

    What has fewer than two dimensions stays: such tensors may have to be positive.
    """
    import torch  # the other deeds do without

    from p2pcodistill.checkpoint.decoder import decode_frame
    from p2pcodistill.checkpoint.encoder import encode_reference_keyframe
    from p2pcodistill.checkpoint.reference import Reference, checksum_tensors

    held: Reference | None = None
    for stored in store.chain(site):
        held = decode_frame(stored.path.read_bytes(), held, max_bytes=_MAX_DECODED_BYTES)
    assert held is not None, "a site that has published has a chain"
    tensors = {
        name: torch.randn(tensor.shape).to(tensor.dtype)
        if tensor.is_floating_point() and tensor.ndim > 1
        else tensor
        for name, tensor in held.tensors.items()
    }
    ruined = Reference(step, tensors, held.dtypes, held.aliases, checksum_tensors(tensors.values()))
    sink = io.BytesIO()
    frame = encode_reference_keyframe(ruined, sink)
    return sink.getvalue(), frame.codec, frame.schema_hash


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
