"""What an attacker of the machine or the network finds: SECURITY.md's findings that stand alone."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import NUMBER, GatewayProcess, WsgiClient
from test_serving import eventually, head, parsed, talk, verified, workers_of

import gateway

Start = Callable[..., GatewayProcess]
Make = Callable[..., WsgiClient]


# -- 7: signatures without a hash ---------------------------------------------


def without_hash(client: WsgiClient, path: str, body: bytes = b"") -> dict[str, str]:
    """An Authorization that does not cover the body, as hawk's own clients may write it."""
    assert client.credentials
    target = gateway.hawk_target("POST", f"http://{client.host}{path}")
    header = gateway.HawkHeader(
        client.credentials.hawk_id, str(int(client.gateway.clock())), "a" + path[-5:]
    )
    mac = gateway.hawk_mac("header", client.credentials.hawk_key, header, target)
    fields = {"id": header.id, "ts": header.ts, "nonce": header.nonce, "mac": mac}
    return {"HTTP_AUTHORIZATION": "Hawk " + ", ".join(f'{n}="{v}"' for n, v in fields.items())}


def test_a_hash_can_be_required(make_client: Make) -> None:
    strict = make_client(hawk_require_hash=True)
    strict.register()
    body = b'{"msisdn": "%s"}' % NUMBER.encode()
    answer = strict.raw("POST", "/sms/verify", body, without_hash(strict, "/sms/verify", body))
    assert (answer.status, answer.errno) == (401, 109)
    assert "hash" in answer.json["message"]
    answer = strict.raw("POST", "/unregister", b"", without_hash(strict, "/unregister"))
    assert (answer.status, answer.errno) == (401, 109)  # or somebody could add a body to it
    assert strict.outbox() == []
    assert strict.ask().status == 200  # our client sends one, and the session is still there
    assert strict.call("/unregister").status == 204


def test_clients_of_2014_need_no_hash(make_client: Make) -> None:
    lenient = make_client()
    lenient.register()
    body = b'{"msisdn": "%s"}' % NUMBER.encode()
    answer = lenient.raw("POST", "/sms/verify", body, without_hash(lenient, "/sms/verify", body))
    assert answer.status == 200


def test_the_start_warns_of_a_public_url_without_tls() -> None:
    api: Any = {"sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]}
    open_to_all = gateway.Settings(public_url="http://id.example", **api)
    assert "http" in open_to_all.warnings[0]
    assert "hawk_require_hash" in open_to_all.warnings[0]
    strict = gateway.Settings(public_url="http://id.example", hawk_require_hash=True, **api)
    assert "hawk_require_hash" not in strict.warnings[0]
    listening = gateway.Settings(host="192.0.2.1", **api)  # it is called http://192.0.2.1:5000
    assert len(listening.warnings) == 1
    assert gateway.Settings(public_url="https://id.example", **api).warnings == []
    assert gateway.Settings().warnings == []


def test_the_warning_is_in_the_log(start_gateway: Start) -> None:
    process = start_gateway(
        "--public-url", "http://id.example",
        "--sms-providers", '[{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]',
    )  # fmt: skip
    assert "WARNING gateway: public_url is http" in process.output


# -- 10: slow and large -------------------------------------------------------


def endless(process: GatewayProcess, stack: contextlib.ExitStack) -> socket.socket:
    """A request whose body never ends."""
    connection = socket.create_connection(("127.0.0.1", process.port), timeout=20)
    stack.enter_context(contextlib.closing(connection))
    connection.sendall(head("Content-Length: 100", close=False) + b"{")
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1000):
            received += data
    return received


def test_bodies_that_never_end_keep_nobody_waiting(start_gateway: Start) -> None:
    process = start_gateway("--threads", "128")
    with contextlib.ExitStack() as stack:
        started_s = time.monotonic()
        late = [endless(process, stack) for _ in range(60)]  # 64 may wait
        waits_s = []
        while time.monotonic() < started_s + 8:
            late[0].sendall(b" ")  # dripping does not help
            asked_s = time.monotonic()
            assert verified(process).unregister().status == 204
            waits_s.append(time.monotonic() - asked_s)
            time.sleep(0.2)
        assert max(waits_s) < 2
        ended = b"".join(until_closed(connection) for connection in late)
        assert 9 < time.monotonic() - started_s < 15
        assert b" 200 " not in ended  # nobody was registered
    # All threads are back: as many bodies as before may be waited for, but not more than that.
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            endless(process, stack)
        client = process.client()
        assert eventually(lambda: client.call("POST", "/register", {}).status == 503, 3)
        reply = client.call("POST", "/register", {})
        assert (reply.status, reply.body["errno"], reply.headers["Retry-After"]) == (503, 201, "5")
        assert client.call("GET", "/__heartbeat__").status == 200  # has no body
        assert client.register().status == 200
    # Whoever hangs up leaves no thread behind.
    assert eventually(lambda: client.call("POST", "/register", {}).status == 200, 3)
    assert "Traceback" not in process.output


def test_more_endless_bodies_than_threads_stop_nobody_without_a_body(start_gateway: Start) -> None:
    process = start_gateway("--threads", "64")
    with contextlib.ExitStack() as stack:
        started_s = time.monotonic()
        for _ in range(64):
            endless(process, stack)
        while time.monotonic() < started_s + 3:
            assert process.client().call("GET", "/__heartbeat__").status == 200
        time.sleep(max(0, started_s + 13 - time.monotonic()))
        assert verified(process).unregister().status == 204  # and all who have one again


def test_a_body_in_time_is_taken_whole(start_gateway: Start) -> None:
    process = start_gateway()
    slow = talk(process.port, head("Content-Length: 4"), b"{", b" ", b" }", pause_s=2)
    assert parsed(slow)[0] == 200
    long_head = head("Content-Length: 10240", "X-Long: " + "a" * 12_000)
    assert parsed(talk(process.port, long_head + b"{" + b" " * 10238 + b"}"))[0] == 200


def test_large_heads_take_little_memory(start_gateway: Start) -> None:
    process = start_gateway()
    [worker] = workers_of(process)
    assert process.client().register().status == 200
    before = worker.memory_info().rss
    refused = 0
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", process.port), timeout=5)
            stack.enter_context(contextlib.closing(connection))
            connection.sendall(b"POST /register HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 15_000)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"a" * 345_000)
            with contextlib.suppress(OSError):
                refused += b" 431 " in connection.recv(100)
        assert process.client().register().status == 200
        grown = worker.memory_info().rss - before
    assert grown < 20_000_000
    assert refused > 300  # the rest were cut off while they sent


def test_heads_that_stay_just_below_the_limit_take_little_memory(start_gateway: Start) -> None:
    process = start_gateway()
    [worker] = workers_of(process)
    assert process.client().register().status == 200
    before = worker.memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", process.port), timeout=5)
            stack.enter_context(contextlib.closing(connection))
            connection.sendall(b"POST /register HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 16_000)
        assert process.client().register().status == 200
        assert worker.memory_info().rss - before < 20_000_000


# -- 15: a path that is not UTF-8 ---------------------------------------------


@pytest.mark.parametrize(
    "path", ["/regist\xffer", "/\xc0\xafregister", "/register\xed\xa0\x80", "/register\xe2\x82"]
)
def test_a_path_that_is_not_utf8_is_404(client: WsgiClient, path: str) -> None:
    answer = client.raw("POST", path)
    assert answer.status == 404
    assert answer.json.keys() == {"code", "error", "message"}
    assert client.raw("OPTIONS", path).status == 204
