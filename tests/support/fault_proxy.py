"""A TCP proxy on loopback that disturbs chosen HTTP exchanges: latency, cuts, resets, half-closes, odd parts, silence.

It reads each request whole, so that a test can aim a fault at an operation by the bytes of its body. Replies pass as
raw bytes. A client that leaves ends the connection to the server too, unless the fault says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import re
import socket
import struct
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import h11

LOOPBACK = "127.0.0.1"
READ_BYTES = 65536
HEAD_END = b"\r\n\r\n"
# Linger of 0 s: close() sends a reset instead of the end of the stream.
RESET = struct.pack("ii", 1, 0)
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
# Position of a stop before the head of the reply.
BEFORE_REPLY = -1


class Stop(enum.Enum):
    """How the client sees the end of a reply: the stream ends, is reset, ends in one direction, or falls silent."""

    END = enum.auto()
    RESET = enum.auto()
    HALF_CLOSE = enum.auto()
    SILENCE = enum.auto()


class Server(enum.Enum):
    """What happens at the server when the client's reply stops.

    LEAVES: its connection is closed at once. ANSWERS: it sends the whole reply before the client sees the stop.
    CONTINUES: its connection stays until the reply has ended.
    """

    LEAVES = enum.auto()
    ANSWERS = enum.auto()
    CONTINUES = enum.auto()


@dataclass(frozen=True)
class Fault:
    """The disturbance of one exchange.

    `delay_s`: pause before the request is forwarded, and before the first byte of the reply. `pause_s`: pause at `at`.
    `request_bytes`: forward only so many bytes of the request, then stop both sides; 0 forwards nothing, and a
    negative number counts from the end.
    `half_close`: end the direction to the server after the request. `pieces`: sizes into which the reply is cut, head
    included, with `piece_s` after each one, so that the client reads them one by one.
    `stop` ends the reply after `at` bytes of its body; `BEFORE_REPLY` is before its head.
    """

    name: str = "none"
    delay_s: float = 0.0
    pause_s: float = 0.0
    request_bytes: int | None = None
    half_close: bool = False
    pieces: Sequence[int] = ()
    piece_s: float = 0.0005
    stop: Stop | None = None
    at: int = 0
    server: Server = Server.LEAVES


NONE = Fault()


@dataclass
class Exchange:
    """A request that reached the proxy.

    `reply`: the bytes that the server sent. `answered`: they are a whole reply. `reply_bytes` counts those that the
    client was sent. `ended`: the client was sent all of them.
    """

    head: bytes
    body: bytes
    fault: Fault
    reply: bytes = b""
    reply_bytes: int = 0
    answered: bool = False
    ended: bool = False


@dataclass
class _Plan:
    fault: Fault
    containing: bytes
    left: int


class FaultProxy:
    """The proxy in a thread. `url` replaces the URL of the server.

    `disturb` plans a fault; each matching request uses one of its `times`. Other requests pass undisturbed.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self.target = host, int(port)
        self.exchanges: list[Exchange] = []
        self._plans: list[_Plan] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)
        self._listener = socket.create_server((LOOPBACK, 0), backlog=128)
        self._stopping = asyncio.Event()
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"

    def disturb(self, fault: Fault, containing: bytes = b"", times: int = 1) -> None:
        """Apply `fault` to the next `times` requests whose body contains these bytes."""
        with self._lock:
            self._plans.append(_Plan(fault, containing, times))

    def forget(self) -> None:
        """Cancel all planned disturbances."""
        with self._lock:
            self._plans.clear()

    def waiting(self) -> int:
        """Return how many planned disturbances no request has met yet."""
        with self._lock:
            return sum(plan.left for plan in self._plans)

    def met(self, fault: Fault) -> bool:
        """Return whether a request has met this fault."""
        return any(exchange.fault is fault for exchange in self.exchanges)

    def take(self, body: bytes) -> Fault:
        """Return the fault for a request."""
        with self._lock:
            for plan in self._plans:
                if plan.left and plan.containing in body:
                    plan.left -= 1
                    return plan.fault
        return NONE

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(_Connection(self, reader, writer).run())
            connections[task] = writer
            task.add_done_callback(lambda done: connections.pop(done, None))

        async with await asyncio.start_server(connected, sock=self._listener):
            await self._stopping.wait()
            rest = dict(connections)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            for writer in rest.values():  # of a task that was cancelled before its first step too
                await _close(writer)


