"""How many messages a session may ask for, and how many the whole gateway sends."""

from __future__ import annotations

import contextlib
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
from support import AT_ONCE, NUMBER, Answer, Clock, WsgiClient, counted

import gateway

KEY = b"k" * 32
START_S = 1_700_000_000


@pytest.mark.parametrize(
    ("period", "seconds"), [("second", 1), ("minute", 60), ("hour", 3600), ("day", 86_400)]
)
def test_a_budget_is_for_a_period(period: str, seconds: int) -> None:
    row = next(limit for limit in gateway.LIMITS if limit.setting == "sends_per_number")
    settings = gateway.Settings(sends_per_number=f"7/{period}")
    assert gateway.budget(settings, row, "GB") == (7, seconds)


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


def inbound(client: WsgiClient, sender: str = NUMBER, secret: str = "", **fields: Any) -> Answer:
    """The phone sends its Hawk id."""
    assert client.credentials
    body = {"msisdn": sender[1:], "text": client.credentials.hawk_id, **fields}
    return client.call(f"/sms/momt/{secret}?provider=nexmo", body, signed=False)


# -- session_sends ------------------------------------------------------------

SETTINGS = gateway.Settings(
    sends_per_session=3, session_ttl_s=1000, code_ttl_s=60, resend_gaps_s=AT_ONCE
)


ASK = gateway.Ask(gateway.Msisdn(NUMBER), "GB", b"sealed", gateway.Network(), long=False)


def asked(sends: int, last_s: int = START_S) -> gateway.User:
    """A session that has asked for messages, the last one at a time."""
    return gateway.User(KEY, sends=sends, asked_s=last_s if sends else 0)


@pytest.mark.parametrize("sends", [0, 1, 2])
@pytest.mark.parametrize("later_s", [0, 59, 3599])
def test_what_is_left_of_the_allowance(sends: int, later_s: int) -> None:
    assert gateway.session_sends(asked(sends), SETTINGS, START_S + later_s) == (sends, 0, "")


@pytest.mark.parametrize("sends", [3, 4, 255])
@pytest.mark.parametrize(
    ("later_s", "wait_s"), [(0, 3600), (1, 3599), (60, 3540), (600, 3000), (3599, 1)]
)
def test_used_up_allowance(sends: int, later_s: int, wait_s: int) -> None:
    """Also one that a higher setting once allowed; the wait counts from the last message."""
    user, now_s = asked(sends), START_S + later_s
    count, wanted_s, refusal = gateway.session_sends(user, SETTINGS, now_s)
    assert (count, wanted_s) == (sends, wait_s)
    with pytest.raises(gateway.TooManyCodes, match=f"^{refusal}$") as caught:
        gateway.reserve(user, ASK, 1, SETTINGS, now_s)
    error = caught.value
    assert (error.status, error.errno, error.retry_after_s) == (429, 114, wait_s)


@pytest.mark.parametrize("sends", [1, 3, 255])
@pytest.mark.parametrize("later_s", [3600, 3601, 10**7])
def test_allowance_comes_back(sends: int, later_s: int) -> None:
    assert gateway.session_sends(asked(sends), SETTINGS, START_S + later_s) == (0, 0, "")


@given(
    sends=st.integers(0, 255),
    limit=st.integers(1, 255),
    gaps_s=st.lists(st.integers(0, 3600), min_size=1, max_size=5),
    session_ttl_s=st.integers(1, 365 * 86_400),
    later_s=st.integers(0, 2 * 365 * 86_400) | st.integers(0, 600),
)
@examples(max_examples=200, deadline=None)
def test_retry_after_is_true(
    sends: int, limit: int, gaps_s: list[int], session_ttl_s: int, later_s: int
) -> None:
    """Never 0, never too long: a second earlier is too early, and then it works."""
    settings = gateway.Settings(
        sends_per_session=limit, session_ttl_s=session_ttl_s, resend_gaps_s=gaps_s
    )
    user, now_s = asked(sends), START_S + later_s
    count, wait_s, refusal = gateway.session_sends(user, settings, now_s)
    if refusal:
        assert wait_s >= 1
        assert gateway.session_sends(user, settings, now_s + wait_s) == (0, 0, "")
        assert gateway.session_sends(user, settings, now_s + wait_s - 1)[1:] == (1, refusal)
    else:
        assert (wait_s, count < limit) == (0, True)


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
        client.call("/sms/verify_code", {"code": "000000"})
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
    client.call("/sms/verify_code", {"code": "000000"})
    before = records(client)
    for _ in range(3):
        refused(client.call("/sms/resend_code"), 114)
        refused(client.ask(mcc="310", mnc="150"), 114)
    assert records(client) == before
    assert client.call("/sms/verify_code", {"code": "000001"}).errno == 105
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


