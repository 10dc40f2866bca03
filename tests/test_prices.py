"""No right before its price: guesses cost messages that left, whatever fails or comes between.

SECURITY.md's finding 1 (November 2026): a code was written before its message was counted and
taken, and a wrong guess in between kept the roll-back from happening.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lab
import provider as sms
import pytest
import servers
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from provider import Provider
from support import NUMBER, ROOT, Answer, Clock, GatewayProcess, WsgiClient, counted, shared

import gateway

Start = Callable[..., GatewayProcess]
VICTIM = "+447700900666"
ATTACK_S = 3.0
CONNECTIONS = 16
MESSAGES_TAKEN = {"0": True, "504": True}  # by what a stand-in answered; unknown may be taken


def is_counted_guess(reply: lab.Reply | Answer) -> bool:
    """Whether a wrong code was judged."""
    body = reply.body if isinstance(reply, lab.Reply) else json.loads(reply.data or b"null")
    return bool(reply.status == 400 and body["errno"] == 105 and "newer" not in body["message"])


@pytest.fixture
def vonage() -> Iterator[Provider]:
    """A provider that takes every message."""
    with Provider(sms.taken) as stand_in:
        yield stand_in


def attack(gate: GatewayProcess, seconds: float = ATTACK_S) -> int:
    """Guess at the victim's number from sixteen connections; gives the guesses that counted.

    Four groups share a session each: one asks for messages, three guess all the while. A session
    that is used up is replaced.
    """
    end_s, counted = time.monotonic() + seconds, itertools.count()
    groups: list[gateway.Credentials | None] = [None] * (CONNECTIONS // 4)

    def ask(group: int) -> None:
        client = gate.client()
        while time.monotonic() < end_s:
            if client.register().status != 200:
                continue
            groups[group] = client.credentials
            for _ in range(20):
                with contextlib.suppress(ValueError):
                    client.verify(VICTIM)

    def guess(group: int) -> None:
        client = gate.client()
        while time.monotonic() < end_s:
            client.credentials = groups[group]
            with contextlib.suppress(ValueError):  # an error without a signature
                if client.credentials and is_counted_guess(client.verify_code("000000")):
                    next(counted)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        runs = [pool.submit(ask if n % 4 == 0 else guess, n // 4) for n in range(CONNECTIONS)]
        for run in runs:
            run.result()
    return next(counted)


def assert_owner_is_verified(gate: GatewayProcess, stand_in: Provider) -> None:
    """Whoever has the phone goes the whole way, as if nothing had happened."""
    owner = gate.client()
    assert owner.register().status == 200
    assert owner.verify(VICTIM).status == 200
    code = stand_in.texts()[VICTIM][-1].split()[-1]
    assert owner.verify_code(code).status == 200


@pytest.mark.parametrize("answer", [sms.nexmo("6"), sms.nexmo("5"), sms.reply("", 503)])
def test_a_provider_that_takes_nothing_gives_no_guess(
    start_gateway: Start, vonage: Provider, answer: Callable[[Any], None]
) -> None:
    """Refused for good, failed by Vonage's word, and failed as a web server says it."""
    delay_s = random.Random(1).random

    def slowly(handler: Any) -> None:
        time.sleep(delay_s() * 0.02)
        answer(handler)

    vonage.answer = slowly
    gate = start_gateway("--sms-providers", json.dumps([vonage.nexmo()]))
    assert attack(gate) == 0
    vonage.answer = sms.taken
    assert_owner_is_verified(gate, vonage)


def test_an_hour_that_is_used_up_gives_no_guess(start_gateway: Start, vonage: Provider) -> None:
    """The way that needs no provider: 490,000 to 1,520,000 guesses an hour, before."""
    options = ("--sms-providers", json.dumps([vonage.nexmo()]), "--sends-per-hour", "1")
    gate = start_gateway(*options)
    stranger = gate.client()
    stranger.register()
    assert stranger.verify("+447700900001").status == 200
    assert attack(gate) == 0
    assert list(vonage.texts()) == ["+447700900001"]
    gateway.Storage(f"unix://{gate.folder}/data/store.sock")._run("FLUSHALL")  # it passes
    assert_owner_is_verified(gate, vonage)


