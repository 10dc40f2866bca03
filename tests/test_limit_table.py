"""The table of limits (CONTRACT §7): each row over a real store, from two worker processes.

The processes are forked, each has an application of its own, and they share nothing but the store.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import provider as sms
import pytest
import servers
from provider import Provider
from support import NUMBER, ROOT, WIDE, Answer, Clock, WsgiClient
from test_limits import refused

import gateway

HERE, THERE = "198.51.100.7", "203.0.113.9"
OTHER, ELSEWHERE = "+447700900999", "+447700910123"
Client = Callable[..., WsgiClient]
WRONG = "000000"


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
    # One that is nearly empty, as the money's is after two cheap messages, is gone in seconds.
    stay = {key for key in after if apps[0].gateway.storage._run("PTTL", key) > 5000}
    rows = {key for key in stay & {*counters} if key[8:9] in b"anpqdfhm" and len(key) == 20}
    assert rows
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
        if (kind := bytes(storage._run("TYPE", key))) != b"none":  # its time may end in between
            command, *rest = read[kind]
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


# -- Pay-back -----------------------------------------------------------------


def level(client: WsgiClient, row: str, who: str, region: str = "") -> float:
    """How many messages a counter holds; a part of one after a pay-back of 1.3."""
    (counter,) = client.gateway.limits.counters({row: who}, region)
    at_rest_us = int(client.gateway.storage._run("GET", counter.key) or 0)
    return round(max(0, at_rest_us - client.gateway.clock() * 1e6) / counter.cost_us, 3)


def levels(client: WsgiClient, number: str = NUMBER, address: str = HERE) -> dict[str, float]:
    """What every counter of a message holds."""
    who = {"a": address, "n": number, "p": number[:-4], "q": f"{number[:-4]} {address}", "d": "GB"}
    who |= {"f": f"{number} {address}", "h": ""}
    return {row: level(client, row, what, "GB") for row, what in who.items()}


def code_of(stand_in: Provider, number: str = NUMBER) -> str:
    """The newest code for a number."""
    return stand_in.texts()[number][-1].split()[-1]


DEFAULTS: dict[str, Any] = {
    name: getattr(gateway.Settings(), name) for name in (*WIDE, "sends_per_hour")
}


@pytest.fixture
def client(make_client: Client, paid: dict[str, Any]) -> From:
    """Of a gateway with the limits that are the default, on a clock that stands still."""
    return From(make_client(clock=Clock(), **paid | DEFAULTS).app)


def wrong_code(stand_in: Provider, number: str = NUMBER) -> dict[str, str]:
    """A body with a code that could be the newest for a number, and is not."""
    return {"code": f"{(int(code_of(stand_in, number)) + 1) % 10**6:06}"}


def verify(client: WsgiClient, stand_in: Provider, number: str = NUMBER) -> None:
    code = code_of(stand_in, number)
    assert client.call("/sms/verify_code", {"code": code}).status == 200


def test_a_right_code_pays_its_round_back(client: From, stand_in: Provider) -> None:
    """Every message since the last right code, and 0.3 more once; hour and address' share stay."""
    strangers = client.at(HERE)
    assert strangers.ask(OTHER).status == 200  # so that 0.3 more can be seen
    assert client.at(HERE).ask("+447700900998").status == 200
    one = client.at(HERE)
    for _ in range(2):
        assert one.ask().status == 200
    four = dict.fromkeys("apqdh", 4.0)
    assert levels(client) == four | {"n": 2, "f": 2}
    assert one.call("/sms/verify_code", {"code": WRONG}).errno == 105
    assert levels(client) == four | {"n": 2, "f": 2}
    verify(one, stand_in)
    rest = {"a": 1.7, "p": 1.7, "q": 1.7, "d": 1.7, "h": 4.0, "n": 0.0, "f": 2.0}
    assert levels(client) == rest
    assert one.call("/sms/verify_code", {"code": code_of(stand_in)}).errno == 111
    assert levels(client) == rest
    assert one.ask().status == 200  # another round
    verify(one, stand_in)
    assert levels(client) == rest | {"h": 5.0, "f": 3.0}  # without 0.3


