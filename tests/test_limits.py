"""How many messages a session may ask for, and how many the whole gateway sends."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl

import lab
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support import NUMBER, Answer, Clock, WsgiClient

import gateway

KEY = gateway.HawkKey(b"k" * 32)
START_S = 1_700_000_000


class Provider:
    """A local stand-in of the Vonage SMS API: takes messages, or refuses them."""

    def __init__(self) -> None:
        self.forms: list[dict[str, str]] = []
        self.status = "0"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        self.forms.append(dict(parse_qsl(body.decode())))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"messages": [{"status": self.status}]}).encode()]

    def code(self, to: str = NUMBER) -> str:
        """The code in the newest message to a number."""
        return [form["text"] for form in self.forms if form["to"] == to[1:]][-1].split()[-1]


@pytest.fixture
def provider() -> Provider:
    """The stand-in, to look into."""
    return Provider()


@pytest.fixture
def paid(provider: Provider) -> Iterator[dict[str, Any]]:
    """Settings that send through it."""
    with lab.serving(provider) as url:
        login = {"api_key": "k", "api_secret": "s"}
        yield {"sms_providers": [{"kind": "nexmo", "endpoint": f"{url}/sms/json", **login}]}


@pytest.fixture
def clock() -> Clock:
    """The gateway's clock."""
    return Clock(START_S)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For races of many threads on a busy machine: slow is not gone."""
    monkeypatch.setattr(gateway, "STORAGE_TIMEOUT_S", 20.0)


def refused(answer: Answer, errno: int) -> int:
    """Check a 429; its Retry-After (that it is in the body too, ``errno`` checks)."""
    assert (answer.status, answer.errno) == (429, errno)
    return int(answer.json["retryAfter"])


def records(client: WsgiClient) -> dict[bytes, bytes]:
    """Every session's record."""
    storage = client.gateway.storage
    return {key: storage._run("GET", key) for key in storage._run("KEYS", "?" * 16)}


def inbound(client: WsgiClient, sender: str = NUMBER, **fields: Any) -> Answer:
    """The phone sends its Hawk id."""
    assert client.credentials
    body = {"msisdn": sender[1:], "text": client.credentials.hawk_id, **fields}
    return client.call("/sms/momt/?provider=nexmo", body, signed=False)


# -- session_sends ------------------------------------------------------------

SETTINGS = gateway.Settings(sends_per_session=3, session_ttl_s=1000, code_ttl_s=60)


def asked(sends: int, last_s: int = START_S) -> gateway.User:
    """A session that has asked for messages, the last one at a time."""
    return gateway.User(KEY, sends=sends, code_expires_s=last_s + 60 if sends else 0)


@pytest.mark.parametrize("sends", [0, 1, 2])
@pytest.mark.parametrize("later_s", [0, 59, 999])
def test_what_is_left_of_the_allowance(sends: int, later_s: int) -> None:
    assert gateway.session_sends(asked(sends), SETTINGS, START_S + later_s) == sends


@pytest.mark.parametrize("sends", [3, 4, 255])
@pytest.mark.parametrize(
    ("later_s", "wait_s"), [(0, 1000), (1, 999), (60, 940), (600, 400), (999, 1)]
)
def test_used_up_allowance(sends: int, later_s: int, wait_s: int) -> None:
    """Also one that a higher setting once allowed; the wait counts from the last message."""
    with pytest.raises(gateway.TooManyCodes) as caught:
        gateway.session_sends(asked(sends), SETTINGS, START_S + later_s)
    error = caught.value
    assert (error.status, error.errno, error.retry_after_s) == (429, 114, wait_s)


@pytest.mark.parametrize("sends", [1, 3, 255])
@pytest.mark.parametrize("later_s", [1000, 1001, 10**7])
def test_allowance_comes_back(sends: int, later_s: int) -> None:
    assert gateway.session_sends(asked(sends), SETTINGS, START_S + later_s) == 0