class Stalls(servers.Relay):
    """Passes all on, but some answers late.

    A command that the store has done may so seem undone: the gateway gives up after half a second.
    """

    def __init__(self, folder: Path, store: Path) -> None:
        self.path, self.random, self.rate = folder / "stalls.sock", random.Random(2), 0.0
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(256)
        super().__init__(listener, str(store))

    def passes(self, data: bytes, to_store: bool, silent_s: float) -> bool:
        """Answers that are late are done, but nobody waits for them any more."""
        if not to_store and self.random.random() < self.rate:
            time.sleep(0.7)
        return True


def test_time_outs_of_the_store_give_no_guess(
    start_gateway: Start, vonage: Provider, tmp_path: Path
) -> None:
    """Three guesses for each message that left, and not one more; half of them fail."""
    left, chance = itertools.count(), random.Random(3).random

    def some(handler: Any) -> None:
        if healed or chance() < 0.5:
            next(left)
            sms.taken(handler)
        else:
            sms.nexmo("5")(handler)

    vonage.answer, healed = some, False
    store = gateway.EmbeddedStore(str(tmp_path / "own"))
    stalls = Stalls(tmp_path, store.socket)
    try:
        options = ("--sms-providers", json.dumps([vonage.nexmo()]), "--sends-per-hour", "10000")
        gate = start_gateway(*options, "--storage-url", f"unix://{stalls.path}")
        stalls.rate, counted = 0.05, 0
        for _ in range(5):  # on a busy machine hardly anything gets through
            counted = counted or attack(gate)
        stalls.rate, healed = 0.0, True
        assert 0 < counted <= 3 * next(left)
        time.sleep(1)  # links that are late are gone
        assert_owner_is_verified(gate, vonage)
    finally:
        stalls.close()
        store.stop()


def test_kill_leaves_a_message_without_a_code_at_worst(
    start_gateway: Start, vonage: Provider, store: gateway.EmbeddedStore, storage: gateway.Storage
) -> None:
    """kill -9 of the gateway at some moments around RESERVE, SEND and ARM, others in each run."""
    vonage.answer = sms.after(0.03)
    options = ("--sms-providers", json.dumps([vonage.nexmo()]), "--storage-url", store.url)
    gate, numbers, verified = start_gateway(*options), [], 0
    for n in range(random.randrange(3), 21, 3):
        client, number = gate.client(), f"+4477009001{n:02}"
        assert client.register().status == 200
        asking = threading.Thread(target=quietly, args=(client.verify, number))
        asking.start()
        time.sleep(n * 0.004 * shared())
        gate.kill()
        asking.join()
        gate = start_gateway(*options)
        client.address = client.public_url = gate.url
        left = vonage.texts().get(number, [])
        numbers += left
        assert len(left) <= 1
        if left and client.verify_code(left[0].split()[-1]).status == 200:
            verified += 1
        else:
            replies = [client.verify_code("000000") for _ in range(4)]
            assert not any(map(is_counted_guess, replies))
    assert 0 < verified <= len(numbers) <= sent(storage) <= 20
    vonage.answer = sms.taken
    assert_owner_is_verified(gate, vonage)


def sent(storage: gateway.Storage) -> int:
    """How many messages the limits hold for sent."""
    return sum(map(int, storage._run("HVALS", "{limits}sent")))


def quietly(call: Callable[..., Any], *args: Any) -> Any:
    """Call, or give ``None`` when the gateway has just been killed."""
    with contextlib.suppress(Exception):
        return call(*args)
    return None


