"""From rank 0's encoded frames to announced ones: hash, sign, store, tell gossip, one after the other and each answered.

A delta frame is only worth something on top of its base, so nothing is dropped or overtaken here; rank 0 waits for the
answer before it encodes the next one, which bounds what lies in the outbox. A frame is signed under the incarnation that
holds when it is announced, and dropped when the launch that made it is over.

What the ranks made of a teacher's chain, one keyframe in its place, goes the same way, but only into the store.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from p2pcodistill.checkpoint.chain import worth_keeping
from p2pcodistill.checkpoint.durable import sync
from p2pcodistill.checkpoint.manifest import (
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.errors import MalformedError, OversizedError, RefusedError
from p2pcodistill.group.link_messages import FrameReady, FrameTaken, ReferenceReady
from p2pcodistill.identity import Identity
from p2pcodistill.runfolder import is_full_disk
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import FramePublished, Refused


@dataclass(frozen=True, slots=True)
class _Chunks:
    """How a frame is cut: into chunks of so many bytes, with these hashes."""

    num_bytes: int
    digests: tuple[bytes, ...]


class Publisher:
    """This site's own frames. `announce` is called with `gossip_lock` held, right after a frame was stored.

    `answer` tells rank 0 what became of each `FrameReady`. `chunk_bytes` maps the size of a frame to that of its
    chunks.
    """

    def __init__(
        self,
        site: str,
        run: str,
        *,
        identity: Identity,
        store: FrameStore,
        outbox: Path,
        events: EventLog,
        gossip_lock: asyncio.Lock,
        announce: Callable[[SignedManifest], Awaitable[None]],
        answer: Callable[[FrameTaken], Awaitable[None]],
        chunk_bytes: Callable[[int], int],
    ) -> None:
        self._site, self._run = site, run
        self._identity, self._store, self._outbox, self._events = identity, store, outbox, events
        self._gossip_lock, self._announce, self._answer = gossip_lock, announce, answer
        self._chunk_bytes = chunk_bytes
        self._waiting: deque[FrameReady | ReferenceReady] = deque()
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._launch = 0
        self._last: Version | None = None
        """What this launch's newest frame was published as: the only version that a delta frame can build on."""

    def begin_launch(self) -> None:
        """The ranks of another launch will publish from now on: what the last one left is dropped."""
        self._launch += 1
        self._last = None
        self._waiting.clear()
        for leftover in self._outbox.iterdir():
            leftover.unlink()

    def submit(self, ready: FrameReady | ReferenceReady) -> None:
        """Take a frame that rank 0 has put into the outbox."""
        self._waiting.append(ready)
        self._idle.clear()
        self._work.set()

    @property
    def has_chain(self) -> bool:
        """Whether the ranks of this launch have published anything that they could make a keyframe of."""
        return self._last is not None

    async def drained(self) -> None:
        """Wait until every frame that was submitted is published or refused."""
        await self._idle.wait()

    async def run(self) -> None:
        """Publish what is submitted, for ever. Raises what broke in this site's own store (a full disk)."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                await self._take(self._waiting.popleft())
            self._idle.set()

    async def _take(self, ready: FrameReady | ReferenceReady) -> None:
        launch = self._launch
        path = self._outbox / Path(ready.path).name
        try:
            if not path.exists():
                raise MalformedError(f"the ranks announced {path.name}, which is not in the outbox")
            if isinstance(ready, ReferenceReady):
                await self._keep(ready, path)
            else:
                await self._publish(ready, path, launch)
            accepted = True
        except FileNotFoundError:
            if launch == self._launch:
                raise
            return  # dropped with the launch that made it
        except RefusedError as error:
            accepted = False
            path.unlink(missing_ok=True)
            self._events.write(Refused(peer=None, reason=error.reason, why=str(error)))
        if isinstance(ready, FrameReady) and launch == self._launch:
            await self._answer(FrameTaken(ready.step, ready.base_step, accepted))

    async def _publish(self, ready: FrameReady, path: Path, launch: int) -> None:
        chunks = await self._split(path)
        async with self._gossip_lock:  # the incarnation stays what it is until the frame is announced
            if launch != self._launch:
                return
            if ready.base_step is not None and (self._last is None or self._last.step != ready.base_step):
                raise MalformedError(
                    f"a delta frame builds on step {ready.base_step}, which is not the last one published"
                )
            version = Version(self._store.incarnation, ready.step)
            base = None if ready.base_step is None else self._last
            signed = self._sign(ready, path, chunks, origin=self._site, version=version, base=base)
            await asyncio.to_thread(self._store.adopt, signed, path)
            self._last = version
            self._events.write(
                FramePublished(
                    incarnation=version.incarnation,
                    step=version.step,
                    kind=signed.manifest.kind,
                    num_bytes=signed.manifest.num_bytes,
                    num_fp16_bytes=signed.manifest.num_fp16_bytes,
                )
            )
            await self._announce(signed)

    async def _keep(self, ready: ReferenceReady, path: Path) -> None:
        """Put a keyframe of a teacher's checkpoint into the store, unless its chain has moved past that one by now."""
        version = Version(ready.incarnation, ready.step)
        chunks = await self._split(path)
        async with self._gossip_lock:  # the chain stays what it is
            chain = () if ready.origin == self._site else self._store.chain(ready.origin)
            if version not in [stored.version for stored in chain]:
                path.unlink(missing_ok=True)
                return
            signed = self._sign(ready, path, chunks, origin=ready.origin, version=version, base=None)
            try:
                await asyncio.to_thread(self._store.adopt, signed, path, may_evict=False)
            except (OSError, OversizedError) as error:
                if isinstance(error, OSError) and not is_full_disk(error):
                    raise
                path.unlink(missing_ok=True)  # the chain itself does for a while

    async def _split(self, path: Path) -> _Chunks:
        """Hash the file, and meanwhile let the disk have it: the store will want it to be durable."""
        num_bytes = self._chunk_bytes(path.stat().st_size)
        digests, _ = await asyncio.gather(
            asyncio.to_thread(digest_chunks, path, num_bytes), asyncio.to_thread(sync, path)
        )
        return _Chunks(num_bytes, digests)

    def _sign(
        self,
        ready: FrameReady | ReferenceReady,
        path: Path,
        chunks: _Chunks,
        *,
        origin: str,
        version: Version,
        base: Version | None,
    ) -> SignedManifest:
        manifest = Manifest(
            run=self._run,
            origin=origin,
            version=version,
            base=base,
            codec=ready.codec,
            schema_hash=ready.schema_hash,
            num_fp16_bytes=ready.num_fp16_bytes,
            num_bytes=path.stat().st_size,
            chunk_bytes=chunks.num_bytes,
            chunk_digests=chunks.digests,
        )
        return sign_manifest(manifest, self._identity)

    async def renew(self, incarnation: int) -> list[SignedManifest]:
        """The own frames worth keeping, stored again under `incarnation`, oldest first. With `gossip_lock` held."""
        renewed: list[SignedManifest] = []
        for stored in worth_keeping(self._store.frames(self._site)):
            copy = self._outbox / f"{stored.signed.frame_id}.again"
            copy.unlink(missing_ok=True)
            try:
                os.link(stored.path, copy)
            except OSError:  # a file system without hard links
                await asyncio.to_thread(shutil.copyfile, stored.path, copy)
            version = Version(incarnation, stored.version.step)
            base = stored.base and Version(incarnation, stored.base.step)
            again = dataclasses.replace(stored.signed.manifest, version=version, base=base)
            signed = sign_manifest(again, self._identity)
            try:
                await asyncio.to_thread(self._store.adopt, signed, copy, may_evict=False)
            except RefusedError as error:  # the store has no room for both; a new chain will be announced
                copy.unlink(missing_ok=True)
                self._last = None
                self._events.write(Refused(peer=None, reason=error.reason, why=str(error)))
                return renewed
            renewed.append(signed)
        if self._last is not None:
            self._last = Version(incarnation, self._last.step)
        return renewed
