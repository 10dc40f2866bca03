"""The table of limits (CONTRACT §7): each row over a real store, from two worker processes.

The processes are forked, each has an application of its own, and they share nothing but the store.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import provider as sms
import pytest
from provider import Provider
from support import NUMBER, WIDE, Answer, Clock, WsgiClient
from test_limits import refused

import gateway

HERE, THERE = "198.51.100.7", "203.0.113.9"
OTHER, ELSEWHERE = "+447700900999", "+447700910123"
Client = Callable[..., WsgiClient]


@pytest.fixture
def stand_in() -> Iterator[Provider]:
    """A provider that takes every message."""
    with Provider(sms.taken) as provider:
        yield provider


@pytest.fixture
def paid(stand_in: Provider) -> dict[str, Any]:
    """Settings that send through it."""
    return {"sms_providers": [stand_in.nexmo()], "sends_per_session": 255}


class From(WsgiClient):
    """A client at an address, with a session of its own for each message."""

    def at(self, address: str) -> From:
        """A new session from an address."""
        client = From(self.app)
        client.address = address
        client.register()
        return client

    address = HERE

    def raw(
        self, method: str, path: str, body: bytes = b"", environ: dict[str, Any] | None = None
    ) -> Answer:
        return super().raw(method, path, body, {"REMOTE_ADDR": self.address, **(environ or {})})


def ask(app: gateway.GatewayApp, address: str, number: str) -> Answer:
    """Register and ask for a message: the answer of the first that refuses."""
    client = From(app)
    client.address = address
    opened = client.call("/register", signed=False)
    if opened.status != 200:
        return opened
    token = gateway.SessionToken(bytes.fromhex(opened.json["msisdnSessionToken"]))
    client.credentials = gateway.derive_credentials(token)
    return client.ask(number)


class Worker:
    """A process of its own that asks for messages when it is told to."""

    def __init__(self, make_app: Any, settings: dict[str, Any]) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, far = fork.Pipe()
        self.process = fork.Process(target=self.work, args=(far, make_app, settings), daemon=True)
        self.process.start()

    @staticmethod
    def work(pipe: Any, make_app: Any, settings: dict[str, Any]) -> None:
        app = make_app(**settings)
        while job := pipe.recv():
            with ThreadPoolExecutor(16) as pool:
                pipe.send(list(pool.map(lambda each: ask(app, *each), job)))

    def ask(self, *jobs: tuple[str, str]) -> list[Answer]:
        """Ask for messages, each (address, number), at once."""
        self.pipe.send(jobs)
        answers: list[Answer] = self.pipe.recv()
        return answers

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(10)


@pytest.fixture
def workers(make_app: Any) -> Iterator[Callable[..., list[Worker]]]:
    """Start worker processes with these settings."""
    started: list[Worker] = []

    def start(count: int, **settings: Any) -> list[Worker]:
        started.extend(Worker(make_app, settings) for _ in range(count))
        return started

    yield start
    for worker in started:
        worker.close()


TABLE: list[tuple[dict[str, Any], int, str, list[tuple[str, str]], int]] = [
    # settings, errno, name, one more than what is allowed, and seconds of one message
    ({"sends_per_number": "2/minute"}, 115, "sends_per_number",
     [(HERE, NUMBER), (THERE, NUMBER), (HERE, NUMBER)], 30),
    ({"sends_per_number_from_address": "2/minute"}, 115, "sends_per_number_from_address",
     [(HERE, NUMBER)] * 3, 30),
    ({"unverified_per_prefix": "4/minute"}, 116, "unverified_per_prefix",
     [(HERE, NUMBER), (HERE, OTHER), (THERE, NUMBER), (THERE, OTHER), ("192.0.2.1", OTHER)], 15),
    ({"unverified_per_prefix": "4/minute"}, 116, "unverified_per_prefix",
     [(HERE, NUMBER), (HERE, OTHER), (HERE, NUMBER)], 30),
    ({"unverified_per_destination": {"*": "9/day", "GB": "3/minute"}}, 116,
     "unverified_per_destination",
     [(HERE, NUMBER), (THERE, ELSEWHERE), ("192.0.2.1", NUMBER), ("192.0.2.2", NUMBER)], 20),
    ({"unverified_per_address": "2/minute"}, 117, "unverified_per_address",
     [(HERE, NUMBER), (HERE, ELSEWHERE), (HERE, "+33612345678")], 30),
    ({"registers_per_address": "3/minute"}, 117, "registers_per_address",
     [(HERE, NUMBER)] * 4, 20),
    ({"sends_per_hour": 3}, 116, "sends_per_hour",
     [(HERE, NUMBER), (THERE, ELSEWHERE), ("192.0.2.1", NUMBER), ("192.0.2.2", NUMBER)], 1200),
    ({"spend_per_day": 0.4, "sms_price": {"*": 0.1, "GB": 0.2}}, 116, "spend_per_day",
     [(HERE, NUMBER), (THERE, ELSEWHERE), ("192.0.2.1", NUMBER)], 43200),
]  # fmt: skip


def named(answer: Answer, errno: int, name: str) -> int:
    """Check a refusal by a limit; gives its Retry-After."""
    wait_s = refused(answer, errno)
    assert answer.json["message"].startswith(name + ":")
    return wait_s


@pytest.mark.parametrize(("settings", "errno", "name", "asks", "each_s"), TABLE, ids=lambda v: "")
def test_each_limit_and_its_retry_after(
    make_client: Client, paid: dict[str, Any], stand_in: Provider, settings: dict[str, Any],
    errno: int, name: str, asks: list[tuple[str, str]], each_s: int,
) -> None:  # fmt: skip
    """The last that is allowed passes, the next does not, and after its Retry-After it does."""
    clock = Clock()
    apps = [make_client(clock=clock, **paid | settings).app for _ in range(2)]  # two machines
    for n, (address, number) in enumerate(asks[:-1]):
        assert ask(apps[n % 2], address, number).status == 200, n
    counters = content(apps[0].gateway.storage, b"{limits}")
    for app in apps:
        wait_s = named(ask(app, *asks[-1]), errno, name)
        assert wait_s == each_s
    after = content(apps[0].gateway.storage, b"{limits}")
    rows = {key for key in counters if key[8:9] in b"anpqdfhm" and len(key) == 21}
    assert {key: after[key] for key in rows} == {key: counters[key] for key in rows}
    assert len(stand_in.received) == len(asks) - 1
    clock.now_s += wait_s - 1
    assert named(ask(apps[0], *asks[-1]), errno, name) == 1
    clock.now_s += 1
    assert ask(apps[1], *asks[-1]).status == 200
    assert len(stand_in.received) == len(asks)


def content(storage: gateway.Storage, prefix: bytes = b"") -> dict[bytes, Any]:
    """Every key that begins like this, and its value."""
    read = {b"string": ("GET",), b"hash": ("HGETALL",), b"zset": ("ZRANGE", 0, -1, "WITHSCORES")}
    found = {}
    for key in storage._run("KEYS", prefix.replace(b"{", b"\\{") + b"*"):
        command, *rest = read[bytes(storage._run("TYPE", key))]
        found[bytes(key)] = storage._run(command, key, *rest)
    return found


SHORT: list[tuple[dict[str, Any], int, str, int]] = [
    ({"sends_per_number": "4/second"}, 115, "sends_per_number", 4),
    ({"sends_per_number_from_address": "4/second"}, 115, "sends_per_number_from_address", 4),
    ({"unverified_per_prefix": "8/second"}, 116, "unverified_per_prefix", 4),  # half of it
    ({"unverified_per_destination": {"*": "8/second"}}, 116, "unverified_per_destination", 8),
    ({"unverified_per_address": "4/second"}, 117, "unverified_per_address", 4),
    ({"registers_per_address": "4/second"}, 117, "registers_per_address", 4),
]


@pytest.mark.parametrize(("settings", "errno", "name", "allowed"), SHORT, ids=lambda v: "")
def test_two_processes_by_the_clock_of_the_store(
    workers: Any, paid: dict[str, Any], settings: dict[str, Any], errno: int, name: str,
    allowed: int,
) -> None:  # fmt: skip
    """Forty at once from two processes: so many pass as the time allows, and a second later more.

    The budget refills while the forty are asked.
    """
    two = workers(2, **paid | settings)
    started_s = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda worker: worker.ask(*[(HERE, NUMBER)] * 20), two)
    answers = [answer for half in halves for answer in half]
    took_s = time.monotonic() - started_s
    waits = [named(answer, errno, name) for answer in answers if answer.status != 200]
    assert allowed <= 40 - len(waits) <= allowed * (1 + took_s) + 1
    assert set(waits) == {1}
    time.sleep(1)
    assert [answer.status for answer in two[1].ask((HERE, NUMBER))] == [200]


def test_a_thousand_sends_to_one_number_from_four_processes(
    workers: Any, paid: dict[str, Any], stand_in: Provider
) -> None:
    """Exactly the allowed count leaves."""
    limits = WIDE | {"sends_per_number": "7/day", "sends_per_hour": 10**6}
    four = workers(4, **paid | limits)
    with ThreadPoolExecutor(4) as pool:
        jobs = [[(f"192.0.2.{n}", NUMBER) for n in range(250)] for _ in four]
        parts = pool.map(lambda worker, job: worker.ask(*job), four, jobs)
    answers = [answer for part in parts for answer in part]
    assert len(stand_in.received) == 7
    assert [answer.status for answer in answers].count(200) == 7
    for answer in answers:
        assert answer.status == 200 or named(answer, 115, "sends_per_number") > 12_000