def test_a_reservation_of_the_dead_stands_in_nobodys_way(
    make_client: Callable[..., WsgiClient], vonage: Provider
) -> None:
    clock = Clock()
    client = make_client(sms_providers=[vonage.nexmo()], clock=clock, resend_gaps_s=[30, 60])
    client.register()
    vonage.answer, send = sms.taken, client.gateway.sms.send

    def dies(*args: Any) -> Any:
        send(*args)
        raise SystemExit  # as kill -9: nothing after it runs

    client.gateway.sms.send = dies  # type: ignore
    with pytest.raises(SystemExit):
        client.ask()
    client.gateway.sms.send = send  # type: ignore
    code = vonage.texts()[NUMBER][0].split()[-1]
    early = client.call("/sms/verify_code", {"code": code})
    assert (early.status, early.errno, early.json["retryAfter"]) == (503, 201, 1)
    assert client.ask().status == 200  # a double click, as far as anybody knows
    other = client.call("/sms/mt/verify", {"msisdn": NUMBER})
    assert (other.status, other.errno, other.json["retryAfter"]) == (429, 114, 1)
    clock.now_s += gateway.RESERVATION_S
    assert client.call("/sms/verify_code", {"code": code}).errno == 111
    assert client.ask().status == 200
    assert len(vonage.received) == 2
    code = vonage.texts()[NUMBER][1].split()[-1]
    assert client.call("/sms/verify_code", {"code": code}).status == 200


# -- Any order of requests, any fault -----------------------------------------


class Faults:
    """Makes calls of a storage fail: before they are done, or after, when nobody knows."""

    def __init__(self, storage: gateway.Storage) -> None:
        self.plan: list[str] = []
        self.lock = threading.Lock()
        for name in ("commit", "limit"):
            setattr(storage, name, self.around(getattr(storage, name)))

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **named: Any) -> Any:
            with self.lock:
                fault = self.plan.pop() if self.plan else ""
            if fault == "before":
                raise gateway.Unavailable("the storage does not answer")
            answer = call(*args, **named)
            if fault == "after":
                raise gateway.Unavailable("the storage does not answer")
            return answer

        return faulty


OUTCOMES = {
    "taken": sms.taken,
    "refused": sms.nexmo("6"),
    "failed": sms.nexmo("5"),
    "unknown": sms.reply("", 504),
}
CALLS = ["verify", "verify long", "resend", "guess", "right", "old", "unregister", "phone"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(CALLS),
        st.none() | st.sampled_from(CALLS),  # at the same time, from another client
        st.sampled_from(sorted(OUTCOMES)),
        st.lists(st.sampled_from(["", "before", "after"]), max_size=3),
        st.integers(0, 40),  # seconds until then
    ),
    min_size=1,
    max_size=12,
)


class Owed(ThreadPoolExecutor):
    """The threads of ``gateway.owe``, which a test can wait for."""

    def __init__(self) -> None:
        super().__init__(4)
        self.writes: list[Any] = []

    def submit(self, *args: Any, **named: Any) -> Any:
        self.writes.append(super().submit(*args, **named))
        return self.writes[-1]

    def wait(self) -> None:
        """Until all is written that was owed so far."""
        while self.writes:
            self.writes.pop().exception()


