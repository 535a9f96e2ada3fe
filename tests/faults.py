"""Faults for tests: each counts how often it struck, so that a fault that never fired fails the test."""

from __future__ import annotations

import asyncio
import contextlib


class TcpProxy:
    """A TCP relay in front of a listening port. Its fault: after `hold_after_bytes` from the server it stops forwarding.

    Connections stay open while held, as on a link that went dark; `cut` resets them all. `num_held` counts connections that
    hit the limit, `num_cut` those that were reset, `num_bytes_from_server` what was forwarded to clients.
    """

    def __init__(self, server_port: int, *, hold_after_bytes: int | None = None) -> None:
        self._server_port = server_port
        self.hold_after_bytes = hold_after_bytes
        self.num_bytes_from_server = 0
        self.num_held = 0
        self.num_cut = 0
        self.held = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Reset every connection that exists now."""
        connections = list(self._connections)
        self.num_cut += len(connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        server_writer = None
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, server_writer))
                both.create_task(self._forward(server_reader, writer, from_server=True))
        except* (OSError, asyncio.CancelledError):
            pass  # either end went away, or the test cut the connection
        finally:
            self._connections.discard(task)
            for end in (writer, server_writer):
                if end is not None:
                    end.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_server: bool = False
    ) -> None:
        while data := await reader.read(1 << 14):
            if from_server:
                if self.hold_after_bytes is not None and self.num_bytes_from_server >= self.hold_after_bytes:
                    self.num_held += 1
                    self.held.set()
                    await asyncio.Event().wait()
                self.num_bytes_from_server += len(data)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
        raise ConnectionResetError("one side closed")
