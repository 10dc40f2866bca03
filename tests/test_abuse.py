"""Hostile clients of the real server, over real sockets; ``tests/hostile.py`` has what they send.

``tests/test_serving.py`` and ``tests/test_safety.py`` show the faults that once were found; here
whole tables are sent at once, while somebody honest is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import hostile
import lab
import pytest
from hostile import LAST, MARK, SMUGGLED
from nginx import NGINX, Nginx
from support import NUMBER, GatewayProcess, free_port, shared
from test_serving import eventually, workers_of

import gateway

pytestmark = pytest.mark.slow
AT_ONCE: Final = 20
"""How many hostile connections are open at a time."""
QUIET_S: Final = 1.5
"""A connection on which nothing comes for so long is hung up."""


class Door:
    """A gateway of one worker, which has served already, and the way in: direct, or by nginx."""

    def __init__(self, folder: Path, by_nginx: bool) -> None:
        options, port = ["--sends-per-session", "255"], free_port()
        self.url, self.tls = "", None
        if by_nginx:
            self.url = f"https://127.0.0.1:{port}"
            options += ["--public-url", self.url, "--trusted-proxies", '["127.0.0.1"]']
        self.gate = GatewayProcess(folder, *options)
        self.url, self.port = self.url or self.gate.url, port if by_nginx else self.gate.port
        self.nginx = Nginx(folder / "nginx", self.gate.port, port) if by_nginx else None
        if self.nginx:
            self.tls = ssl.create_default_context(cafile=self.nginx.certificate)
        [self.worker] = workers_of(self.gate)
        self.verified()

    def verified(self, number: str = NUMBER) -> lab.Client:
        """A client that is verified by this way."""
        client = lab.Client(self.url)
        if self.nginx:
            client.http = self.nginx.http()
        client.register()
        assert client.verify(number).status == 200
        code = lab.Handset(self.gate.client(), number).code()  # nginx lets nobody to the outbox
        assert client.verify_code(code).status == 200
        return client

    def connect(self) -> socket.socket:
        """A connection of its own."""
        plain = socket.create_connection(("127.0.0.1", self.port), 20)
        return self.tls.wrap_socket(plain, server_hostname="127.0.0.1") if self.tls else plain

    def close(self) -> None:
        """Stop it, in an orderly way."""
        if self.nginx:
            self.nginx.__exit__(None, None, None)
        output = self.gate.output
        assert self.gate.stop() == 0
        self.gate.close()
        assert "Traceback" not in output
        assert "unforeseen" not in output, output[output.find("unforeseen") :][:3000]


DOORS: Final = [
    "direct",
    pytest.param("nginx", marks=pytest.mark.skipif(not NGINX, reason="apt-get install nginx")),
]


@pytest.fixture(scope="module", params=DOORS)
def door(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    """Either way."""
    made = Door(tmp_path_factory.mktemp("abuse"), request.param == "nginx")
    yield made
    made.close()


@contextlib.contextmanager
def beside_somebody_honest(door: Door) -> Iterator[None]:
    """Somebody honest is verified again and again meanwhile; after it nothing is lost.

    Threads end 30 s after they were used, so only many of them are a loss.
    """
    files, threads = door.worker.num_fds(), door.worker.num_threads()
    done, faults, times_s = threading.Event(), list[object](), list[float]()

    def live() -> None:
        while not done.is_set():
            begun_s = time.monotonic()
            try:
                assert door.verified("+447700900555").unregister().status == 204
            except Exception as error:
                faults.append(error)
            times_s.append(time.monotonic() - begun_s)
            done.wait(0.1)

    honest = threading.Thread(target=live)
    honest.start()
    try:
        yield
    finally:
        done.set()
        honest.join()
    assert not faults
    assert times_s
    assert max(times_s) < 10 * shared(), (
        times_s
    )  # a flow is five requests; it takes 0.1 s where nobody works
    assert workers_of(door.gate) == [door.worker]
    most = files + gateway.STORAGE_CONNECTIONS  # which are opened when they are needed
    most += 64 if door.nginx else 0  # connections that it keeps for a while
    assert eventually(lambda: door.worker.num_fds() <= most)
    assert door.worker.num_threads() <= threads + 64


async def exchange(door: Door, data: bytes) -> bytes:
    """Send bytes over a connection of their own; all that comes back until nothing more does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port, ssl=door.tls)
    received = b""

    async def read() -> None:
        nonlocal received
        while more := await asyncio.wait_for(reader.read(65536), QUIET_S):
            received += more

    with contextlib.suppress(OSError, TimeoutError):
        writer.write(data)
        await asyncio.gather(read(), writer.drain())
    writer.transport.abort()
    return received