class Life:
    """One session, two clients of it, and all that can be said about it from outside."""

    def __init__(self, client: WsgiClient, owed: Owed, stand_in: Provider) -> None:
        self.client, self.owed, self.stand_in = client, owed, stand_in
        self.faults = Faults(client.gateway.storage)
        self.guesses, self.outcome, self.answered = 0, "taken", dict.fromkeys(OUTCOMES, 0)
        stand_in.answer = self.answer
        self.begin()

    def begin(self) -> None:
        self.client.register()
        assert self.client.credentials
        self.id = self.client.credentials.hawk_id
        self.counted_before = self.counted

    def answer(self, handler: Any) -> None:
        self.answered[self.outcome] += 1  # the provider's lock is not held, but the GIL is
        OUTCOMES[self.outcome](handler)

    @property
    def left(self) -> int:
        """Messages that left, or may have."""
        return self.answered["taken"] + self.answered["unknown"]

    @property
    def counted(self) -> int:
        """Messages that sessions are charged with: what a provider refuses for good is one, too."""
        return self.left + self.answered["refused"]

    def codes(self) -> list[str]:
        return [text.split()[-1] for text in self.stand_in.texts().get(NUMBER, [])]

    def call(self, what: str) -> None:
        client, codes = self.client.another(), self.codes()
        client.credentials, client.store_fails = self.client.credentials, True
        path, body = {
            "verify": ("/sms/verify", {"msisdn": NUMBER}),
            "verify long": ("/sms/mt/verify", {"msisdn": NUMBER}),
            "resend": ("/sms/resend_code", None),
            "guess": ("/sms/verify_code", {"code": "000000"}),
            "right": ("/sms/verify_code", {"code": codes[-1] if codes else "000000"}),
            "old": ("/sms/verify_code", {"code": codes[0] if codes else "000000"}),
            "unregister": ("/unregister", None),
            "phone": ("/sms/momt/?provider=nexmo", None),
        }[what]
        if what == "phone":
            query = f"&msisdn={NUMBER[1:]}&text={self.id}&messageId={random.random()}"
            answer = client.get(path + query)
        else:
            answer = client.call(path, body)
        assert answer.status < 500 or answer.status == 503
        self.guesses += is_counted_guess(answer)

    def step(self, first: str, second: str | None, outcome: str, plan: list[str]) -> None:
        self.outcome, self.faults.plan = outcome, plan
        with ThreadPoolExecutor(2) as pool:
            for run in [pool.submit(self.call, what) for what in (first, second) if what]:
                run.result()
        self.faults.plan = []
        self.owed.wait()  # which takes no time on the gateway's clock
        if not record_of(self.client):  # unregistered, maybe by what answered 503
            self.begin()
        assert self.guesses <= 3 * self.left


@pytest.mark.parametrize("tries", [1, 3])
def test_any_order_any_fault(
    make_client: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    clock, owed = Clock(), Owed()
    monkeypatch.setattr(gateway, "SETTLE_PAUSE_S", 0.005)
    monkeypatch.setattr(gateway, "_OWED", owed)
    with Provider(sms.taken) as stand_in:
        webhook = [{"kind": "nexmo", "path_secret": "s"}]
        options = {"sms_providers": [stand_in.nexmo()], "sms_inbound": webhook}
        limits = {"sends_per_hour": 10**6, "sends_per_session": 255, "code_tries": tries,
                  "sends_per_number": "60/day", "spend_per_day": 60.0, "sms_price": {"*": 1.0},
                  "unverified_per_destination": {"*": "9999999/second"}}  # fmt: skip
        client = make_client(clock=clock, **options, **limits)
        client.gateway.settings.inbound[0].pop("path_secret")  # a desk's, for this test
        storage = client.gateway.storage
        plain = {name: getattr(storage, name) for name in ("commit", "limit")}

        @examples(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(STEPS)
        def check(steps: list[Any]) -> None:
            for name, call in plain.items():
                setattr(storage, name, call)
            storage._run("FLUSHALL")
            stand_in.received.clear()
            clock.now_s += 100_000
            life = Life(client.another(), owed, stand_in)
            for first, second, outcome, plan, later_s in steps:
                life.step(first, second, outcome, plan)
                clock.now_s += later_s
            settled(life)

        check()


def settled(life: Life) -> None:
    """In the end nothing is counted that did not leave, and all that left is.

    The money counts attempts. The number counts messages, of which up to five are paid back; one
    that fails after it was paid back has been given back so.
    """
    app = life.client.gateway
    user = gateway.User.unpack(record_of(life.client))
    assert (counted(app, "m"), user.sends) == (life.left, life.counted - life.counted_before)
    paid_back = int(app.storage._run("GET", app.limits.key("b", NUMBER)) or 0)
    here = counted(app, "n", NUMBER)
    assert here >= life.left - min(5, paid_back)
    assert paid_back or here == life.left


# -- Double clicks, and codes that are faster than their message ---------------


@pytest.mark.parametrize("path", ["/sms/verify", "/sms/mt/verify", "/sms/resend_code"])
def test_twenty_clicks_are_one_message(start_gateway: Start, vonage: Provider, path: str) -> None:
    vonage.answer = sms.after(0.5)
    options = ("--resend-gaps-s", "[1, 60]", "--workers", "2")
    gate = start_gateway("--sms-providers", json.dumps([vonage.nexmo()]), *options)
    first = gate.client()
    first.register()
    body: Any = {"msisdn": NUMBER}
    if path == "/sms/resend_code":
        assert first.verify(NUMBER).status == 200
        time.sleep(1.1)
        vonage.received.clear()
        body = None

    clients = [gate.client() for _ in range(20)]
    for client in clients:
        client.credentials = first.credentials
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda client: client.call("POST", path, body), clients))
    for reply in replies:  # what comes next may change while the message is being sent
        assert ("next" in (reply.body or {})) == ("mt" not in path)
        (reply.body or {}).pop("next", None)
    assert {(reply.status, json.dumps(reply.body)) for reply in replies} == {
        (replies[0].status, json.dumps(replies[0].body))
    }
    assert replies[0].status == (204 if "mt" in path else 200)
    assert len(vonage.received) == 1
    assert first.verify_code(vonage.texts()[NUMBER][-1].split()[-1]).status == 200


