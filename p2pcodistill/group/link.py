"""The link: where rank 0 meets the node, a ZeroMQ `ipc://` socket for small messages (see `link_messages`).

Each launch of the group has a token, so that a rank of an earlier launch cannot speak for this one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from p2pcodistill.errors import GroupError, MalformedError
from p2pcodistill.group.link_messages import (
    MAX_LINK_MESSAGE_BYTES,
    ChainBroken,
    EventHappened,
    FrameReady,
    Joined,
    Left,
    NodeMessage,
    NodeOrder,
    RankMessage,
    ReferenceReady,
    Welcome,
    decode_link_message,
    encode_link_message,
)

_logger = logging.getLogger("p2pcodistill")

_MAX_IPC_PATH_BYTES = 107
_CONNECT_RETRY_MS = 100
_FOLDER_PREFIX = "p2pcodistill-"


class NodeLink:
    """The node's end. Binds in a private folder with a short path, remembered by the symbolic link `pointer`."""

    def __init__(self, pointer: Path) -> None:
        self._pointer = pointer
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_LINK_MESSAGE_BYTES)
        self._folder: Path | None = None
        self._token: str | None = None
        self._rank: bytes | None = None

    def open(self) -> str:
        """Bind; returns the `ipc://` address. A folder that a killed node left behind is removed."""
        if self._pointer.is_symlink():
            _remove_own_folder(self._pointer.readlink())
            self._pointer.unlink()
        runtime_folder = os.environ.get("XDG_RUNTIME_DIR")
        if runtime_folder is not None and not (
            os.access(runtime_folder, os.W_OK) and len(runtime_folder) < 60
        ):
            runtime_folder = None
        self._folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=runtime_folder))
        self._pointer.symlink_to(self._folder)
        path = self._folder / "link"
        if len(os.fsencode(path)) > _MAX_IPC_PATH_BYTES:
            raise GroupError(f"the socket path {path} is too long: set TMPDIR to a folder with a short name")
        self._socket.bind(f"ipc://{path}")
        return f"ipc://{path}"

    def expect(self, token: str) -> None:
        """From now on only the rank that joins with `token` is listened to."""
        self._token, self._rank = token, None

    @property
    def joined(self) -> bool:
        """Whether rank 0 of the expected launch is connected."""
        return self._rank is not None

    async def receive(self) -> RankMessage:
        """The next message of the current launch's rank 0. Raises MalformedError."""
        while True:
            sender, *parts = await self._socket.recv_multipart()
            message = decode_link_message(parts[0] if len(parts) == 1 else b"")
            if isinstance(message, Joined):
                if message.token != self._token:
                    continue
                self._rank = sender
                return message
            if sender != self._rank:
                continue
            if isinstance(message, FrameReady | ReferenceReady | ChainBroken | EventHappened | Left):
                return message
            raise MalformedError(f"rank 0 sent a {type(message).__name__}")

    async def send(self, message: NodeMessage) -> None:
        """Send to rank 0, or drop the message when it is not there: the welcome tells it everything when it joins.

        Never waits: a ROUTER drops what it cannot deliver.
        """
        if self._rank is not None:
            await self._socket.send_multipart([self._rank, encode_link_message(message)])

    def close(self) -> None:
        """Close the socket and remove the folder."""
        self._socket.close()
        self._context.term()
        if self._folder is not None:
            _remove_own_folder(self._folder)
            self._pointer.unlink(missing_ok=True)


def _remove_own_folder(folder: Path) -> None:
    """Remove a folder that a `NodeLink` made, and nothing else, whatever a pointer in a run folder says."""
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if (
            folder.name.startswith(_FOLDER_PREFIX)
            and found.st_uid == os.getuid()
            and stat.S_ISDIR(found.st_mode)
        ):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


class RankLink:
    """Rank 0's end: one DEALER on a thread of its own. `send` may be called from any thread and never blocks.

    `on_message` is called on that thread for each message after the welcome.
    """

    def __init__(self, address: str, token: str, on_message: Callable[[NodeOrder], None]) -> None:
        self._address, self._token, self._on_message = address, token, on_message
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._welcome: queue.SimpleQueue[Welcome] = queue.SimpleQueue()
        self._linger_ms = 0
        self._thread = threading.Thread(target=self._run, name="p2pcodistill-link", daemon=True)

    def connect(self, timeout_s: float) -> Welcome:
        """Join the node; what it holds and knows of the teachers now. Raises GroupError if no node answers."""
        self._thread.start()
        self._enqueue(encode_link_message(Joined(self._token)))
        try:
            return self._welcome.get(timeout=timeout_s)
        except queue.Empty:
            self.close(0)
            raise GroupError(f"the node did not answer at {self._address} within {timeout_s:g} s") from None

    def send(self, message: FrameReady | ReferenceReady | ChainBroken | EventHappened) -> None:
        """Queue one message for the node."""
        self._enqueue(encode_link_message(message))

    def close(self, timeout_s: float) -> None:
        """Flush what is queued (at most `timeout_s`) and end the thread. Safe to call twice."""
        if not self._thread.is_alive():
            return
        self._linger_ms = int(timeout_s * 1000)
        self._enqueue(encode_link_message(Left()))
        self._enqueue(None)
        self._thread.join()
        self._wake_read.close()
        self._wake_write.close()

    def _enqueue(self, data: bytes | None) -> None:
        self._outgoing.put(data)
        with contextlib.suppress(BlockingIOError, OSError):  # full: the thread is being woken already
            self._wake_write.send(b"\0")

    def _run(self) -> None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RECONNECT_IVL, _CONNECT_RETRY_MS)
        dealer.connect(self._address)
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._wake_read.fileno() in ready:
                    self._wake_read.recv(4096)
                    while not self._outgoing.empty():
                        data = self._outgoing.get()
                        if data is None:
                            return
                        dealer.send(data)
                if dealer in ready:
                    try:
                        self._dispatch(decode_link_message(dealer.recv()))
                    except MalformedError as error:  # this thread must live: it brings the wish to stop
                        _logger.warning("from the node: %s", error)
        finally:
            dealer.close(linger=self._linger_ms)
            context.term()

    def _dispatch(self, message: RankMessage | NodeMessage) -> None:
        if isinstance(message, Welcome):
            self._welcome.put(message)
        elif isinstance(message, NodeOrder):
            self._on_message(message)