def test_only_the_round_of_the_session_is_paid_back(client: From, stand_in: Provider) -> None:
    one, two = client.at(HERE), client.at(HERE)
    assert one.ask(NUMBER).status == two.ask(OTHER).status == 200
    verify(two, stand_in, OTHER)
    held = levels(client)
    assert (held["n"], held["a"]) == (1.0, 0.7)
    assert levels(client, OTHER)["n"] == 0.0


def test_who_holds_a_phone_gets_ten_messages_a_day(client: From, stand_in: Provider) -> None:
    """Five are paid back to the number, and no more; from many addresses, or it would be three."""
    for n in range(12):
        one = client.at(f"192.0.2.{n}")
        answer = one.ask()
        if n == 10:
            assert named(answer, 115, "sends_per_number") == 17_280
            break
        assert answer.status == 200, n
        verify(one, stand_in)
    assert level(client, "n", NUMBER) == 5.0


def test_what_converts_is_never_refused(client: From, stand_in: Provider) -> None:
    """Ten of thirteen are verified (77 %), three times as many as each unverified budget holds."""
    for n in range(150):
        one, number = client.at("" if n % 2 else f"192.0.{n}.1"), f"+44770091{n % 30:04}"
        client.gateway.clock.now_s += 3600  # type: ignore  # the hour and the numbers refill
        assert one.ask(number).status == 200, n
        if n % 13 < 10:
            verify(one, stand_in, number)