def until() -> tuple[Callable[[Any], None], threading.Event]:
    """A provider's answer that comes when the event is set."""
    go_on = threading.Event()

    def answer(handler: Any) -> None:
        go_on.wait(20)
        sms.taken(handler)

    return answer, go_on


def test_a_code_that_outruns_its_message_is_not_judged(
    make_client: Callable[..., WsgiClient], vonage: Provider
) -> None:
    vonage.answer, go_on = until()
    client = make_client(sms_providers=[vonage.nexmo(timeout_s=10.0)])
    client.register()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.ask)
        servers.wait_for(lambda: vonage.received, "the message at the provider")
        code = vonage.texts()[NUMBER][0].split()[-1]
        for given_code in (code, "000000", code):
            early = client.call("/sms/verify_code", {"code": given_code})
            assert (early.status, early.errno, early.json["retryAfter"]) == (503, 201, 1)
        go_on.set()
        assert asked.result().status == 200
    assert client.call("/sms/verify_code", {"code": code}).status == 200


def test_an_older_code_is_judged_while_a_newer_one_is_being_sent(
    make_client: Callable[..., WsgiClient], vonage: Provider
) -> None:
    client = make_client(sms_providers=[vonage.nexmo(timeout_s=10.0)])
    client.register()
    assert client.ask().status == 200
    old = vonage.texts()[NUMBER][0].split()[-1]
    vonage.answer, go_on = until()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.call, "/sms/resend_code")
        servers.wait_for(lambda: len(vonage.received) == 2, "the message at the provider")
        wrong = client.call("/sms/verify_code", {"code": "000000"})
        assert (wrong.errno, wrong.json["message"]) == (105, "the code is wrong; tries left: 2")
        assert client.call("/sms/verify_code", {"code": old}).status == 200
        go_on.set()
        assert asked.result().status == 200
    new = vonage.texts()[NUMBER][1].split()[-1]
    assert client.call("/sms/verify_code", {"code": new}).status == 200


# -- A body that is held back -----------------------------------------------------


