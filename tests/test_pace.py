"""A provider that says "slower": asked again, in order, at its pace; and never twice."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from provider import Provider, nexmo, reply, slower, taken
from servers import wait_for
from support import shared

import gateway

TO, OTHER = gateway.Msisdn("+447700900123"), gateway.Msisdn("+447700900456")


@pytest.fixture
def two() -> Iterator[list[Provider]]:
    """Two providers that take everything."""
    with Provider(taken) as first, Provider(taken) as second:
        yield [first, second]


def sender_of(*those: Provider, **settings: Any) -> gateway.SmsSender:
    entries = [one.nexmo(priority=-n) for n, one in enumerate(those)]
    return gateway.SmsSender(gateway.Settings(sms_providers=entries, **settings))


def in_turn(*answers: Callable[[Any], None]) -> Callable[[Any], None]:
    """One after another; then everything is taken."""
    left = list(answers)
    return lambda handler: (left.pop(0) if left else taken)(handler)


class Counted:
    """Stands for the counts of a message: how many there are, and were."""

    def __init__(self) -> None:
        self.used = self.given_back = 0

    def use(self) -> bytes:
        self.used += 1
        return b"name"

    def give_back(self, name: bytes) -> None:
        assert name == b"name"
        self.given_back += 1


@pytest.mark.parametrize("first", [nexmo("1"), reply("", 429), reply({"code": 20429}, 429)])
def test_it_is_asked_again_and_has_not_failed(two: list[Provider], first: Any) -> None:
    one, another = two
    sender, counts = sender_of(one, another), Counted()
    for to in (TO, OTHER):
        one.answer = in_turn(first, first)
        assert sender.send("Gateway", to, "text", payments=counts).kind == "nexmo"  # type: ignore[arg-type]
    assert [len(p.received) for p in two] == [6, 0]
    assert (sender.resting, sender._failed_for) == ({}, {})
    assert (counts.used, counts.given_back) == (2, 0)  # once each, and not for each try


def test_its_retry_after_is_kept(two: list[Provider]) -> None:
    """By the messages that come meanwhile, too."""
    one = two[0]
    one.answer = in_turn(slower(1))
    sender, begun_s = sender_of(one), time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sender.send, "Gateway", TO, "first")
        while not one.received:
            time.sleep(0.01)
        time.sleep(0.1)
        second = pool.submit(sender.send, "Gateway", OTHER, "second")
        assert [first.result().kind, second.result().kind] == ["nexmo", "nexmo"]
    assert 1 <= time.monotonic() - begun_s < 4 * shared()
    texts = [request.form["text"] for request in one.received]
    assert (texts[0], sorted(texts[1:])) == ("first", ["first", "second"])


def test_one_that_wants_to_be_left_alone_for_long_is_not_waited_for(two: list[Provider]) -> None:
    one, another = two
    one.answer = slower(600)
    sender, begun_s = sender_of(one, another), time.monotonic()
    for to in (TO, OTHER, TO):
        assert sender.send("Gateway", to, "text").kind == "nexmo"
    assert [len(p.received) for p in two] == [2, 3]
    assert time.monotonic() - begun_s < 3 * shared()


def test_nobody_takes_it(two: list[Provider]) -> None:
    """Then the client is told when it is worth it, and nothing stays counted."""
    for one in two:
        one.answer = slower(30)
    sender, counts = sender_of(*two), Counted()
    with pytest.raises(gateway.SmsThrottled) as caught:
        sender.send("Gateway", TO, "text", payments=counts)  # type: ignore[arg-type]
    assert 25 < caught.value.retry_after_s < 40
    assert (counts.used, counts.given_back) == (2, 2)
    error = gateway._not_sent(caught.value)
    assert (error.status, error.errno) == (503, 201)
    assert error.retry_after_s
    assert 25 < error.retry_after_s < 40


def test_a_message_waits_for_its_part_of_the_time(
    two: list[Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next provider has its chance; and all of it ends in time."""
    budget_s = 3.0 * shared()
    monkeypatch.setattr(gateway, "SEND_BUDGET_S", budget_s)
    one, another = two
    one.answer = nexmo("1")
    sender, begun_s = sender_of(one, another), time.monotonic()
    assert sender.send("Gateway", TO, "text").kind == "nexmo"
    assert budget_s / 3 < time.monotonic() - begun_s < budget_s - 0.1
    assert len(another.received) == 1
    assert 2 <= len(one.received) < 10 * budget_s / 3  # it is not pestered
    another.answer = nexmo("1")
    begun_s = time.monotonic()
    with pytest.raises(gateway.SmsThrottled):
        sender.send("Gateway", OTHER, "text")
    assert time.monotonic() - begun_s < budget_s + 0.5 * shared()