def test_the_store_fails_when_it_should_pay_back(
    client: From, stand_in: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is verified all the same, and it is tried again."""
    one, run, failed = client.at(HERE), client.gateway.storage.limit, threading.Event()
    assert one.ask().status == 200

    def away(script: str, *args: Any) -> Any:
        if script is gateway.PAY_BACK_SCRIPT and not failed.is_set():
            failed.set()
            raise gateway.Unavailable("gone")
        return run(script, *args)

    monkeypatch.setattr(client.gateway.storage, "limit", away)
    verify(one, stand_in)
    assert failed.is_set()
    servers.wait_for(lambda: levels(client)["a"] == 0.0, "the pay-back")


# -- What is given back -------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "errno", "left"),
    [("5", 201, ""), ("3", 107, "aqf")],  # failed; refused for good
)
def test_what_surely_did_not_leave_is_given_back(
    client: From, stand_in: Provider, status: str, errno: int, left: str
) -> None:
    """But what an address asked for stays counted there, if the number can get no SMS."""
    stand_in.answer = sms.nexmo(status)
    one = client.at(HERE)
    for n in range(3):
        assert one.ask().errno == errno
        assert levels(client) == {row: float((n + 1) * (row in left)) for row in "anpqdfh"}
    if left:
        stand_in.answer = sms.taken
        named(one.ask(), 115, "sends_per_number_from_address")


def test_providers_that_fail_over(
    make_client: Client, paid: dict[str, Any], stand_in: Provider
) -> None:
    """Each paid attempt takes from hour and money, and gives that back if it surely failed."""
    with Provider(sms.nexmo("5")) as failing, Provider(sms.reply("", 504)) as unknown:
        providers = [failing.nexmo(), unknown.nexmo(), stand_in.nexmo()]
        entries = [{**entry, "priority": -n} for n, entry in enumerate(providers)]
        settings = paid | DEFAULTS | {"sms_providers": entries, "sms_price": {"*": 1.0}}
        client = From(make_client(clock=Clock(), **settings).app)
        one = client.at(HERE)
        assert one.ask().status == 200
        assert levels(client) == dict.fromkeys("anpqdf", 1.0) | {"h": 2.0}
        assert level(client, "m", "") == 2.0
        assert len(failing.received) == len(unknown.received) == len(stand_in.received) == 1
        verify(one, stand_in)
        assert levels(client) == dict.fromkeys("anpqd", 0.0) | {"f": 1.0, "h": 2.0}


def test_the_price_of_a_destination(make_client: Client, paid: dict[str, Any]) -> None:
    """Its own entry by region or calling code, else ``*`` times its multiplier."""
    settings = gateway.Settings(sms_price={"*": 0.05, "FR": 0.2, "4479": 0.7})

    def price(number: str, region: str) -> float:
        return gateway.price_of(settings, number, region)

    assert price(NUMBER, "GB") == 0.05
    assert price("+447911123456", "GB") == 0.7
    assert price("+33612345678", "FR") == 0.2
    assert price("+4917112345678", "DE") == 0.05 * 4
    assert price("+12425550123", "BS") == 0.05 * 2  # the longer code counts
    assert price("+12025550123", "US") == 0.05
    assert price("+99999999999", "") == 0.05 * 4  # unknown: as much as the dearest


# -- Fairness -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"unverified_per_destination": {"*": "6/day"}}, "unverified_per_destination"),
        ({"sends_per_hour": 6}, "sends_per_hour"),
    ],
)
def test_from_half_on_only_who_has_nothing_outstanding(
    make_client: Client, paid: dict[str, Any], stand_in: Provider, settings: dict[str, Any],
    name: str,
) -> None:  # fmt: skip
    clock = Clock()
    wide = WIDE | {"unverified_per_address": "10/day"}
    client = From(make_client(clock=clock, **paid | wide | settings).app)
    asking = client.at(HERE)
    for n in range(3):
        assert asking.ask(f"+44770091{n}123").status == 200
        asking = client.at(HERE)
    wait_s = named(asking.ask(), 116, name)
    half_s = (86400 if "destination" in name else 3600) / 6
    assert wait_s == min(half_s, 3 * 8640)
    other = client.at(THERE)
    assert other.ask().status == 200  # has nothing outstanding
    assert named(other.call("/sms/resend_code"), 116, name) > 0
    verify(other, stand_in)
    assert other.call("/sms/resend_code").status == 200  # verified, and so at rest
    for n in range(6):
        answer = client.at(f"192.0.2.{n}").ask()
        if answer.status == 429:
            break
    assert named(answer, 116, name) <= half_s
    clock.now_s += named(asking.ask(), 116, name)
    assert asking.ask().status == 200


def test_one_address_closes_nothing_to_others(client: From, stand_in: Provider) -> None:
    """CONTRACT §7, "must add up to" 2, for a day: it asks for whatever it may, as soon as it may.

    An honest user every hour, at an address of their own, asks twice (the first got lost) for a
    number in the very prefix that is attacked. The attacker holds four phones.
    """
    clock, refusals = client.gateway.clock, 0
    phones = [f"+4477009000{n:02}" for n in range(4)]
    for hour in range(30):
        attacker = client.at(HERE)
        for n in range(20):
            number = phones[n] if n < 4 else f"+44770090{n % 10}{hour:03}"
            answer = attacker.ask(number)
            if answer.status == 200 and number in phones:
                verify(attacker, stand_in, number)
            refusals += answer.status == 429
            attacker = client.at(HERE)
        number = f"+44770090{hour % 10}9{hour:02}"
        honest = client.at(f"192.0.2.{hour}")
        for _ in range(2):
            assert honest.ask(number).status == 200, hour
        verify(honest, stand_in, number)
        clock.now_s += 3600  # type: ignore
    assert refusals > 400


@pytest.mark.parametrize(("a_day", "spared"), [(24, True), (200, False)])
def test_who_is_not_attacked_is_spared_up_to_half(
    make_client: Client, paid: dict[str, Any], stand_in: Provider, a_day: int, spared: bool
) -> None:
    """CONTRACT §7, "must add up to" 4, for a day in which two countries are attacked.

    What nobody verifies there is just below half of the hour (48 of 100) and of the day's money
    (9.6 of 20). The honest user of each hour asks twice, for the first message got lost. Beyond
    half, which the start warns of, the same attack reaches them: else this test would show nothing.
    """
    there = dict.fromkeys(("FR", "ES"), f"{a_day}/day")
    budgets = {"unverified_per_destination": {"*": "50/day"} | there}
    prices = {"sms_price": {"*": 0.05, "FR": 0.2, "ES": 0.2}, "spend_per_day": 20.0}
    client = From(make_client(clock=Clock(), **paid | DEFAULTS | budgets | prices).app)
    refused_there, statuses = 0, [0]
    for hour in range(25):
        for n in range(60 if hour == 0 else 6):
            for code in ("33", "34"):
                number, address = f"+{code}6{hour:02}{n:02}1234", f"198.18.{hour}.{n}"
                refused_there += client.at(address).ask(number).status == 429
        number, honest = f"+4477009{hour:02}123", client.at(f"192.0.2.{hour}")
        statuses = [honest.ask(number).status for _ in range(2)]
        if statuses != [200, 200]:
            break
        verify(honest, stand_in, number)
        client.gateway.clock.now_s += 3600  # type: ignore
    assert refused_there > 10
    assert statuses == [200, 200] if spared else 429 in statuses


def test_guesses_cost_messages(client: From, stand_in: Provider) -> None:
    """CONTRACT §7, "must add up to" 1: at most 3 for each message that was sent to the number."""
    guesses = 0
    for n in range(40):
        one = client.at(f"192.0.2.{n}")
        one.ask()
        for _ in range(9):
            guesses += one.call("/sms/verify_code", {"code": WRONG}).errno == 105
    assert len(stand_in.received) == 5
    assert guesses == 15


# -- Record, off, reports -----------------------------------------------------


def tally(client: WsgiClient, outcome: str) -> dict[str, int]:
    """What the store counted for reports, by region and by prefix."""
    run = client.gateway.storage._run
    pairs = run("HGETALL", "{limits}" + outcome)
    pairs += run("ZRANGE", "{limits}" + outcome + " by prefix", 0, -1, "WITHSCORES")
    return {name.decode(): int(n) for name, n in zip(pairs[::2], pairs[1::2], strict=True)}


def test_reports(client: From, stand_in: Provider) -> None:
    one = client.at(HERE)
    for _ in range(5):
        one.ask()
    verify(one, stand_in)
    stand_in.answer = sms.nexmo("5")
    client.at(THERE).ask("+33612345678")
    assert tally(client, "sent") == {"GB": 3, "+44770090": 3, "FR": 0, "+3361234": 0}
    assert tally(client, "verified") == {"GB": 3, "+44770090": 3}
    refusals = {"GB f": 2, "+44770090": 2}
    assert tally(client, "refused") == refusals
    assert tally(client, "would be refused") == {}


def test_reports_by_prefix_are_bounded(make_client: Client) -> None:
    """1,000 prefixes; one with many messages is among them, whatever came before and after."""
    client = make_client(sends_per_hour=10**6)
    limits, run = client.gateway.limits, client.gateway.storage._run
    for n in range(3000):
        prefix = "+44770090" if 1000 < n < 1050 else f"+4479{n:04}"
        taken = (b"a", b"-", b"m", b"")
        limits.take(limits.counters({"h": ""}), ("GB", prefix), b"{limits}s", taken)
    assert run("ZCARD", "{limits}sent by prefix") == 1000
    assert 49 <= tally(client, "sent")["+44770090"] <= 60
    assert tally(client, "sent")["GB"] == 3000
    assert 86_000 < run("TTL", "{limits}sent by prefix") <= 86_400


def test_record_refuses_nothing(
    make_client: Client, paid: dict[str, Any], stand_in: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    """It reports what would have been refused, and takes nothing for that."""
    small = {"limits": "record", "sends_per_number": "2/day", "resend_gaps_s": [30]}
    client = From(make_client(clock=Clock(), **paid | DEFAULTS | small).app)
    caplog.set_level(logging.INFO, "gateway")
    for n in range(5):
        assert client.at(f"192.0.2.{n}").ask().status == 200
    assert len(stand_in.received) == 5
    assert level(client, "n", NUMBER) == level(client, "h", "") == 2.0
    assert tally(client, "would be refused") == {"GB n": 3, "+44770090": 3}
    assert tally(client, "refused") == {}
    assert caplog.text.count("limits: sends_per_number would refuse a request") == 3
    one = client.at(THERE)
    for path in ("/sms/verify", "/sms/mt/verify") * 4:  # no gap either, nor an end
        assert one.call(path, {"msisdn": OTHER}).status in (200, 204)
    assert "limits: resend_gaps_s would refuse a request" in caplog.text
    verify(one, stand_in, OTHER)
    for _ in range(99):
        assert client.call("/register", signed=False).status == 200


def test_off_counts_nothing(make_client: Client, paid: dict[str, Any], stand_in: Provider) -> None:
    """Nor is anything a double click."""
    settings = {"limits": "off", "resend_gaps_s": [30, 60], "sends_per_session": 2}
    client = From(make_client(clock=Clock(), **paid | DEFAULTS | settings).app)
    one = client.at(HERE)
    for _ in range(9):
        assert one.ask().status == 200
    assert len(stand_in.received) == 9
    verify(one, stand_in)
    assert content(client.gateway.storage, b"{limits}") == {}


def test_warnings_of_shared_budgets(
    make_client: Client, paid: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """At 50, 80 and 100 %, once each, by whichever worker comes to it."""
    limits = {"sends_per_hour": 10, "spend_per_day": 1.0, "sms_price": {"*": 0.05}}
    settings = paid | WIDE | limits | {"unverified_per_destination": {"*": "20/day"}}
    clock = Clock()
    clients = [From(make_client(clock=clock, **settings).app) for _ in range(2)]
    for n in range(14):
        clients[n % 2].at(f"192.0.2.{n}").ask()
    assert [line for line in caplog.messages if line.startswith("limits: ")] == [
        "limits: 50 % of sends_per_hour are used, now for GB",
        "limits: 80 % of sends_per_hour are used, now for GB",
        "limits: 50 % of unverified_per_destination are used, now for GB",
        "limits: 100 % of sends_per_hour are used, now for GB",
        "limits: 50 % of spend_per_day are used, now for GB",
    ]


# -- The store ----------------------------------------------------------------


def test_no_byte_of_the_store_shows_a_number_or_an_address(
    client: From, stand_in: Provider, tmp_path: Path
) -> None:
    """All keys and values, as they are and in hex; prefixes in the reports are no numbers."""
    for address in (HERE, "2001:db8:12:3456::7"):
        one = client.at(address)
        for _ in range(4):
            one.ask()
        client.at(address).ask("+33612345678")
    verify(one, stand_in)
    everything = content(client.gateway.storage)
    assert len([key for key in everything if key.startswith(b"{limits}")]) > 20
    dump = repr(everything).encode() + b"".join(
        part if isinstance(part, bytes) else repr(part).encode()
        for key, value in everything.items()
        for part in (key, *(value if isinstance(value, list) else [value]))
    )
    secrets = [NUMBER[1:], "33612345678", HERE, "2001:db8", "2001:0db8", "20010db8", "12:3456"]
    secrets += [number[-6:] for number in (NUMBER, "+33612345678")]
    packed = [int(NUMBER[1:]).to_bytes(8, "big").lstrip(b"\0"), bytes([198, 51, 100, 7])]
    for secret in [*map(str.encode, secrets), *packed, *(one.hex().encode() for one in packed)]:
        assert secret not in dump
    for letter in "anpqdfhmsbr":  # and each kind of key is of the same form
        keys = [key for key in everything if key.startswith(b"{limits}" + letter.encode())]
        assert all(len(key) == 20 or key[20:] in (b"50", b"80", b"100") or letter == "s"
                   or letter == "r" for key in keys)  # fmt: skip


def test_memory_of_the_counters(client: From, stand_in: Provider) -> None:
    """What the docstring of ``Counter`` says, by the server's own word."""
    run = client.gateway.storage._run
    one = client.at(HERE)
    one.ask()
    counters = client.gateway.limits.message(gateway.Msisdn(NUMBER), "GB", HERE)
    each = [run("MEMORY", "USAGE", counter.key) for counter in counters]
    assert len(each) == 8
    assert max(each) <= 88, each
    (session,) = [key for key in run("KEYS", "{limits}s*") if len(key) == 20]
    first = run("MEMORY", "USAGE", session)
    assert first <= 176
    for _ in range(2):
        one.ask()
    assert run("MEMORY", "USAGE", session) - first <= 2 * 120


def test_a_full_store_takes_no_counts(
    make_client: Client, paid: dict[str, Any], stand_in: Provider, tmp_path: Path
) -> None:
    """Sending is refused within a second; what was sent is verified, and paid back all the same.

    ``test_failover`` shows it with real processes, and with a node that is away.
    """
    store = gateway.EmbeddedStore(str(tmp_path / "s"))
    try:
        settings = make_client(**paid | DEFAULTS).app.settings
        client = From(gateway.create_app(settings, store.url))
        one, two, three = client.at(HERE), client.at(HERE), client.at(THERE)
        assert one.ask().status == 200
        storage = client.gateway.storage
        storage._run("CONFIG", "SET", "maxmemory", "1")
        for asking in (two, three):
            servers.assert_refused(partial(asking.ask, OTHER))
        assert len(stand_in.received) == 1
        verify(one, stand_in)
        key = gateway.public_key_json(gateway.generate_key("RS256").public_key())
        assert one.call("/certificate/sign", {"publicKey": key}).status == 200
        storage._run("CONFIG", "SET", "maxmemory", "0")
        assert levels(client)["a"] == 0.0
        assert two.ask(OTHER).status == 200
    finally:
        store.stop()


# -- The bill -----------------------------------------------------------------


def test_the_bill(capsys: pytest.CaptureFixture[str]) -> None:
    """What binds each line, by sums made by hand."""
    settings = gateway.Settings(
        sends_per_hour=100, spend_per_day=20.0, sms_price={"*": 0.05, "FR": 0.1, "GB": 0.02},
        unverified_per_destination={"*": "50/day", "GB": "500/day", "FR": "1/hour"},
    )  # fmt: skip
    gateway.bill(settings)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["to", "price", "hour", "first", "day", "day", "month", "bounded", "by"]
    bills = {line.split()[0]: line.split()[1:] for line in lines}
    month = f"{20 * 31:.2f}"
    assert bills["everywhere"] == ["0.200", "20.83", "40.00", "20.00", month, "spend_per_day"]
    # An hour at 0.02: 200 messages; a day of 500 messages a day: 20, then 10.
    gb = ["0.020", "4.00", "20.00", "10.00", "310.00"]
    assert bills["GB"] == [*gb, "sends_per_hour,", "unverified_per_destination"]
    fr = ["0.100", "0.20", "2.50", "2.40", "72.10", "unverified_per_destination"]
    assert bills["FR"] == fr
    assert len(bills) > 200


def test_a_day_costs_what_the_bill_says(
    make_client: Client, paid: dict[str, Any], stand_in: Provider
) -> None:
    """A hundred addresses for a first day, with providers that fail over: money up to the line."""
    with Provider(sms.reply("", 504)) as unknown:
        entries = [{**unknown.nexmo(), "priority": 1}, stand_in.nexmo()]
        money = {"spend_per_day": 2.0, "sms_price": {"*": 0.1}, "sms_providers": entries}
        client = From(make_client(clock=Clock(), **paid | WIDE | money).app)
        for n in range(100):
            for _ in range(2):
                client.at(f"192.0.2.{n}").ask(f"+44770{n:02}90{n:03}")
            client.gateway.clock.now_s += 864  # type: ignore
        spent = 0.1 * (len(unknown.received) + len(stand_in.received))
        assert 3.8 < spent <= 4.0 + 1e-9


def test_the_page_says_what_the_gateway_does(capsys: pytest.CaptureFixture[str]) -> None:
    """``operate/limits.md``: the setting, default, errno and letter of each row; the bill."""
    page = (ROOT / "notebooks/operate/limits.md").read_text("utf-8")
    setting, shown = "", set()
    for line in re.findall(r"^\|(.*)\|$", page.partition("## What it can cost")[0], re.M)[2:]:
        first, default, _, errno, row = (cell.strip(" `") for cell in line.split("|"))
        setting = first or setting
        if row:
            value = getattr(gateway.Settings(), setting)
            text = value if isinstance(value, str) else json.dumps(value)
            assert default == text or row == "q"
            shown.add((setting, row, int(errno)))
    assert shown == {(one.setting, one.row, one.refusal.errno) for one in gateway.LIMITS}
    command, bill = re.findall(r"^\$ python gateway.py (.*)\n((?:.*\n)*?)```", page, re.M)[0]
    assert gateway.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == bill


def test_the_start_says_the_bill(start_gateway: Any, stand_in: Provider) -> None:
    """And warns, while one attacked country after the other can use up what others need."""
    providers = json.dumps([stand_in.nexmo()])
    output = start_gateway("--sms-providers", providers, "--spend-per-day", "20.0").output
    assert "  bill at most hour 20.83, first day 40.00, day 20.00, month 620.00" in output
    assert "unverified_per_destination: what all countries may get" in output
