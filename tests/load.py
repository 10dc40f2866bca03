"""Clients of a gateway, and the SMS provider that its messages reach, in one asyncio loop.

It is made for many clients on few cores: raw connections that are kept, and no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import ssl
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import lab

import gateway

HANG_S: Final = 40.0
"""How long a client waits for an answer: longer than the gateway may ever take."""


class Reply(NamedTuple):
    """An answer; status 0 stands for a connection that ended without one."""

    status: int
    headers: dict[str, str]
    body: Any
    took_s: float

    @property
    def errno(self) -> int:
        """The errno; 0 if there is none."""
        return int(self.body.get("errno") or 0) if isinstance(self.body, dict) else 0

    @property
    def outcome(self) -> str:
        """Status and errno, as tables show them."""
        return f"{self.status}/{self.errno}" if self.errno else str(self.status)

    @property
    def unknown(self) -> bool:
        """Whether the step may or may not have happened (CONTRACT §2)."""
        return self.status in (0, 503)


class Place(NamedTuple):
    """Where clients find a gateway: the port they connect to, and the URL they sign.

    Attributes:
        tls: For a proxy in front that speaks TLS.
    """

    port: int
    url: str
    tls: ssl.SSLContext | None = None


Observe = Callable[[str, str, Reply], None]


class Link:
    """One client's connection, which is kept; and its session, once there is one.

    Args:
        observe: Called with method, path and reply of each request.
    """

    def __init__(self, place: Place, observe: Observe = lambda *_: None) -> None:
        self.place, self.observe = place, observe
        self.credentials: gateway.Credentials | None = None
        self.ahead_s = 0.0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        """Hang up."""
        if self._streams:
            self._streams[1].close()
        self._streams = None

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request, signed if there is a session; signed anew if our clock is off.

        Raises:
            AssertionError: An answer that does not come from the gateway, or is none.
        """
        reply = await self._ask(method, path, body, headers)
        if reply.status == 401 and "ts=" in reply.headers.get("www-authenticate", ""):
            self.ahead_s = int(reply.headers["timestamp"]) - time.time()
            reply = await self._ask(method, path, body, headers)
        return reply

    async def _ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        begun_s, sent = time.monotonic(), ""
        data, kind = (body, "") if isinstance(body, bytes) else (b"", "")
        if body is not None and not isinstance(body, bytes):
            data, kind = json.dumps(body).encode(), "application/json"
        target = gateway.hawk_target(method, self.place.url + path)
        if self.credentials:
            now_s = int(time.time() + self.ahead_s)
            facts = target, now_s, secrets.token_hex(6), kind, data
            sent = gateway.build_authorization(self.credentials, *facts)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {urlsplit(self.place.url).netloc}"]
        lines += [f"Content-Length: {len(data)}"] * (method == "POST")
        lines += [f"Content-Type: {kind}"] * bool(kind) + [f"Authorization: {sent}"] * bool(sent)
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        request = "\r\n".join([*lines, "", ""]).encode() + data
        status, got, content = 0, dict[str, str](), b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(HANG_S):
                status, got, content = await self._exchange(request, method)
        if not status or got.get("connection") == "close":
            self.close()
        if seal := got.get("server-authorization"):
            assert self.credentials
            about = target, got.get("content-type", ""), content
            assert lab.check_answer(self.credentials.hawk_key, sent, seal, *about), "a wrong seal"
        is_json = content and got.get("content-type") == "application/json"
        value = json.loads(content) if is_json else content.decode("utf-8", "replace")
        reply = Reply(status, got, value, time.monotonic() - begun_s)
        self.observe(method, path, reply)
        return reply

    async def _exchange(self, request: bytes, method: str) -> tuple[int, dict[str, str], bytes]:
        if self._streams and self._streams[0].at_eof():
            self.close()  # the server closed it while it was idle
        if not self._streams:
            host, port = "127.0.0.1", self.place.port
            self._streams = await asyncio.open_connection(host, port, ssl=self.place.tls)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        length = 0 if method == "HEAD" else int(headers.get("content-length", 0))
        return int(first.split()[1]), headers, await reader.readexactly(length)

    async def register(self, **body: Any) -> Reply:
        """Open a session; from now on every request is signed."""
        self.credentials = None
        reply = await self.ask("POST", "/register", body or None)
        if reply.status == 200:
            token = gateway.SessionToken(bytes.fromhex(reply.body["msisdnSessionToken"]))
            self.credentials = gateway.derive_credentials(token)
        return reply


Answer = Callable[["Provider", str, str], Awaitable[bytes]]
"""How a provider treats a message to a number: returns what it answers."""


def spoken(status: str, http: int = 200) -> bytes:
    """Vonage's answer: a status for the one part."""
    part = {"status": status, "message-id": f"0A{secrets.token_hex(8)}"}
    data = json.dumps({"message-count": "1", "messages": [part]}).encode()
    head = f"HTTP/1.1 {http} OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


async def taken(provider: Provider, to: str, text: str) -> bytes:
    """Deliver the message, and say so."""
    provider.deliver(to, text)
    return spoken("0")


class Provider:
    """Takes messages as Vonage does; ``phones`` hold what arrived, by number.

    Attributes:
        answer: How it treats messages now.
        asked: How many messages it was asked to send, by number, whatever it then did.
    """

    def __init__(self) -> None:
        self.answer: Answer = taken
        self.phones: dict[str, list[str]] = defaultdict(list)
        self.asked: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def start(self) -> None:
        """Listen, on the port of before if there was one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Refuse connections, and end those that are open."""
        if self._server:
            self._server.close()
        for writer in self._open:
            writer.transport.abort()

    @property
    def entry(self) -> dict[str, Any]:
        """Its entry in ``sms_providers``."""
        url = f"http://127.0.0.1:{self.port}/sms"
        return {"kind": "nexmo", "endpoint": url, "api_key": "k", "api_secret": "hunter2"}

    def deliver(self, to: str, text: str) -> None:
        """Have a phone get the message."""
        self.phones[to].append(text)

    def code(self, number: str) -> str:
        """The code in the newest message to a number."""
        return code_in(self.phones[number][-1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        # The last is the end of the loop: Python 3.11 complains of a handler that lets it through.
        ends = OSError, asyncio.IncompleteReadError, asyncio.CancelledError
        with contextlib.suppress(*ends):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = re.search(r"content-length: *(\d+)", head)
                form = dict(parse_qsl((await reader.readexactly(int(length[1]))).decode()))  # type: ignore[index]
                self.asked["+" + form["to"]] += 1
                writer.write(await self.answer(self, "+" + form["to"], form["text"]))
                await writer.drain()
        self._open.discard(writer)
        writer.close()


def code_in(text: str) -> str:
    """The code in a message: the last word of its first line."""
    return text.splitlines()[0].split()[-1]