@pytest.mark.parametrize(
    ("path", "body", "errno"),
    [
        ("/sms/verify", {}, 108),
        ("/sms/verify", {"msisdn": "07700900123"}, 107),
        ("/sms/verify", {"msisdn": NUMBER + "0"}, 107),
        ("/sms/verify", {"msisdn": "+447700900124"}, 107),
        ("/sms/verify_code", {"code": "000000"}, 105),
        ("/sms/verify_code", {"code": "1"}, 107),
        ("/sms/verify_code", {"code": "a" * 32}, 107),  # of the kind that does not wait
        ("/certificate/sign", {"publicKey": {}}, 104),
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
    assert wait_s == 3600 - 50
    clock.now_s += wait_s - 1
    assert refused(client.ask(), 114) == 1
    clock.now_s += 1
    assert [client.ask().status for _ in range(3)] == [200, 200, 429]


def test_allowance_of_many_sessions_at_once(
    make_client: Callable[..., WsgiClient], patient: None
) -> None:
    """One session from 12 threads: never a message too many, and the rest can still be had.

    Who asks for the same while it is being sent is answered like the first, and sends nothing.
    A request that loses every race is told 503/201, as it may be: it sent nothing.
    """
    client = make_client(sends_per_session=5)
    client.register()
    client.ask()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.call("/sms/resend_code"), range(24)))
    outcomes = {(a.status, None if a.status == 200 else a.errno) for a in answers}
    assert outcomes <= {(200, None), (429, 114), (503, 201)}
    sent = len(client.outbox()) - 1
    assert 1 <= sent <= 4
    assert [a.status for a in answers].count(200) >= sent
    assert {user.sends for user in map(gateway.User.unpack, records(client).values())} == {1 + sent}
    for _ in range(4 - sent):
        assert client.call("/sms/resend_code").status == 200
    refused(client.call("/sms/resend_code"), 114)
    assert len(client.outbox()) == 5


@pytest.mark.parametrize("status", ["2", "9", "4"])
def test_messages_that_failed_do_not_count(
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


@pytest.mark.parametrize("first", [True, False])
def test_a_number_that_was_refused_for_good_counts_for_its_session(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], first: bool
) -> None:
    """400/107, or calls of the provider for it were bounded by nothing; the hour is given back.

    Its number is unbound, so that a better one can be named; a code that waits lives on.
    """
    client = make_client(sends_per_session=3, sends_per_hour=2, code_tries=9, **paid)
    client.register()
    if not first:
        assert client.ask().status == 200
        code = provider.code()
    sent, provider.status = len(provider.forms), "3"  # Vonage: this number is invalid
    for n in range(3):
        answer = client.ask("+447700900999" if first and n < 2 else NUMBER)
        if n == 3 - sent:
            refused(answer, 114)
        else:
            assert (answer.status, answer.errno) == (400, 107)
            assert "no SMS can reach this number" in answer.json["message"]
    assert len(provider.forms) == 3
    assert counted(client.gateway) == sent
    if first:
        assert client.call("/sms/resend_code").errno == 111  # the number is not the session's
        assert client.call("/sms/verify_code", {"code": "123456"}).errno == 111
    else:
        assert client.call("/sms/verify_code", {"code": code}).status == 200