@pytest.mark.parametrize("path", ["/sms/mt/verify", "/certificate/sign"])
def test_a_request_is_fresh_when_its_body_has_come(
    make_client: Callable[..., WsgiClient], path: str
) -> None:
    """Whoever saw a request could send its head again, and its body when its nonce is forgotten."""
    clock = Clock()
    client = make_client(clock=clock, hawk_skew_s=1).verified()
    body = json.dumps({"msisdn": NUMBER, "publicKey": KEY}).encode()
    target = gateway.hawk_target("POST", f"http://{client.host}{path}")
    assert client.credentials
    sent = gateway.build_authorization(
        client.credentials, target, int(clock()), "seen", "application/json", body
    )

    class Late(io.BytesIO):
        """Comes when nobody could sign like that any more."""

        def read(self, *args: Any) -> bytes:
            clock.now_s += 10
            return super().read(*args)

    environ: dict[str, Any] = {"HTTP_AUTHORIZATION": sent, "wsgi.input": Late(body)}
    answer = client.raw("POST", path, body, environ)
    assert (answer.status, answer.errno) == (401, 109)
    assert "stale" in answer.json["message"]
    assert len(client.outbox()) == 1


# -- What the version before wrote ---------------------------------------------


OLD: Any = json.loads((ROOT / "tests" / "data_7d4f310.json").read_text())
"""A store as commit 7d4f310 left it, and what its clients know; made by that commit."""


@pytest.fixture
def upgraded(make_client: Callable[..., WsgiClient], storage: gateway.Storage) -> WsgiClient:
    """A gateway of today over data of then, a minute later."""
    for key, value in OLD["store"]:
        storage._run("SET", bytes.fromhex(key), bytes.fromhex(value))
    storage._run("RPUSH", "sends", f"{OLD['now_s']:.3f}")  # how messages were counted
    clock = Clock(OLD["now_s"] + 60)
    return make_client(master_secret=OLD["master_secret"], clock=clock, verified_ttl_s=0)


def of_then(upgraded: WsgiClient, name: str) -> tuple[WsgiClient, Any]:
    """A client that has its session since then."""
    client, known = upgraded.another(), OLD["sessions"][name]
    token = gateway.SessionToken(bytes.fromhex(known["token"]))
    client.credentials = gateway.derive_credentials(token)
    return client, known


def record_of(client: WsgiClient) -> bytes:
    """What the store holds of a client now."""
    assert client.credentials
    id = client.gateway.secrets.id_for(client.credentials.hawk_id)
    return client.gateway.storage.get(id) or b""


KEY = gateway.public_key_json(gateway.generate_key("RS256").public_key())
JWK = lab.public_jwk(ec.generate_private_key(ec.SECP256R1()))


def test_the_start_takes_data_of_then(upgraded: WsgiClient) -> None:
    master = bytes.fromhex(OLD["master_secret"])
    assert upgraded.gateway.storage.check(master) == []
    with pytest.raises(gateway.StartError, match="another master secret"):
        upgraded.gateway.storage.check(bytes(32))


def test_who_was_registered_then_is_served_on(upgraded: WsgiClient) -> None:
    client, _ = of_then(upgraded, "registered")
    assert client.call("/certificate/sign", {"publicKey": KEY}).errno == 104
    assert record_of(client)[0] == 1  # nothing of it changed
    assert client.ask().status == 200
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200
    record = record_of(client)
    assert record[0] == 2
    assert client.credentials
    assert bytes(client.credentials.hawk_key) not in record
    assert client.call("/unregister").status == 204
    assert record_of(client) == b""


