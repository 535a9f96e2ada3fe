"""From rank 0's encoded frames to announced ones: hash, sign, store, tell gossip. The newest frame wins.

While one frame is being published a newer one waits; one that finds another waiting takes its place, so that a slow disk
never makes what is published older and older. A frame is signed under the incarnation that holds when it is announced, and
dropped when the launch that made it is over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from p2pcodistill.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.errors import MalformedError, RefusedError
from p2pcodistill.group.link import FrameReady
from p2pcodistill.identity import Identity
from p2pcodistill.telemetry import EventLog, FramePublished, Refused, SnapshotSkipped


class Publisher:
    """This site's own frames. `announce` is called with `gossip_lock` held, right after a frame was stored."""

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
    ) -> None:
        self._site, self._run = site, run
        self._identity, self._store, self._outbox, self._events = identity, store, outbox, events
        self._gossip_lock, self._announce = gossip_lock, announce
        self._waiting: FrameReady | None = None
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._launch = 0

    def begin_launch(self) -> None:
        """The ranks of another launch will publish from now on: what the last one left is dropped."""
        self._launch += 1
        self._waiting = None
        for leftover in self._outbox.iterdir():
            leftover.unlink()

    def submit(self, ready: FrameReady) -> None:
        """Take a frame that rank 0 has put into the outbox."""
        if self._waiting is not None:
            (self._outbox / Path(self._waiting.path).name).unlink(missing_ok=True)
            why = f"the node was busy until step {ready.step}"
            self._events.write(SnapshotSkipped(step=self._waiting.step, why=why))
        self._waiting = ready
        self._idle.clear()
        self._work.set()

    async def drained(self) -> None:
        """Wait until every frame that was submitted is published or refused."""
        await self._idle.wait()

    async def run(self) -> None:
        """Publish what is submitted, for ever. Raises what broke in this site's own store (a full disk)."""
        while True:
            await self._work.wait()
            self._work.clear()
            ready, self._waiting = self._waiting, None
            if ready is not None:
                path = self._outbox / Path(ready.path).name
                try:
                    await self._publish(ready, path)
                except RefusedError as error:
                    path.unlink(missing_ok=True)
                    self._events.write(Refused(peer=None, reason=error.reason, why=str(error)))
            if self._waiting is None:
                self._idle.set()

    async def _publish(self, ready: FrameReady, path: Path) -> None:
        launch = self._launch
        if not path.exists():
            raise MalformedError(f"the ranks announced {path.name}, which is not in the outbox")
        digests = await asyncio.to_thread(digest_chunks, path, DEFAULT_CHUNK_BYTES)
        async with self._gossip_lock:  # the incarnation stays what it is until the frame is announced
            if launch != self._launch:
                return
            manifest = Manifest(
                run=self._run,
                origin=self._site,
                version=Version(self._store.incarnation, ready.step),
                kind=ready.kind,
                codec=ready.codec,
                schema_hash=ready.schema_hash,
                num_fp16_bytes=ready.num_fp16_bytes,
                num_bytes=path.stat().st_size,
                chunk_bytes=DEFAULT_CHUNK_BYTES,
                chunk_digests=digests,
            )
            signed = sign_manifest(manifest, self._identity)
            await asyncio.to_thread(self._store.adopt, signed, path)
            self._events.write(
                FramePublished(
                    incarnation=manifest.version.incarnation,
                    step=manifest.version.step,
                    num_bytes=manifest.num_bytes,
                    num_fp16_bytes=manifest.num_fp16_bytes,
                )
            )
            await self._announce(signed)

    async def renew(self, incarnation: int) -> SignedManifest | None:
        """The newest own frame, stored again under `incarnation`; None if there is none. With `gossip_lock` held."""
        newest = self._store.newest(self._site)
        if newest is None:
            return None
        manifest = newest.signed.manifest
        copy = self._outbox / f"{newest.signed.frame_id}.again"
        try:
            os.link(newest.path, copy)
        except OSError:  # a file system without hard links
            await asyncio.to_thread(shutil.copyfile, newest.path, copy)
        renewed = dataclasses.replace(manifest, version=Version(incarnation, manifest.version.step))
        signed = sign_manifest(renewed, self._identity)
        try:
            await asyncio.to_thread(self._store.adopt, signed, copy)
        except RefusedError as error:  # the store has no room for both; the next frame will be announced
            copy.unlink(missing_ok=True)
            self._events.write(Refused(peer=None, reason=error.reason, why=str(error)))
            return None
        return signed