def test_a_message_that_is_refused_while_the_same_is_asked_for_again(
    make_client: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double tap while providers are down: one message is tried, and its failure is undone."""
    client = make_client(sends_per_session=2)
    client.register()
    before, sending, end = records(client), threading.Semaphore(0), threading.Event()

    def fail(*_: Any) -> Any:
        sending.release()
        assert end.wait(10)
        raise gateway.SmsFailed("away")

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as threads:
        patched.setattr(client.gateway.sms, "send", fail)
        asked = threads.submit(client.ask, "+447700900999")
        assert sending.acquire(timeout=10)
        twin = client.another()
        twin.credentials = client.credentials
        assert twin.ask("+447700900999").status == 200  # a double click
        for path, body, errno in (
            ("/sms/verify", {"msisdn": NUMBER}, 107),
            ("/sms/mt/verify", {"msisdn": "+447700900999"}, 114),
            ("/sms/resend_code", None, 114),
            ("/sms/verify_code", {"code": "123456"}, 201),
        ):
            answer = twin.call(path, body)
            assert answer.errno == errno, path
            assert errno == 107 or answer.json["retryAfter"] == 1
        end.set()
        assert asked.result().errno == 201
    assert records(client) == before
    assert [client.ask().status for _ in range(3)] == [200, 200, 429]  # the number was mistyped


def test_a_write_is_repeated_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SETTLE_S", 0.3)
    monkeypatch.setattr(gateway, "SETTLE_PAUSE_S", 0.01)
    tries: list[float] = []

    def write() -> str:
        tries.append(time.monotonic())
        assert len(tries) < 1000, "it is never given up"
        if len(tries) < enough:
            raise gateway.Unavailable("gone")
        return "done"

    enough = 3
    assert gateway.persist(write) == "done"
    assert len(tries) == 3
    enough = 1000
    with pytest.raises(gateway.Unavailable):
        gateway.persist(write)
    assert tries[-1] - tries[3] >= 0.3


@pytest.mark.parametrize("fails", ["TAKE", "GIVE_BACK"])
def test_a_message_that_cannot_be_counted_changes_nothing(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, fails: str,
) -> None:  # fmt: skip
    """The node of a cluster that counts may be away while the session's own is well."""
    monkeypatch.setattr(gateway, "SETTLE_S", 0.0)
    client = make_client(sends_per_session=2, **paid)
    client.register()
    assert client.ask().status == 200
    code, session = provider.code(), client.gateway.storage.get(client_id(client))

    run = client.gateway.storage.limit

    def away(script: str, *args: Any) -> Any:
        if script is getattr(gateway, fails + "_SCRIPT"):
            raise gateway.Unavailable("gone")
        return run(script, *args)

    monkeypatch.setattr(client.gateway.storage, "limit", away)
    provider.status = "9"
    for _ in range(3):
        assert client.call("/sms/resend_code").errno == 201
    assert len(provider.forms) == (1 if fails == "TAKE" else 4)  # count first, then send
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
    assert refused(one.ask(), 114) == gateway.HOUR_S
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
    """Over all sessions and all processes; one comes back every twenty minutes."""
    options = {"sends_per_hour": 3, "clock": clock, **paid}
    first, second = make_client(**options), make_client(**options)  # two workers, one store
    one, two = sessions(first, 2)
    (three,) = sessions(second, 1)
    assert one.ask().status == 200
    clock.now_s += 300
    assert two.call("/sms/mt/verify", {"msisdn": "+447700900124"}).status == 204
    clock.now_s += 300.5
    assert three.ask().status == 200
    for asking in (one, two, three):
        assert refused(asking.call("/sms/resend_code"), 116) == 600  # rounded up
    clock.now_s += 598.5
    assert refused(three.ask(), 116) == 1
    clock.now_s += 1
    assert three.ask().status == 200
    assert refused(one.ask(), 116) == 1200
    clock.now_s += 1200
    assert one.ask().status == 200
    assert len(provider.forms) == 5


def test_full_hour_changes_nothing_for_a_session(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], clock: Clock
) -> None:
    """The living code lives on with its tries; the allowance of the session is not touched."""
    client = make_client(sends_per_hour=1, sends_per_session=2, clock=clock, **paid)
    one, two = sessions(client, 2)
    assert one.ask().status == 200
    assert one.call("/sms/verify_code", {"code": "000000"}).errno == 105
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
    refused(one.ask(), 116)
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
    hooks = [{"kind": "nexmo", "path_secret": "p4th"}]
    client = make_client(sends_per_hour=1, clock=clock, sms_inbound=hooks, **paid)
    one, two = sessions(client, 2)
    assert one.ask().status == 200
    before = records(client)
    assert inbound(two, "+447700900124", "p4th", messageId="m1").status == 200
    assert records(client) == before
    assert len(provider.forms) == 1
    clock.now_s += 3600
    assert inbound(two, "+447700900124", "p4th", messageId="m2").status == 200
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
    assert all(700 <= wait <= 720 for wait in waits)
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
    assert counted(free.gateway) == 0
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
    assert counted(client.gateway) == 0
    client = make_client(sends_per_hour=1, sms_providers=[entry, after])
    (one, two) = sessions(client, 2)
    assert one.ask().status == 200
    refused(two.ask(), 116)