@given(
    sends=st.integers(0, 255),
    limit=st.integers(1, 255),
    code_ttl_s=st.integers(1, 86_400),
    session_ttl_s=st.integers(1, 365 * 86_400),
    later_s=st.integers(0, 2 * 365 * 86_400),
)
@examples(max_examples=100, deadline=None)
def test_retry_after_is_true(
    sends: int, limit: int, code_ttl_s: int, session_ttl_s: int, later_s: int
) -> None:
    """Never 0, never too long: a second earlier is too early, and then it works."""
    settings = gateway.Settings(
        sends_per_session=limit, code_ttl_s=code_ttl_s, session_ttl_s=session_ttl_s
    )
    user = gateway.User(KEY, sends=sends, code_expires_s=START_S + code_ttl_s if sends else 0)
    now_s = START_S + later_s
    try:
        assert gateway.session_sends(user, settings, now_s) < limit
    except gateway.TooManyCodes as error:
        wait_s = error.retry_after_s
        assert wait_s
        assert wait_s >= 1
        assert gateway.session_sends(user, settings, now_s + wait_s) < limit
        with pytest.raises(gateway.TooManyCodes):
            gateway.session_sends(user, settings, now_s + wait_s - 1)


# -- sends_per_session --------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_messages_of_one_session(make_client: Callable[..., WsgiClient], limit: int) -> None:
    """As many as the setting says, and not one more; another session has its own."""
    client = make_client(sends_per_session=limit)
    client.register()
    for _ in range(limit):
        assert client.ask().status == 200
    for path in ("/sms/verify", "/sms/mt/verify", "/v1/msisdn/sms/verify", "/sms/resend_code"):
        refused(client.call(path, {"msisdn": NUMBER}), 114)
    assert len(client.outbox()) == limit
    other = client.another()
    other.register()
    assert other.ask().status == 200


def test_default_is_five(client: WsgiClient) -> None:
    client.register()
    assert [client.ask().status for _ in range(7)] == [200] * 5 + [429] * 2


def test_every_way_to_ask_counts(make_client: Callable[..., WsgiClient]) -> None:
    """Catches a counter that some endpoint forgets, or that a new code sets back."""
    client = make_client(sends_per_session=5)
    client.register()
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    assert client.ask().status == 200
    assert client.call("/sms/resend_code").status == 200
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200
    assert client.call("/sms/resend_code").status == 200
    for _ in range(3):
        client.call("/sms/verify_code", {"code": "x" * 6})
    assert client.ask(shortVerificationCode=False).status == 200
    refused(client.ask(), 114)
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200
    refused(client.ask(), 114)


def test_messages_that_the_phone_asks_for_count(make_client: Callable[..., WsgiClient]) -> None:
    """The webhook answers as ever, so that no provider repeats it, and nothing is sent."""
    client = make_client(sends_per_session=2)
    client.register()
    for number in range(4):
        assert inbound(client, messageId=f"m{number}").status == 200
    assert len(client.outbox()) == 2
    refused(client.call("/sms/resend_code"), 114)
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_refusal_changes_nothing(make_client: Callable[..., WsgiClient]) -> None:
    """The code that was sent stays alive, with its tries; no second counts as a message."""
    client = make_client(sends_per_session=1)
    client.register()
    client.ask()
    client.call("/sms/verify_code", {"code": "x" * 6})
    before = records(client)
    for _ in range(3):
        refused(client.call("/sms/resend_code"), 114)
        refused(client.ask(mcc="310", mnc="150"), 114)
    assert records(client) == before
    assert client.call("/sms/verify_code", {"code": "y" * 6}).errno == 105
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


@pytest.mark.parametrize(
    ("path", "body", "errno"),
    [
        ("/sms/verify", {}, 108),
        ("/sms/verify", {"msisdn": "07700900123"}, 107),
        ("/sms/verify", {"msisdn": NUMBER, "mcc": "23"}, 107),
        ("/sms/verify", {"msisdn": "+447700900124"}, 107),
        ("/sms/verify_code", {"code": "x" * 6}, 105),
        ("/sms/verify_code", {"code": "1"}, 107),
        ("/certificate/sign", {"publicKey": {}}, 107),
    ],
)
def test_what_sends_nothing_does_not_count(
    make_client: Callable[..., WsgiClient], path: str, body: Any, errno: int
) -> None:
    client = make_client(sends_per_session=2, code_tries=10)
    client.register()
    assert client.ask().status == 200
    for _ in range(3):
        assert client.call(path, body).errno == errno
    assert client.ask().status == 200
    refused(client.ask(), 114)


