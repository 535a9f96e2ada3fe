"""What the sites of a run in virtual time have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from p2pcodistill.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    sign_manifest,
    verify_manifest,
)
from p2pcodistill.gossip.announce import Verify
from p2pcodistill.gossip.protocol import (
    DEFAULT_PING_INTERVAL_S,
    DEFAULT_STALL_TIMEOUT_S,
    DEFAULT_WINDOW_BYTES,
)
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.telemetry.event import Event as TelemetryEvent
from p2pcodistill.transport.shaper import UploadCaps

TICK_S = 1.0
TRAFFIC_INTERVAL_S = 5.0

OnEvent = Callable[[float, str, TelemetryEvent], None]
"""(virtual seconds, site, event)."""


@dataclass(frozen=True)
class Surroundings:
    """What is the same for all sites of a run.

    `students_of` names the students of each member. `bytes_scale`: each byte of a frame stands for so many, on the links and
    in events. `chunk_bytes`, `window_bytes` and the sizes in manifests are real ones, before scaling. `sign` makes
    manifests, `verify` is what `Gossip` checks them with. `caps` has the sites whose uploads are capped.
    """

    run: str
    clock: VirtualClock
    members: Mapping[str, PublicIdentity]
    members_digest: bytes
    topology_digest: bytes
    students_of: Mapping[str, Collection[str]]
    on_event: OnEvent
    bytes_scale: int = 1
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    window_bytes: int = DEFAULT_WINDOW_BYTES
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S
    ping_interval_s: float = DEFAULT_PING_INTERVAL_S
    sign: Callable[[Manifest, Identity], SignedManifest] = sign_manifest
    verify: Verify = verify_manifest
    tick_s: float = TICK_S
    traffic_interval_s: float | None = TRAFFIC_INTERVAL_S
    caps: Mapping[str, UploadCaps] = field(default_factory=dict)