def test_a_counter_dies_when_it_is_at_rest(
    make_client: Callable[..., WsgiClient], paid: dict[str, Any]
) -> None:
    """What is counted is one number: the time at which the counter is at rest, and its key dies."""
    client = make_client(sends_per_hour=2, **paid)
    client.register()
    before_s = time.time()
    assert [client.ask().status for _ in range(3)] == [200, 200, 429]
    storage = client.gateway.storage
    (counter,) = client.gateway.limits.counters({"h": ""})
    at_rest_s = int(storage._run("GET", counter.key)) / 1e6
    assert before_s + 3599 < at_rest_s < time.time() + 3601
    assert 3_590_000 < storage._run("PTTL", counter.key) <= 3_600_000


# -- resend_gaps_s ------------------------------------------------------------

GAPS_S = [30, 60, 120, 300]
"""The default."""


def test_the_default_gaps() -> None:
    assert gateway.Settings().resend_gaps_s == GAPS_S


@pytest.mark.parametrize("ways", [(0, 1, 2), (1, 2, 0), (0, 1)], ids=str)
@pytest.mark.parametrize(
    "gaps_s", [GAPS_S, [30], [0, 60], [5, 0, 5], [3600], [1]], ids=lambda gaps: str(gaps)
)
def test_gaps_between_the_messages_of_a_session(
    make_client: Callable[..., WsgiClient], clock: Clock, gaps_s: list[int], ways: tuple[int, ...]
) -> None:
    """The first after the first message, the last for all further ones; whoever asks, and how."""
    client = make_client(resend_gaps_s=gaps_s, sends_per_session=9, clock=clock,
                         session_ttl_s=7 * 86_400)  # fmt: skip
    client.register()
    possible: list[Callable[[], Answer]] = [
        client.ask,
        lambda: client.call("/sms/mt/verify", {"msisdn": NUMBER}),
        lambda: client.call("/sms/resend_code", {"shortVerificationCode": False}),
    ]
    asks = [possible[way] for way in ways]
    assert asks[0]().status in (200, 204)
    for n in range(1, 8):
        gap_s = gaps_s[min(n, len(gaps_s)) - 1]
        other = asks[n % len(asks)]  # never what was asked for last: that may be a double click
        for early_s in (gap_s, 1) if gap_s else ():
            clock.now_s += gap_s - early_s
            before, sent = records(client), len(client.outbox())
            answer = other()
            assert refused(answer, 114) == early_s
            assert "resend_gaps_s" in answer.json["message"]
            assert (records(client), len(client.outbox())) == (before, sent)
            clock.now_s -= gap_s - early_s
        clock.now_s += gap_s
        assert other().status in (200, 204), n
        assert len(client.outbox()) == n + 1