@pytest.mark.parametrize("session_ttl_s", [3600, 86_400])
def test_retry_after_over_http(
    make_client: Callable[..., WsgiClient], clock: Clock, session_ttl_s: int
) -> None:
    """For a verified session, which lives longer: a second earlier is too early."""
    client = make_client(sends_per_session=2, session_ttl_s=session_ttl_s, clock=clock)
    client.verified()
    clock.now_s += 100
    assert client.call("/sms/resend_code").status == 200
    clock.now_s += 50
    wait_s = refused(client.call("/sms/resend_code"), 114)
    assert wait_s == session_ttl_s - 50
    clock.now_s += wait_s - 1
    assert refused(client.ask(), 114) == 1
    clock.now_s += 1
    assert [client.ask().status for _ in range(3)] == [200, 200, 429]


def test_allowance_of_many_sessions_at_once(
    make_client: Callable[..., WsgiClient], patient: None
) -> None:
    """One session from 12 threads: never a message too many, and the rest can still be had.

    A request that loses every race is told 503/201, as it may be: it sent nothing.
    """
    client = make_client(sends_per_session=5)
    client.register()
    client.ask()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.call("/sms/resend_code"), range(24)))
    outcomes = {(a.status, None if a.status == 200 else a.errno) for a in answers}
    assert outcomes <= {(200, None), (429, 114), (503, 201)}
    sent = [a.status for a in answers].count(200)
    assert sent <= 4
    assert len(client.outbox()) == 1 + sent
    for _ in range(4 - sent):
        assert client.call("/sms/resend_code").status == 200
    refused(client.call("/sms/resend_code"), 114)
    assert len(client.outbox()) == 5


@pytest.mark.parametrize("status", ["1", "9", "4"])
def test_messages_that_were_refused_do_not_count(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], status: str
) -> None:
    """503/201, for the session and for the hour; the code before stays as it was."""
    client = make_client(sends_per_session=2, sends_per_hour=2, **paid)
    client.register()
    assert client.ask().status == 200
    code, before = provider.code(), records(client)
    provider.status = status
    for _ in range(4):
        assert client.call("/sms/resend_code").errno == 201
    assert len(provider.forms) == 5
    assert records(client) == before
    assert client.call("/sms/verify_code", {"code": code}).status == 200
    provider.status = "0"
    assert client.ask().status == 200
    refused(client.ask(), 114)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("first", [True, False])
def test_messages_that_are_refused_at_once_change_nothing(
    make_client: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, ...], first: bool,
) -> None:  # fmt: skip
    """A double tap while providers are down: each began with the record of the one before."""
    client = make_client(sends_per_session=9)
    client.register()
    if not first:
        assert client.ask().status == 200
    before, code = records(client), "" if first else client.code()
    sending, ends = threading.Semaphore(0), [threading.Event() for _ in order]
    number = iter(range(len(order)))

    def refuse(*_: Any) -> Any:
        mine = next(number)
        sending.release()
        assert ends[mine].wait(10)
        raise gateway.SmsFailed("refused")

    with monkeypatch.context() as patched, ThreadPoolExecutor(len(order)) as threads:
        patched.setattr(client.gateway.sms, "send", refuse)
        asked = []
        for _ in order:
            same = client.another()
            same.credentials = client.credentials
            asked.append(threads.submit(same.ask, "+447700900999" if first else NUMBER))
            assert sending.acquire(timeout=10)
        for n in order:
            ends[n].set()
            assert asked[n].result().errno == 201
    assert records(client) == before
    if first:  # the number was mistyped
        assert client.ask().status == 200
    else:
        assert client.call("/sms/verify_code", {"code": code}).status == 200


@pytest.mark.parametrize("fails", ["count_send", "uncount_send"])
def test_a_message_that_cannot_be_counted_changes_nothing(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, fails: str,
) -> None:  # fmt: skip
    """The node of a cluster that counts may be away while the session's own is well."""
    client = make_client(sends_per_session=2, **paid)
    client.register()
    assert client.ask().status == 200
    code, session = provider.code(), client.gateway.storage.get(client_id(client))

    def away(*_: Any) -> int:
        raise gateway.Unavailable("gone")

    monkeypatch.setattr(client.gateway.storage, fails, away)
    provider.status = "1"
    for _ in range(3):
        assert client.call("/sms/resend_code").errno == 201
    assert client.gateway.storage.get(client_id(client)) == session
    assert client.call("/sms/verify_code", {"code": code}).status == 200