def test_what_came_first_leaves_first() -> None:
    """Also what was throttled: it goes back to its place, and not to the end."""
    pace, left, lock = gateway.Pace(), list[int](), threading.Lock()
    tries = dict.fromkeys(range(8), 0)

    def message(n: int) -> None:
        time.sleep(0.1 + n * 0.01)

        def send(_: float) -> None:
            with lock:
                tries[n] += 1
                if tries[n] == 1:
                    raise gateway.SmsThrottled("slower", 1.0 if n == 0 else 0.0)
                left.append(n)

        pace.send(send, time.monotonic() + 60, gateway.Msisdn(f"+44770090012{n}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(message, range(8)))
    assert sorted(left) == list(range(8))
    moved = [abs(place - n) for place, n in enumerate(left)]
    assert max(moved) <= 3 * shared()  # who is woken late is overtaken


def test_without_a_word_there_is_no_pace() -> None:
    """As fast as they come: 500 at once, and again after a time of throttling."""
    pace, done = gateway.Pace(), list[float]()
    for _ in range(2):
        begun_s = time.monotonic()
        with ThreadPoolExecutor(100) as pool:
            list(pool.map(lambda _: pace.send(done.append, time.monotonic() + 5, TO), range(500)))
        assert time.monotonic() - begun_s < 4 * shared()
    assert len(done) == 1000
    assert pace._line == []


def test_slower_for_one_number_holds_up_nobody_else(two: list[Provider]) -> None:
    """Anybody can name a number that a provider says it for; others are sent meanwhile."""
    one, _ = two

    def answer(handler: Any) -> None:
        (slower(60) if one.received[-1].form["to"] == TO.lstrip("+") else taken)(handler)

    one.answer = answer
    sender = sender_of(one)
    for _ in range(3):
        with pytest.raises(gateway.SmsThrottled) as caught:
            sender.send("Gateway", TO, "text")
        assert caught.value.retry_after_s == 60
        begun_s = time.monotonic()
        assert sender.send("Gateway", OTHER, "text").kind == "nexmo"
        assert time.monotonic() - begun_s < 1 * shared()


@pytest.mark.slow
def test_slower_for_two_numbers_makes_others_late_and_no_more(
    two: list[Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers can name two such numbers again and again, and their messages came first."""
    assert gateway._PACE_PAUSE_MAX_S < gateway.SEND_BUDGET_S - 1
    monkeypatch.setattr(gateway, "_PACE_PAUSE_MAX_S", 1.0)
    monkeypatch.setattr(gateway, "SEND_BUDGET_S", 4.0 * shared())
    one, honest, ended = two[0], gateway.Msisdn("+447700900789"), threading.Event()

    def answer(handler: Any) -> None:
        (taken if one.received[-1].form["to"] == honest.lstrip("+") else slower(60))(handler)

    def attack(to: gateway.Msisdn) -> None:
        while not ended.is_set():
            with contextlib.suppress(gateway.SmsThrottled):
                sender.send("Gateway", to, "text")
            time.sleep(0.1)

    one.answer = answer
    sender, took_s = sender_of(one), list[float]()
    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as stack:
        stack.callback(ended.set)
        attacks = [pool.submit(attack, to) for to in (TO, OTHER) for _ in range(2)]
        wait_for(lambda: len(sender._paces[0]._slow_for) == 2, "the pause")
        for _ in range(4):
            begun_s = time.monotonic()
            assert sender.send("Gateway", honest, "text").kind == "nexmo"
            took_s.append(time.monotonic() - begun_s)
    assert [attack.result() for attack in attacks] == [None] * 4
    assert took_s[0] > 0.5
    assert max(took_s) < 4 * shared()