def test_a_gap_holds_after_success_too(
    make_client: Callable[..., WsgiClient], clock: Clock
) -> None:
    client = make_client(resend_gaps_s=GAPS_S, clock=clock).verified()
    assert refused(client.ask(), 114) == 30  # its code was used: no double click
    assert refused(client.call("/sms/resend_code"), 114) == 30
    clock.now_s += 30
    assert client.ask().status == 200
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_a_gap_is_no_longer_than_it_can_be(
    make_client: Callable[..., WsgiClient], clock: Clock
) -> None:
    """A year ahead was our clock when the first message was asked for: nobody waits a year."""
    client = make_client(resend_gaps_s=GAPS_S, clock=clock)
    client.register()
    clock.now_s += 365 * 86_400
    assert client.ask().status == 200
    clock.now_s -= 365 * 86_400
    assert client.call("/sms/resend_code").status == 200
    assert refused(client.call("/sms/mt/verify", {"msisdn": NUMBER}), 114) == 60


def test_gaps_hold_for_the_phone_as_well(
    make_client: Callable[..., WsgiClient], clock: Clock
) -> None:
    """The webhook answers 200 all the same, and the session is as it was."""
    client = make_client(resend_gaps_s=[30, 60], clock=clock)
    client.register()
    for n, (later_s, sent) in enumerate([(0, 1), (29, 1), (1, 2), (30, 2), (29, 2), (1, 3)]):
        clock.now_s += later_s
        assert inbound(client, messageId=f"m{n}").json == {}
        assert len(client.outbox()) == sent, n


@pytest.mark.parametrize("paid_for", [False, True])
@pytest.mark.parametrize(
    ("first", "again", "later_s", "errno"),
    [
        ("verify", "verify", 0, None),
        ("verify", "verify", 29, None),
        ("verify", "verify as text", 29, None),  # another spelling of the number
        ("verify", "verify elsewhere", 29, None),  # for another network
        ("mt", "mt", 29, None),
        ("mt", "verify long", 29, None),  # the other endpoint, the same kind
        ("verify", "verify", 30, 0),
        ("verify", "mt", 0, 114),  # the other kind
        ("mt", "verify", 29, 114),
        ("verify", "resend", 0, 114),  # whoever says "again" wants another one
        ("mt", "resend", 29, 114),
        ("verify", "resend", 30, 0),
        ("verify", "other number", 0, 107),
    ],
)
def test_a_double_click_is_one_message(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any],
    clock: Clock, first: str, again: str, later_s: int, errno: int | None, paid_for: bool,
) -> None:  # fmt: skip
    """``errno``: ``None`` = answered like the first, and nothing is sent; 0 = sent anew."""
    ways: dict[str, tuple[str, Any]] = {
        "verify": ("/sms/verify", {"msisdn": NUMBER}),
        "verify as text": ("/v1/msisdn/sms/verify", {"msisdn": "+44 7700 900-123"}),
        "verify elsewhere": ("/sms/verify", {"msisdn": NUMBER, "mcc": "234", "mnc": "15"}),
        "verify long": ("/sms/verify", {"msisdn": NUMBER, "shortVerificationCode": False}),
        "mt": ("/sms/mt/verify", {"msisdn": NUMBER}),
        "resend": ("/sms/resend_code", None),
        "other number": ("/sms/verify", {"msisdn": "+447700900124"}),
    }
    client = make_client(resend_gaps_s=GAPS_S, clock=clock, **(paid if paid_for else {}))
    client.register()
    assert client.call(*ways[first]).status in (200, 204)
    assert counted(client.gateway) == paid_for
    before, code = records(client), provider.code() if paid_for else client.code()
    clock.now_s += later_s
    for _ in range(3 if errno is None else 1):
        answer = client.call(*ways[again])
        if errno:
            assert answer.errno == errno
        elif again in ("mt",):
            assert (answer.status, answer.data) == (204, b"")
        else:
            assert (answer.status, answer.json["mtSender"]) == (200, "Gateway")
    sent = len(provider.forms) if paid_for else len(client.outbox())
    assert sent == (2 if errno == 0 else 1)
    assert counted(client.gateway) == sent * paid_for
    assert (records(client) == before) == (errno != 0)
    if errno != 0:
        assert client.call("/sms/verify_code", {"code": code}).status == 200