@pytest.mark.parametrize("name", ["pending", "long", "verified, another code waits"])
def test_a_code_of_then_verifies(upgraded: WsgiClient, name: str) -> None:
    client, known = of_then(upgraded, name)
    wrong = known["code"][:-1] + ("0" if known["code"][-1] != "0" else "1")
    assert client.call("/sms/verify_code", {"code": wrong}).errno == 105
    assert client.ask("+447700900999").errno == 107  # its number is bound
    answer = client.call("/sms/verify_code", {"code": known["code"], "publicKey": KEY})
    assert answer.json["msisdn"] == known["msisdn"]
    claims = lab.claims(answer.json["cert"])
    issuer, secret = client.gateway.settings.issuer, client.gateway.secrets.principal
    principal = gateway.principal_for(secret, known["msisdn"], issuer)
    assert claims["principal"]["email"] == principal
    assert client.call("/sms/verify_code", {"code": known["code"]}).errno == 111


def test_tries_of_then_count_on(upgraded: WsgiClient) -> None:
    """One wrong code had been returned by then."""
    client, known = of_then(upgraded, "pending")
    answers = [client.call("/sms/verify_code", {"code": "000000"}).errno for _ in range(3)]
    assert answers == [105, 105, 111]
    assert client.call("/sms/verify_code", {"code": known["code"]}).errno == 111


@pytest.mark.parametrize("name", ["verified", "verified, another code waits"])
def test_who_was_verified_then_gets_certificates(upgraded: WsgiClient, name: str) -> None:
    client, known = of_then(upgraded, name)
    cert = client.call("/certificate/sign", {"publicKey": KEY}).json["cert"]
    claims = lab.claims(cert)
    assert claims["verifiedMSISDN"] == known["msisdn"]
    assert claims["lastVerifiedAt"] == OLD["now_s"] * 1000


def test_a_resend_of_then_has_the_kind_of_then(upgraded: WsgiClient) -> None:
    client, known = of_then(upgraded, "long")
    assert client.call("/sms/resend_code").status == 200
    assert len(client.code(known["msisdn"])) == 32


def test_a_start_over_data_of_then(start_gateway: Start, tmp_path: Path) -> None:
    """A real start, with the keys of then: those of today are made, and the store knows them."""
    data, keys = tmp_path / "data", tmp_path / "keys"
    settings = gateway.Settings(data_dir=str(data), keys_dir=str(keys))
    old = gateway.EmbeddedStore(str(data))
    storage = gateway.Storage(old.url)
    for key, value in OLD["store"]:
        storage._run("SET", bytes.fromhex(key), bytes.fromhex(value))
    for name in ("sends", "hour"):  # how messages were counted, and in a version in between
        storage._run("RPUSH", name, f"{OLD['now_s']:.3f}")
    old.stop()
    gateway.load_signing_key(settings)
    (keys / "master.secret").write_text(OLD["master_secret"])
    (keys / "master.secret").chmod(0o600)
    pair = (keys / "browserid.pem").read_bytes()
    assert {path.name for path in keys.iterdir()} == {"browserid.pem", "master.secret"}
    for _ in range(2):  # the second finds what the first has made
        process = start_gateway("--workers", "2", "--verified-ttl-s", "0")
        client = process.client()
        known = OLD["sessions"]["verified"]
        token = gateway.SessionToken(bytes.fromhex(known["token"]))
        client.credentials = gateway.derive_credentials(token)
        for public in (KEY, JWK):
            reply = client.call("POST", "/certificate/sign", {"publicKey": public})
            assert reply.status == 200, reply
            assert known["msisdn"] in lab.claims(reply.body["cert"].strip("~")).values()
        assert client.verify(known["msisdn"]).status == 200
        storage = gateway.Storage(gateway.embedded_url(str(data)))
        assert storage._run("GET", b"keys") == gateway.load_keys(settings)[0].fingerprint
        assert process.stop() == 0, process.output
    assert (keys / "browserid.pem").read_bytes() == pair
    gateway.add_proof_key(settings, 1)
    (keys / "proof-0.pem").unlink()
    assert start_gateway().stop() == 0  # as a rotation leaves it
    (keys / "proof-1.pem").unlink()
    ended = start_gateway(wait=False)
    assert ended.process.wait(60) == 1
    assert "other or newer signing keys" in ended.output