def ask_all(door: Door, requests: list[bytes]) -> list[bytes]:
    """Send each over a connection of its own, some at a time."""

    async def main() -> list[bytes]:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(data: bytes) -> bytes:
            async with room:
                return await exchange(door, data)

        return await asyncio.gather(*map(one, requests))

    return asyncio.run(main())


def fault_of(received: bytes, allowed: set[int]) -> str:
    """What is wrong with the answers to a hostile request and to ``LAST``; "" if nothing is."""
    found = hostile.answers(received)
    if any(answer.status >= 500 and answer.status not in allowed for answer in found):
        return f"a server's error: {found}"
    if any(answer.id == MARK for answer in found):
        return f"a body was taken for a request: {found}"
    if (found[0].status if found else 0) not in allowed:
        return f"status {found[0].status if found else 0}, allowed: {allowed}"
    if not all(answer.whole for answer in found):
        return f"an answer that is cut: {found}"
    if found[1:] and (found[-1].id, found[-1].status, len(found)) != ("last", 200, 2):
        return f"not the answer to what came last: {found}"
    return ""


BY_NGINX: Final = {0, 400, 404, 405, 413, 414, 501, 505}
"""What it answers by itself, for what the gateway would answer in another way."""
TABLES: Final = {"framing": hostile.framings, "unread": hostile.unread, "head": hostile.heads}


@pytest.mark.parametrize("table", TABLES)
def test_hostile_requests(door: Door, table: str) -> None:
    """Each has its status, and what came behind it is answered as itself, or not at all."""
    cases = [*TABLES[table]()]
    if door.nginx:  # it mends odd heads, makes a length of chunks, and speaks HTTP/0.9
        mended = {name for name, *_ in cases if table == "head" or "trailers" in name}
        cases = [
            (name, sent, allowed | BY_NGINX | ({200} if name in mended else set()))
            for name, sent, allowed in cases
            if name != "HTTP/0.9"
        ]
    with beside_somebody_honest(door):
        received = ask_all(door, [sent + LAST for _, sent, _ in cases])
    told = zip(cases, received, strict=True)
    faults = [f"{name}: {f}" for (name, _, allowed), data in told if (f := fault_of(data, allowed))]
    assert not faults, "\n".join(faults)


# -- Bodies -------------------------------------------------------------------


class Signer:
    """Writes requests of a session as bytes."""

    def __init__(self, door: Door, client: lab.Client) -> None:
        assert client.credentials
        self.url, self.credentials = door.url, client.credentials

    def authorization(self, method: str, path: str, body: bytes = b"") -> str:
        """The header for one request."""
        target = gateway.hawk_target(method, self.url + path)
        facts = int(time.time()), secrets.token_hex(6), "application/json" * bool(body), body
        return gateway.build_authorization(self.credentials, target, *facts)

    def request(self, method: str, path: str, body: bytes = b"", name: str = "hostile") -> bytes:
        """One request, with the right Content-Length."""
        host = self.url.partition("//")[2]
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"X-Request-Id: {name}"]
        lines += [f"Content-Length: {len(body)}"] * (method == "POST")
        lines += ["Content-Type: application/json"] * bool(body)
        lines.append(f"Authorization: {self.authorization(method, path, body)}")
        return "\r\n".join([*lines, "", ""]).encode() + body


