"""Where two parts meet: block list, limits, proofs, the phone's own SMS, slow providers.

Each test is of a question that neither part's own tests ask.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import provider as sms
import pytest
import servers
from provider import Provider
from support import AT_ONCE, NUMBER, Answer, Clock, WsgiClient
from test_limit_table import (
    DEFAULTS,
    ELSEWHERE,
    HERE,
    OTHER,
    THERE,
    From,
    content,
    level,
    levels,
    named,
)
from test_proofs import AUDIENCE, public

import gateway

Make = Callable[..., WsgiClient]
WEBHOOK = {"kind": "nexmo", "path_secret": "s"}
SENT = {b"anpqdfhms"[n : n + 1] for n in range(9)}
"""The rows that a message is counted in, and the list of its session."""


@pytest.fixture
def stand_in() -> Iterator[Provider]:
    """A provider that takes every message."""
    with Provider(sms.taken) as provider:
        yield provider


@pytest.fixture
def make(make_client: Make, stand_in: Provider) -> Callable[..., From]:
    """A client of a gateway that pays for messages, within the default limits but without gaps."""

    def build(**options: Any) -> From:
        usual = {"clock": Clock(), "sms_providers": [stand_in.nexmo()], "sms_inbound": [WEBHOOK]}
        return From(make_client(**{**usual, **DEFAULTS, "resend_gaps_s": AT_ONCE, **options}).app)

    return build


def counted(client: WsgiClient) -> dict[bytes, Any]:
    """All that limits count of messages."""
    found = content(client.gateway.storage, b"{limits}")
    return {key: value for key, value in found.items() if len(key) == 20 and key[8:9] in SENT}


def later(client: WsgiClient, seconds: float) -> None:
    """Let time pass."""
    client.gateway.clock.now_s += seconds  # type: ignore[attr-defined]


def by_phone(client: WsgiClient, message_id: str, number: str = NUMBER, text: str = "") -> Answer:
    """The provider delivers an SMS that a phone has sent for this session."""
    assert client.credentials
    fields = {"msisdn": number[1:], "text": text or client.credentials.hawk_id}
    query = urlencode({"provider": "nexmo", **fields, "messageId": message_id})
    return client.get(f"/sms/momt/s?{query}")


def verify(client: WsgiClient, stand_in: Provider, at: int = -1) -> Answer:
    """Return a code that was sent to the number, by default the newest."""
    code = stand_in.texts()[NUMBER][at].split()[-1]
    answer = client.call("/sms/verify_code", {"code": code})
    assert answer.status == 200
    return answer


def block(client: WsgiClient, number: str = NUMBER) -> None:
    """What the command does."""
    key = client.gateway.secrets.key_for("blocked", gateway.Msisdn(number))
    client.gateway.storage.create(key, b"", 0)


# -- The block list and limits --------------------------------------------------


@pytest.mark.parametrize("limits", ["enforce", "record", "off"])
def test_a_blocked_number_is_refused_before_anything_is_counted(
    make: Callable[..., From], stand_in: Provider, limits: str
) -> None:
    """By every way to ask, also in a session that had a message before, and whatever is left."""
    client = make(limits=limits, sends_per_number="2/day")
    one, fresh, phone = client.at(HERE), client.at(HERE), client.at(HERE)
    assert one.ask().status == 200
    assert client.at(THERE).ask().status == 200  # and now the number's day is used up
    before, left = counted(client), one.call("/session", method="GET").json["next"]
    block(client)
    for session in (one, fresh):
        for path in ("/sms/verify", "/sms/mt/verify"):
            answer = session.call(path, {"msisdn": NUMBER})
            assert (answer.status, answer.errno) == (400, 107)
    assert one.call("/sms/resend_code").errno == 107
    assert by_phone(phone, "0A01").json == {}
    assert counted(client) == before
    assert one.call("/session", method="GET").json["next"] == left
    assert fresh.call("/session", method="GET").json["next"]["sendsLeft"] == 5
    assert len(stand_in.received) == 2
    assert verify(one, stand_in, 0).json == {"msisdn": NUMBER}  # what it has got is good


def test_a_limit_says_what_comes_next(make: Callable[..., From]) -> None:
    """The number's day is used up by others, so nothing of this session is."""
    client = make(sends_per_number="1/day")
    assert client.at(THERE).ask().status == 200
    one = client.at(HERE)
    answer = one.ask()
    wait_s = named(answer, 115, "sends_per_number")
    told = {"sendsLeft": 5, "triesLeft": 0, "expiresIn": 0, "verified": False}
    assert answer.json["next"] == told | {"resendIn": wait_s}
    assert one.ask(OTHER).status == 200  # it is not bound to the number either