class _Connection:
    """One client's connection, and its own connection to the server."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client_in = reader
        self._client_out = writer
        self._server_in: asyncio.StreamReader | None = None
        self._server_out: asyncio.StreamWriter | None = None
        self._keeps_server = False
        self._left = asyncio.Event()
        self._requests: asyncio.Queue[tuple[bytes, bytes] | None] = asyncio.Queue()

    async def run(self) -> None:
        """Pass exchanges until one side ends."""
        reading = asyncio.create_task(self._read_requests())
        try:
            while (request := await self._requests.get()) is not None:
                exchange = Exchange(*request, self._proxy.take(request[1]))
                self._proxy.exchanges.append(exchange)
                if not await self._pass(exchange):
                    break
        except OSError:
            pass
        finally:
            reading.cancel()
            for writer in (self._client_out, self._server_out):
                if writer is not None:
                    await _close(writer)

    async def _read_requests(self) -> None:
        """Read requests until the client leaves. Its leaving closes the server's connection in mid-reply."""
        try:
            while True:
                head = await self._client_in.readuntil(HEAD_END)
                found = _LENGTH.search(head)
                body = await self._client_in.readexactly(int(found[1]) if found else 0)
                self._requests.put_nowait((head, body))
        except (OSError, asyncio.IncompleteReadError):
            self._left.set()
            self._requests.put_nowait(None)
            if self._server_out is not None and not self._keeps_server:
                self._server_out.close()

    async def _pass(self, exchange: Exchange) -> bool:
        """Pass one exchange. Return whether the connection can carry another one."""
        fault = exchange.fault
        await asyncio.sleep(fault.delay_s)
        if fault.request_bytes is not None:
            return await self._cut_request(exchange)
        self._keeps_server = fault.server is not Server.LEAVES
        await self._send_to_server(exchange.head + exchange.body)
        if fault.half_close and self._server_out is not None:
            self._server_out.write_eof()
        async with contextlib.aclosing(self._reply(exchange)) as reply:
            if fault.server is Server.ANSWERS:
                whole = b"".join([part async for part in reply])
                exchange.ended = await self._answer(exchange, _once(whole))
            else:
                exchange.ended = await self._answer(exchange, reply)
        self._keeps_server = False
        return exchange.ended and not fault.half_close

    async def _cut_request(self, exchange: Exchange) -> bool:
        """Forward the beginning of the request, then stop. With `SILENCE` the client waits until it leaves."""
        beginning = (exchange.head + exchange.body)[: exchange.fault.request_bytes]
        if beginning:
            await self._send_to_server(beginning)
            await asyncio.sleep(0.05)  # the server reads the beginning before it sees the end
            assert self._server_out is not None
            await _close(self._server_out)
        await self._stop(exchange.fault.stop or Stop.END)
        return False

    async def _send_to_server(self, data: bytes) -> None:
        if self._server_out is None:
            self._server_in, self._server_out = await asyncio.open_connection(*self._proxy.target)
        self._server_out.write(data)
        await self._server_out.drain()
        if self._left.is_set() and not self._keeps_server:
            self._server_out.close()  # the client left while the request waited

    async def _reply(self, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the reply until it is whole, or until the server or the client ends its connection."""
        assert self._server_in is not None
        ending = _Ending(exchange.head)
        while data := await self._server_in.read(READ_BYTES):
            exchange.reply += data
            exchange.answered = ending.is_after(data)
            yield data
            if exchange.answered:
                return

    async def _answer(self, exchange: Exchange, reply: AsyncGenerator[bytes, None]) -> bool:
        """Send the reply to the client, with the fault. Return whether the client received all of it."""
        fault, held, passed = exchange.fault, b"", False
        mark: int | None = None
        await asyncio.sleep(fault.delay_s)
        if fault.at == BEFORE_REPLY:
            return await self._end(exchange, reply)
        async for data in reply:
            held += data
            if mark is None and HEAD_END in held:
                mark = held.index(HEAD_END) + len(HEAD_END) + fault.at
            if mark is None:
                continue
            before = mark - exchange.reply_bytes
            if not passed and before <= len(held):
                await self._send_pieces(exchange, held[:before])
                held = held[before:]
                if fault.stop is not None:
                    return await self._end(exchange, reply)
                passed = True
                await asyncio.sleep(fault.pause_s)
            await self._send_pieces(exchange, held)
            held = b""
        return exchange.answered and not self._left.is_set()

    async def _end(self, exchange: Exchange, reply: AsyncGenerator[bytes, None]) -> bool:
        """Stop the client's side, and the server's as the fault says."""
        stop, server = exchange.fault.stop or Stop.END, exchange.fault.server
        if server is Server.LEAVES and self._server_out is not None:
            await _close(self._server_out)
        await self._stop(stop)
        if server is Server.CONTINUES:
            async for _ in reply:
                pass
        return False

    async def _stop(self, stop: Stop) -> None:
        if stop is Stop.RESET:
            self._client_out.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._client_out.transport.abort()
            return
        if stop is Stop.END:
            await _close(self._client_out)
            return
        if stop is Stop.HALF_CLOSE:
            self._client_out.write_eof()
        await self._left.wait()

    async def _send_pieces(self, exchange: Exchange, data: bytes) -> None:
        sizes = itertools.cycle(exchange.fault.pieces or (READ_BYTES,))
        while data:
            size = next(sizes)
            piece, data = data[:size], data[size:]
            self._client_out.write(piece)
            await self._client_out.drain()
            exchange.reply_bytes += len(piece)
            if exchange.fault.pieces:
                await asyncio.sleep(exchange.fault.piece_s)


class _Ending:
    """Finds the end of a reply."""

    def __init__(self, request_head: bytes) -> None:
        method = request_head.split(b" ", 1)[0]
        self._parser = h11.Connection(h11.CLIENT)
        self._parser.send(h11.Request(method=method, target="/", headers=[("Host", "proxy")]))
        self._parser.send(h11.EndOfMessage())

    def is_after(self, data: bytes) -> bool:
        """Return whether the reply is whole with these bytes."""
        self._parser.receive_data(data)
        while (event := self._parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.EndOfMessage):
                return True
        return False


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close a connection. A task that is cancelled here must not cancel the writer's own future, which others await."""
    writer.close()
    with contextlib.suppress(OSError):
        await asyncio.shield(writer.wait_closed())