def client_id(client: WsgiClient) -> gateway.StorageId:
    """Under what a client's session is stored."""
    assert client.credentials
    return client.gateway.secrets.id_for(client.credentials.hawk_id)


def test_waits_are_no_longer_than_they_can_be(
    make_client: Callable[..., WsgiClient], paid: dict[str, Any], clock: Clock
) -> None:
    """Nor is a code alive for longer, if it was made while our clock was a year ahead."""
    client = make_client(sends_per_session=1, sends_per_hour=1, clock=clock, **paid)
    one, two = sessions(client, 2)
    year_s = 365 * 86400
    clock.now_s += year_s
    assert one.ask().status == 200
    clock.now_s -= year_s
    assert refused(one.ask(), 114) == gateway.DAY_S
    assert refused(two.ask(), 116) == gateway.HOUR_S
    assert one.call("/sms/verify_code", {"code": "123456"}).errno == 111


# -- sends_per_hour -----------------------------------------------------------


def sessions(client: WsgiClient, count: int) -> list[WsgiClient]:
    """New sessions of one application."""
    found = [client.another() for _ in range(count)]
    for one in found:
        one.register()
    return found


def test_messages_of_the_whole_gateway(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], clock: Clock
) -> None:
    """Over all sessions and all processes; Retry-After is when the oldest is an hour old."""
    options = {"sends_per_hour": 3, "clock": clock, **paid}
    first, second = make_client(**options), make_client(**options)  # two workers, one store
    one, two = sessions(first, 2)
    (three,) = sessions(second, 1)
    assert one.ask().status == 200
    clock.now_s += 600
    assert two.call("/sms/mt/verify", {"msisdn": "+447700900124"}).status == 204
    clock.now_s += 600.5
    assert three.ask().status == 200
    for asking in (one, two, three):
        assert refused(asking.call("/sms/resend_code"), 116) == 2400  # rounded up
    clock.now_s += 2399
    assert refused(three.ask(), 116) == 1
    clock.now_s += 0.5
    assert three.ask().status == 200
    assert refused(one.ask(), 116) == 600
    clock.now_s += 600
    assert one.ask().status == 200
    assert len(provider.forms) == 5


def test_full_hour_changes_nothing_for_a_session(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], clock: Clock
) -> None:
    """The living code lives on with its tries; the allowance of the session is not touched."""
    client = make_client(sends_per_hour=1, sends_per_session=2, clock=clock, **paid)
    one, two = sessions(client, 2)
    assert one.ask().status == 200
    assert one.call("/sms/verify_code", {"code": "x" * 6}).errno == 105
    before = records(client)
    for _ in range(4):
        refused(one.call("/sms/resend_code"), 116)
        refused(one.ask(mcc="310"), 116)
        refused(two.ask(), 116)
    assert records(client) == before
    assert len(provider.forms) == 1
    assert two.call("/sms/resend_code").errno == 111  # it has still asked for nothing
    assert one.call("/sms/verify_code", {"code": provider.code()}).status == 200
    clock.now_s += 3600
    assert one.ask().status == 200
    refused(one.ask(), 114)
    clock.now_s += 3600
    assert two.ask("+447700900124").status == 200  # nor was the number bound


def test_life_of_a_session_that_was_refused(
    make_client: Callable[..., WsgiClient], paid: dict[str, Any]
) -> None:
    """Catches an undo that writes the record without its end: it would live for ever."""
    client = make_client(sends_per_hour=1, session_ttl_s=500, **paid)
    one, two = sessions(client, 2)
    assert one.ask().status == 200
    for _ in range(2):
        refused(two.ask(), 116)
        refused(one.ask(), 116)
    storage = client.gateway.storage
    assert [490_000 < storage._run("PTTL", key) <= 500_000 for key in records(client)] == [True] * 2