# -- Limits that only record, or are off ------------------------------------------


@pytest.mark.parametrize(("limits", "sent"), [("enforce", 2), ("record", 3), ("off", 7)])
def test_gaps_and_double_clicks_by_mode(
    make: Callable[..., From], stand_in: Provider, caplog: pytest.LogCaptureFixture,
    limits: str, sent: int,
) -> None:  # fmt: skip
    """A double click is no refusal, so ``record`` knows it; with ``off`` there is none."""
    caplog.set_level(logging.INFO, "gateway")
    one = make(limits=limits, resend_gaps_s=[30, 60]).at(HERE)
    statuses = []
    for passed_s in (0, 1, 28, 2, 1, 28, 2):  # the messages are those at 0, 31 and 62 s
        later(one, passed_s)
        statuses.append(one.ask().status)
    refused = [429] if limits == "enforce" else [200]
    assert statuses == [200] * 6 + refused
    assert len(stand_in.received) == sent
    reports = caplog.text.count("limits: resend_gaps_s would refuse a request")
    assert reports == (limits == "record")


@pytest.mark.parametrize("limits", ["record", "off"])
def test_a_session_that_nothing_stops_is_told_so(make: Callable[..., From], limits: str) -> None:
    """A client that obeys ``sendsLeft`` would refuse itself; the record has one byte for it."""
    client = make(limits=limits)
    settings, now_s = client.gateway.settings, int(client.gateway.clock())
    user = gateway.User(b"k" * 32, b"s" * 24, sends=254, asked_s=now_s - 1, masked=True)
    ask = gateway.Ask(gateway.Msisdn(NUMBER), "GB", user.sealed, gateway.Network(), long=True)
    for ticket in range(3):
        user = gateway.reserve(user._replace(sending=False), ask, ticket, settings, now_s) or user
        assert gateway.User.unpack(user.pack()) == user
    assert (user.sends, user.ticket) == (255 if limits == "record" else 1, 2)  # off counts nothing
    one = client.at(HERE)
    for n, left in enumerate((4, 3, 2, 1, 1, 1) if limits == "record" else (5, 5, 5, 5, 5, 5)):
        answer = one.call("/sms/resend_code") if n else one.ask()
        assert (answer.status, answer.json["next"]["sendsLeft"]) == (200, left)
        later(one, 31)


# -- IPv6 -------------------------------------------------------------------------


def test_what_an_ipv6_address_counts_as_by_limit(make: Callable[..., From]) -> None:
    """Its /56 for what is outstanding; at least its /64 for the messages to one number."""
    near, same_56, beyond = "2001:db8:0:100::1", "2001:db8:0:1ff::2", "2001:db8:0:200::1"
    client = make(unverified_per_address="2/minute", sends_per_number_from_address="1/minute")
    assert client.at(near).ask().status == 200
    named(client.at("2001:db8:0:100:ffff::7").ask(), 115, "sends_per_number_from_address")
    assert client.at(same_56).ask(ELSEWHERE).status == 200
    named(client.at("2001:db8:0:1aa::3").ask(OTHER), 117, "unverified_per_address")
    assert client.at(beyond).ask(OTHER).status == 200


