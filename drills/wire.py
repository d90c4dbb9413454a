"""A TCP proxy between processes, whose connections can be stalled, cut and restored.

peers --> [wire, on a port of its own] --> the port that `find_port` returns at that moment
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Optional


class Wire:
    """Forwards every connection to its address to a port of this machine, until it is stalled or cut.

    Args:
      find_port: Returns the port, for each new connection; 0 while no process listens.
    """

    def __init__(self, find_port: Callable[[], int]):
        self._find_port = find_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._is_cut = False

    def __enter__(self) -> Wire:
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stall(self) -> None:
        """Stops all data, even the end of a connection: connections stay open, and new ones are accepted."""
        self._run(self._set(flows=False, cut=False))

    def cut(self) -> None:
        """Ends every connection immediately, and every new one."""
        self._run(self._set(flows=True, cut=True))

    def mend(self) -> None:
        """Forwards data again, starting with what a stall held back; after a cut that is lost."""
        self._run(self._set(flows=True, cut=False))

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _open(self) -> None:
        self._flows = asyncio.Event()
        self._flows.set()
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        self._abort_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _set(self, *, flows: bool, cut: bool) -> None:
        self._is_cut = cut
        if cut:
            self._abort_all()
        if flows:
            self._flows.set()
        else:
            self._flows.clear()

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        if self._is_cut:
            near.transport.abort()
            return
        self._writers.add(near)
        try:
            await self._flows.wait()
            if near.transport.is_closing() or near_reader.at_eof():
                raise ConnectionAbortedError("the server has gone meanwhile")
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._find_port())
        except (OSError, asyncio.CancelledError):  # no server listens, or one end or the proxy is closed
            near.transport.abort()
            self._writers.discard(near)
            return
        self._writers.add(far)
        for reader, writer in ((near_reader, far), (far_reader, near)):
            pump = asyncio.create_task(self._pump(reader, writer))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                try:
                    data = await reader.read(1 << 16)
                except OSError:
                    data = b""
                await self._flows.wait()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            writer.close()  # after the written data is sent
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