def test_two_double_clicks_on_resend_are_one_message(
    make_client: Callable[..., WsgiClient], clock: Clock
) -> None:
    client = make_client(resend_gaps_s=GAPS_S, clock=clock)
    client.register()
    assert client.ask().status == 200
    clock.now_s += 30
    assert client.call("/sms/resend_code").status == 200
    before = records(client)
    for later_s in (0, 29):
        clock.now_s += later_s
        assert client.call("/sms/resend_code").json["mtSender"] == "Gateway"
        assert client.ask().status == 200
    assert (records(client), len(client.outbox())) == (before, 2)
    assert refused(client.call("/sms/resend_code", {"shortVerificationCode": False}), 114) == 31
    clock.now_s += 1  # the first gap is over: from now on it would be another message
    assert refused(client.call("/sms/resend_code"), 114) == 30
    assert refused(client.ask(), 114) == 30
    clock.now_s += 30
    assert client.call("/sms/resend_code").status == 200
    assert len(client.outbox()) == 3


@pytest.mark.parametrize("how", ["used", "used up", "old"])
def test_no_double_click_once_the_code_is_gone(
    make_client: Callable[..., WsgiClient], clock: Clock, how: str
) -> None:
    """Nobody would be helped by an answer without a message."""
    client = make_client(resend_gaps_s=[100], code_ttl_s=50, clock=clock)
    client.register()
    assert client.ask().status == 200
    if how == "used":
        assert client.call("/sms/verify_code", {"code": client.code()}).status == 200
    elif how == "used up":
        wrong = f"{(int(client.code()) + 1) % 10**6:06}"
        for _ in range(3):
            assert client.call("/sms/verify_code", {"code": wrong}).errno == 105
    else:
        clock.now_s += 50
    left_s = 50 if how == "old" else 100
    assert refused(client.ask(), 114) == left_s
    clock.now_s += left_s
    assert client.ask().status == 200
    assert len(client.outbox()) == 2


def test_no_double_click_of_a_message_that_was_refused_for_good(
    make_client: Callable[..., WsgiClient], provider: Provider, paid: dict[str, Any], clock: Clock
) -> None:
    """The code that waits was sent long ago: 200 would say that another is on its way."""
    client = make_client(resend_gaps_s=[30], clock=clock, **paid)
    client.register()
    assert client.ask().status == 200
    clock.now_s += 100
    provider.status = "3"
    assert client.ask().errno == 107
    provider.status = "0"
    assert refused(client.ask(), 114) == 30
    assert len(provider.forms) == 2
    clock.now_s += 30
    assert client.ask().status == 200
    assert len(provider.forms) == 3


def test_a_double_click_is_answered_like_the_first(
    make_client: Callable[..., WsgiClient], clock: Clock
) -> None:
    """A device waits for a message from the sender that it is told: it came from the first's."""
    senders = {"214": "+34600000001", "21407": "+34600000002"}
    client = make_client(resend_gaps_s=[30], mt_sender_map=senders, clock=clock)
    client.register()
    assert client.ask(mcc="214", mnc="07").json["mtSender"] == "+34600000002"
    for network in ({"mcc": "214", "mnc": "07"}, {"mcc": "214"}, {"mcc": "222"}, {}):
        assert client.ask(**network).json["mtSender"] == "+34600000002"
    assert [message["from"] for message in client.outbox()] == ["+34600000002"]


def test_gaps_of_nothing_make_no_double_click(
    make_client: Callable[..., WsgiClient], clock: Clock
) -> None:
    client = make_client(resend_gaps_s=AT_ONCE, clock=clock)
    client.register()
    assert [client.ask().status for _ in range(6)] == [200] * 5 + [429]
    assert len(client.outbox()) == 5