def test_two_authorizations_on_one_request(door: Door) -> None:
    """Whoever comes second must not be the one who counts: nobody is, or the one that is right."""
    client, other = door.verified(), door.verified("+447700900556")
    mine, theirs = Signer(door, client), Signer(door, other)
    first = mine.request("GET", "/session")
    lines = [theirs.authorization("GET", "/session"), 'Hawk id="a"', "Basic YTpi", ""]
    requests = []
    for line in lines:
        more = f"Authorization: {line}\r\n\r\n".encode()
        requests += [first[:-2] + more, first.replace(b"\r\nAuth", b"\r\n" + more[:-2] + b"Auth")]
    for received in ask_all(door, [one + LAST for one in requests]):
        answer = hostile.answers(received)[0]
        assert answer.status in (200, 400, 401)
        if answer.status == 200:
            assert json.loads(answer.body)["msisdn"] in (NUMBER, "+447700900556")
    assert client.call("GET", "/session").body["msisdn"] == NUMBER


def test_pipelined_requests_are_answered_in_order(door: Door) -> None:
    """Each answer belongs to its request: id, body and seal; however the bytes are cut."""
    numbers = [f"+44770090{n:04}" for n in range(6001, 6006)]
    people = [door.verified(number) for number in numbers]
    signers = [Signer(door, client) for client in people]

    def whole() -> tuple[bytes, list[tuple[str, str]]]:
        parts, expected = [], []
        for n in range(10):
            for number, signer in zip(numbers, signers, strict=True):
                parts.append(signer.request("GET", "/session", name=f"{n}-{number[1:]}"))
                expected.append((f"{n}-{number[1:]}", number))
            for method, path, status in (
                ("HEAD", "/__version__", 200),
                ("GET", "/nowhere", 404),
                ("POST", "/sms/verify", 401),
                ("OPTIONS", "/register", 204),
            ):
                body = SMUGGLED * (method == "POST")
                lines = [f"Content-Length: {len(body)}"] * bool(body)
                name = f"{n}-{status}"
                parts.append(hostile.request(method, path, *lines, body=body, name=name))
                expected.append((name, ""))
        return b"".join(parts) + LAST, [*expected, ("last", "")]

    def check(received: bytes, expected: list[tuple[str, str]]) -> None:
        methods = ["GET"] * 5 + ["HEAD", "GET", "POST", "OPTIONS"]
        found = hostile.answers(received, *methods * 10)
        assert [answer.id for answer in found] == [name for name, _ in expected]
        for answer, (name, number) in zip(found, expected, strict=True):
            assert answer.whole
            if number:
                assert json.loads(answer.body)["msisdn"] == number
            elif name != "last":
                assert answer.status == int(name.partition("-")[2])

    with beside_somebody_honest(door):
        sent, expected = whole()
        check(ask_all(door, [sent])[0], expected)
        several = [whole() for _ in range(5)]
        for received, (_, expected) in zip(
            ask_all(door, [sent for sent, _ in several]), several, strict=True
        ):
            check(received, expected)
        sent, expected = whole()
        with door.connect() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(sent), 7):
                connection.sendall(sent[at : at + 7])
            received = b""
            while more := connection.recv(65536):
                received += more
        check(received, expected)


# -- Connections that end in the middle ---------------------------------------