def test_sessions_by_ipv6(make: Callable[..., From]) -> None:
    """Of its /64; an IPv4 address in IPv6 is that address."""
    few = make(registers_per_address="2/minute")
    for address, status in (
        ("2001:db8::1", 200), ("2001:db8::2", 200), ("2001:db8::a:0:0:3", 429),
        ("2001:db8:0:1::1", 200),
        ("::ffff:" + HERE, 200), (HERE, 200), ("::ffff:" + HERE, 429),
    ):  # fmt: skip
        few.address = address
        assert few.call("/register", signed=False).status == status, address


# -- The phone's own SMS -----------------------------------------------------------


def test_answers_to_a_phone_cost_no_more_than_its_number_may(
    make: Callable[..., From], stand_in: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever forges its number opens sessions without end; no row is of the provider's address."""
    caplog.set_level(logging.INFO, "gateway")
    client = make()
    for n in range(12):
        answer = by_phone(client.at(THERE), f"0A{n}")
        assert (answer.status, answer.json) == (200, {})  # never an error: it would come again
    assert len(stand_in.received) == 5
    assert caplog.text.count("was not used: errno 115: sends_per_number") == 7
    assert {key[8:9] for key in counted(client)} == {b"n", b"p", b"d", b"h", b"m", b"s"}


def test_a_phone_draws_on_both_halves_of_a_shared_budget(
    make: Callable[..., From], stand_in: Provider
) -> None:
    """Its SMS was paid for, so it counts like an address that has nothing outstanding."""
    client = make(unverified_per_destination={"*": "4/day"})
    for n in range(2):
        assert client.at(HERE).ask(f"+44770091{n}123").status == 200
    named(client.at(HERE).ask(), 116, "unverified_per_destination")
    assert by_phone(client.at(HERE), "0A01").status == 200
    assert len(stand_in.received) == 3


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_an_sms_that_could_not_be_counted_is_delivered_again_and_counts_once(
    make: Callable[..., From], stand_in: Provider, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """The store did not answer the limits' script: nobody knows whether it ran."""
    client = make()
    one, run, failed = client.at(HERE), client.gateway.storage.limit, threading.Event()

    def away(script: str, *args: Any) -> Any:
        if script is gateway.TAKE_SCRIPT and not failed.is_set():
            failed.set()
            if done:
                run(script, *args)
            raise gateway.Unavailable("gone")
        return run(script, *args)

    monkeypatch.setattr(client.gateway.storage, "limit", away)
    answer = by_phone(one, "0A01")
    assert (answer.status, answer.errno) == (503, 201)  # so that it comes again
    assert stand_in.received == []
    servers.wait_for(lambda: level(client, "n", NUMBER) == 0, "what was counted is given back")
    for _ in range(3):
        later(one, 100)
        assert by_phone(one, "0A01").status == 200
    assert len(stand_in.received) == 1
    assert 0.9 < level(client, "n", NUMBER) <= 1


def test_receipts_and_parts_cost_nothing_and_stay_for_a_day_at_most(
    make: Callable[..., From], stand_in: Provider
) -> None:
    """Whoever can call the webhook: no message leaves, no counter moves, nothing stays for ever."""
    client = make()
    one = client.at(HERE)
    storage, before = client.gateway.storage, content(client.gateway.storage)
    for n in range(30):
        query = urlencode({"provider": "nexmo", "messageId": f"0A{n}", "status": "delivered"})
        assert client.get("/sms/receipt/s?" + query).status == 200
        assert by_phone(one, f"0B{n}", text="hello").status == 200
        part = {"concat-ref": str(n), "concat-part": "1", "concat-total": "10"}
        fields = {"provider": "nexmo", "msisdn": NUMBER[1:], "text": "x" * 9000, **part}
        assert client.get("/sms/momt/s?" + urlencode(fields)).status == 200
    after = content(storage)
    added = after.keys() - before.keys()
    assert len(added) == 30  # the parts alone
    (mine,) = [key for key in before if not key.startswith(b"{limits}r")]  # that dies by itself
    assert after[mine] == before[mine]
    assert not any(key.startswith(b"{limits}") for key in added)
    assert all(0 < storage._run("TTL", key) <= 86_400 for key in added)
    assert max(storage._run("MEMORY", "USAGE", key) for key in added) < 700
    assert stand_in.received == []


# -- Providers that say "slower", or fail over --------------------------------------


def test_a_provider_that_stays_slow_costs_nothing(
    make: Callable[..., From], stand_in: Provider
) -> None:
    """All is given back, and the client is told when it is worth it."""
    stand_in.answer = sms.slower(30)
    one = make().at(HERE)
    answer = one.ask()
    assert (answer.status, answer.errno) == (503, 201)
    assert 25 < answer.json["retryAfter"] < 40
    told = {"resendIn": 0, "sendsLeft": 5, "triesLeft": 0, "expiresIn": 0, "verified": False}
    assert answer.json["next"] == told
    assert levels(one) == dict.fromkeys("anpqdfh", 0.0)
    assert level(one, "m", "") == 0.0


def test_a_slow_provider_that_others_stand_in_for_is_not_paid(
    make: Callable[..., From], stand_in: Provider
) -> None:
    """The message counts once, and so does its price; a right code pays it back."""
    with Provider(sms.slower(600)) as slow:
        one = make(sms_providers=[slow.nexmo(priority=1), stand_in.nexmo()]).at(HERE)
        assert one.ask().status == 200
        assert len(slow.received) == len(stand_in.received) == 1
        assert levels(one) == dict.fromkeys("anpqdfh", 1.0)
        assert level(one, "m", "") == 0.05
        verify(one, stand_in)
        assert levels(one) == dict.fromkeys("anpqd", 0.0) | {"f": 1.0, "h": 1.0}


@pytest.mark.slow
def test_what_a_session_may_while_its_message_waits_for_its_turn(
    make: Callable[..., From], stand_in: Provider
) -> None:
    """The provider said "slower": until it takes the message, the session has its reservation."""
    left = [sms.slower(2)]
    stand_in.answer = lambda handler: (left.pop() if left else sms.taken)(handler)
    one = make(resend_gaps_s=[30]).at(HERE)
    other = one.another()
    other.credentials = one.credentials
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(one.ask)
        servers.wait_for(lambda: len(stand_in.received) == 1, "the first try")
        assert other.ask().status == 200  # a double click
        long = other.call("/sms/mt/verify", {"msisdn": NUMBER})
        assert (long.errno, long.json["retryAfter"]) == (114, 1)
        code = other.call("/sms/verify_code", {"code": "000000"})
        assert (code.errno, code.json["retryAfter"]) == (201, 1)
        assert first.result().status == 200
    assert len(stand_in.received) == 2
    assert levels(one) == dict.fromkeys("anpqdfh", 1.0)
    assert verify(one, stand_in).json == {"msisdn": NUMBER}


@pytest.mark.parametrize(
    ("answer", "asked"), [(sms.reply("", 504), 0), (sms.nexmo("5"), 1)], ids=["unknown", "failed"]
)
def test_the_last_message_of_an_hour_and_providers_that_fail_over(
    make: Callable[..., From], stand_in: Provider, answer: Callable[[Any], None], asked: int
) -> None:
    """One that may have left has used the hour up, so nobody else is asked; it counts as sent."""
    with Provider(answer) as first:
        entries = [first.nexmo(priority=1), stand_in.nexmo()]
        one = make(sms_providers=entries, sends_per_hour=1).at(HERE)
        assert one.ask().status == 200
        assert (len(first.received), len(stand_in.received)) == (1, asked)
        assert levels(one) == dict.fromkeys("anpqdfh", 1.0)
        code = (stand_in if asked else first).texts()[NUMBER][-1].split()[-1]
        assert one.call("/sms/verify_code", {"code": code}).status == 200
        another: Any = one.another()
        named(another.at(THERE).ask(), 116, "sends_per_hour")


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
def test_a_further_attempt_that_could_not_be_counted_leaves_the_first_counted(
    make: Callable[..., From], stand_in: Provider, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """The first may have left; nobody knows whether the store counted the second, which did not."""
    with Provider(sms.reply("", 504)) as first:
        one = make(sms_providers=[first.nexmo(priority=1), stand_in.nexmo()]).at(HERE)
        run, taken = one.gateway.storage.limit, list[str]()

        def away(script: str, *args: Any) -> Any:
            taken.extend([script] * (script == gateway.TAKE_SCRIPT))
            if len(taken) == 2 and script == gateway.TAKE_SCRIPT:
                if done:
                    run(script, *args)
                raise gateway.Unavailable("gone")
            return run(script, *args)

        monkeypatch.setattr(one.gateway.storage, "limit", away)
        assert one.ask().status == 200
        assert (len(first.received), len(stand_in.received)) == (1, 0)
        servers.wait_for(lambda: level(one, "h", "") == 1, "the second attempt is given back")
        assert levels(one) == dict.fromkeys("anpqdfh", 1.0)


# -- /unregister of all sessions of a number -----------------------------------------


def proofs() -> dict[str, Any]:
    """What asks for each form of proof."""
    browserid = gateway.public_key_json(gateway.generate_key("RS256").public_key())
    return {
        "BrowserID": {"publicKey": browserid},
        "SD-JWT": {"publicKey": public("EC")},
        "JWT": {"format": "jwt", "audience": AUDIENCE},
        "JWT with cnf": {"format": "jwt", "audience": AUDIENCE, "publicKey": public("OKP")},
    }


@pytest.mark.parametrize("form", proofs())
def test_everywhere_ends_every_form_of_proof(
    make: Callable[..., From], stand_in: Provider, form: str
) -> None:
    """A new code brings them back, in one step too, and its round is paid back like any other."""
    body, client = proofs()[form], make()
    before, now = client.at(HERE), client.at(THERE)
    assert before.ask().status == 200
    verify(before, stand_in)
    later(client, 100)
    assert before.call("/certificate/sign", body).status == 200
    assert now.ask().status == 200
    verify(now, stand_in)
    assert now.call("/unregister", {"everywhere": True}).status == 204
    for _ in range(2):
        answer = before.call("/certificate/sign", body)
        assert (answer.errno, answer.json["next"]["verified"]) == (104, False)
    assert "msisdn" not in before.call("/session", method="GET").json
    later(client, 100)
    assert before.ask().status == 200
    code = {"code": stand_in.texts()[NUMBER][-1].split()[-1]}
    answer = before.call("/sms/verify_code", {**body, **code})
    assert (answer.status, answer.json.keys()) == (200, {"msisdn", "cert"})
    assert before.call("/certificate/sign", body).status == 200
    assert levels(client)["n"] == levels(client)["a"] == levels(client)["d"] == 0.0


def test_everywhere_asks_a_store_that_is_away_only_once(
    make: Callable[..., From], stand_in: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question to one that hangs takes 0.5 s, and the answer has a second."""
    one = make().at(HERE)
    assert one.ask().status == 200
    verify(one, stand_in)
    asked = []

    def away(*args: Any, **_: Any) -> Any:
        asked.append(args)
        raise gateway.Unavailable("gone")

    with monkeypatch.context() as broken:
        broken.setattr(one.gateway.storage, "create", away)
        broken.setattr(one.gateway.storage, "commit", away)
        answer = one.call("/unregister", {"everywhere": True})
    assert (answer.status, answer.errno) == (503, 201)
    assert len(asked) == 1
    assert one.call("/unregister", {"everywhere": True}).status == 204


def test_whoever_gives_back_does_not_change_how_the_request_is_answered(
    make: Callable[..., From], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RESERVE is done, but its answer is lost, and the thread that gives it back is very fast."""
    one = make().at(HERE)
    storage = one.gateway.storage
    commit, lost = storage.commit, [True]

    def losing(*args: Any, **more: Any) -> gateway.Commit:
        done = commit(*args, **more)
        if lost:
            lost.clear()
            raise gateway.Unavailable("timed out")
        return done

    monkeypatch.setattr(storage, "commit", losing)
    at_once = SimpleNamespace(submit=lambda do, *args: do(*args))
    monkeypatch.setattr(gateway, "_OWED", at_once)
    answer = one.ask()
    assert (answer.status, answer.errno) == (503, 201)
    assert one.ask().status == 200