@contextlib.contextmanager
def hanging_up(provider: Provider) -> Iterator[str]:
    """The address of a provider that reads one message, keeps it, and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve() -> None:
            peer, _ = server.accept()
            with peer, peer.makefile("rb") as reader:
                length = 0
                while line := reader.readline().strip().lower():
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                provider.forms.append(dict(parse_qsl(reader.read(length).decode())))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/sms/json"
        thread.join(10)


def test_message_with_an_unknown_fate_counts(
    make_client: Callable[..., WsgiClient], provider: Provider
) -> None:
    """The provider read it and hung up: it may send, so it counts, and its code is alive."""
    with hanging_up(provider) as url:
        entry = {"kind": "nexmo", "endpoint": url, "api_key": "k", "api_secret": "s"}
        client = make_client(sends_per_hour=1, sms_providers=[entry])
        client.register()
        assert client.ask().status == 200
    refused(client.call("/sms/resend_code"), 116)
    assert len(provider.forms) == 1
    assert client.call("/sms/verify_code", {"code": provider.code()}).status == 200


def test_phone_first_in_a_full_hour(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], clock: Clock
) -> None:
    """The webhook answers 200, nothing is sent, and the session is as it was."""
    client = make_client(sends_per_hour=1, clock=clock, **paid)
    one, two = sessions(client, 2)
    assert one.ask().status == 200
    before = records(client)
    assert inbound(two, "+447700900124", messageId="m1").status == 200
    assert records(client) == before
    assert len(provider.forms) == 1
    clock.now_s += 3600
    assert inbound(two, "+447700900124", messageId="m2").status == 200
    assert len(provider.forms) == 2
    code = provider.code("+447700900124")
    assert two.call("/sms/verify_code", {"code": code}).status == 200


def test_races_for_the_last_messages_of_an_hour(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], patient: None
) -> None:
    """12 sessions at once, 5 messages: exactly 5 leave, and exactly those sessions have a code."""
    client = make_client(sends_per_hour=5, **paid)
    every = sessions(client, 12)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: one.ask(), every))
    assert sorted(a.status for a in answers) == [200] * 5 + [429] * 7
    waits = [refused(a, 116) for a in answers if a.status == 429]
    assert all(3590 <= wait <= 3600 for wait in waits)
    assert len(provider.forms) == 5
    assert (
        sorted(len(record) > 40 for record in records(client).values()) == [False] * 7 + [True] * 5
    )


def test_outbox_does_not_count(
    make_client: Callable[..., WsgiClient], paid: dict[str, Any]
) -> None:
    """A classroom of thirty needs no higher limit; and its messages use up nobody's hour."""
    free = make_client(sends_per_hour=1)
    for one in sessions(free, 3):
        assert one.ask().status == 200
        assert one.call("/sms/resend_code").status == 200
    assert free.gateway.storage._run("EXISTS", "sends") == 0
    (one,) = sessions(make_client(sends_per_hour=1, **paid), 1)
    assert one.ask().status == 200
    refused(one.ask(), 116)
    (one,) = sessions(free, 1)
    assert one.ask().status == 200


def test_outbox_does_not_count_beside_others_either(
    make_client: Callable[..., WsgiClient], paid: dict[str, Any]
) -> None:
    """Only who may cost money is counted, and before the message leaves."""
    (entry,) = paid["sms_providers"]
    before, after = {"kind": "outbox", "priority": 9}, {"kind": "outbox", "priority": -9}
    client = make_client(sends_per_hour=1, sms_providers=[entry, before])
    for one in sessions(client, 3):
        assert one.ask().status == 200
    assert client.gateway.storage._run("EXISTS", "sends") == 0
    client = make_client(sends_per_hour=1, sms_providers=[entry, after])
    (one, two) = sessions(client, 2)
    assert one.ask().status == 200
    refused(two.ask(), 116)


def test_counter_dies_with_its_hour(
    make_client: Callable[..., WsgiClient], paid: dict[str, Any]
) -> None:
    """What is counted is kept for an hour and no longer, and it is nothing but times."""
    client = make_client(sends_per_hour=2, **paid)
    client.register()
    before = time.time()
    assert [client.ask().status for _ in range(3)] == [200, 200, 429]
    storage = client.gateway.storage
    moments = [float(text) for text in storage._run("LRANGE", "sends", 0, -1)]
    assert len(moments) == 2
    assert all(before - 1 <= moment <= time.time() + 1 for moment in moments)
    assert 3_590_000 < storage._run("PTTL", "sends") <= 3_600_000