POST: Final = hostile.post("Content-Length: 2", body=b"{}")
PHASES: Final = {
    "nothing": b"",
    "half a line": b"POST /regi",
    "half a head": POST[:60],
    "a head": hostile.post("Content-Length: 100", body=b""),
    "half a body": hostile.post("Content-Length: 100", body=b"{"),
    "half a chunk": hostile.post("Transfer-Encoding: chunked", body=b"10\r\n{"),
    "an expectation": hostile.post("Content-Length: 100", "Expect: 100-continue", body=b""),
    "a request": POST,
    "five requests": POST * 5,
    "a request and a half": POST + POST[:60],
    "a body that is too large": hostile.post("Content-Length: 99999", body=b"{" * 30_000),
    "a message to be sent": b"",  # signed: written anew each time
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("answered", [False, True], ids=["at once", "after the answer began"])
def test_a_reset_in_each_phase(door: Door, phase: str, answered: bool) -> None:
    """A reset costs nobody else anything, and leaves no thread and no descriptor behind."""
    client = door.verified()
    signer, body = Signer(door, client), json.dumps({"msisdn": NUMBER}).encode()
    with beside_somebody_honest(door):
        for _ in range(15):
            sent = PHASES[phase] or signer.request("POST", "/sms/verify", body) * (phase[0] == "a")
            with contextlib.closing(door.connect()) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(sent)
                    if answered:
                        connection.settimeout(0.1)
                        connection.recv(1)
                linger = struct.pack("ii", 1, 0)  # close() resets the connection
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert client.call("GET", "/session").status == 200


@pytest.mark.parametrize("phase", PHASES)
def test_half_closed_in_each_phase(door: Door, phase: str) -> None:
    """Who says that nothing more comes is let go, and leaves nothing behind.

    Like nginx, Granian takes that for the end of the connection, so the newest answer may be lost.
    """
    signer = Signer(door, door.verified())
    begun_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(20):
            sent = PHASES[phase] or signer.request("POST", "/sms/resend_code", b"{}")
            connections.append(stack.enter_context(contextlib.closing(door.connect())))
            with contextlib.suppress(OSError):
                connections[-1].sendall(sent)
                socket.socket.shutdown(connections[-1], socket.SHUT_WR)  # below TLS
        assert door.verified("+447700900555").unregister().status == 204
        for connection in connections:
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while more := connection.recv(65536):
                    received += more
            found = hostile.answers(received)
            assert all(answer.whole for answer in found)
            assert {answer.status for answer in found} <= {100, 200, 400, 408, 411, 413, 429}
    assert time.monotonic() - begun_s < 15 * shared()


FIELDS: Final = [
    *("msisdn", "mcc", "mnc", "roaming", "shortVerificationCode", "code", "publicKey"),
    *("duration", "format", "audience", "nonce", "everywhere"),
]
GOOD: Final[dict[str, dict[str, Any]]] = {
    "/sms/verify": {"msisdn": NUMBER, "mcc": "234"},
    "/sms/mt/verify": {"msisdn": NUMBER},
    "/sms/verify_code": {"code": "000000", "format": "jwt", "audience": "https://a.example"},
    "/certificate/sign": {"format": "jwt", "audience": "https://a.example"},
}
"""Without which a body is refused before anything else in it is looked at."""


def test_bodies_that_nobody_writes(door: Door) -> None:
    """Each field of each endpoint with each odd value, and what is no object at all."""
    paths = [r.path for r in gateway.ROUTES if "POST" in r.methods and "<" not in r.path]
    assert len(paths) >= 8
    client = door.verified()
    signer = Signer(door, client)
    names, requests = [], []
    for path, (name, value) in itertools.product(paths, hostile.bodies()):
        each = [[field] for field in FIELDS] if value[:1] != b"=" else [[]]
        each = each[:0] if door.nginx else each  # it passes bodies on as they are
        for fields in [FIELDS, *each]:
            body = hostile.body_of(fields, value, GOOD.get(path, {}))
            if path == "/unregister" and (
                value == b"true" or (value[:1] != b"=" and b'"everywhere"' not in body)
                or name.endswith("a thousand fields")
            ):  # fmt: skip
                continue  # that unregisters: further fields count for nothing
            spoken = path + "?provider=nexmo" * ("momt" in path or "receipt" in path)
            names.append(f"{path} {name} {fields}")
            requests.append(signer.request("POST", spoken, body) + LAST)
    with beside_somebody_honest(door):
        received = ask_all(door, requests)
    allowed = {200, 204, 400, 401, 404, 410, 413, 415, 429, 503}
    told = zip(names, received, strict=True)
    faults = [f"{name}: {fault}" for name, data in told if (fault := fault_of(data, allowed))]
    assert not faults, "\n".join(faults)
    assert len(requests) > (200 if door.nginx else 1000)
    assert client.call("GET", "/session").status == 200
