"""What an attacker tried on limits, webhooks and proofs, and how it ends now."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from provider import Provider
from support import NUMBER, Clock, WsgiClient
from test_limit_table import DEFAULTS, HERE, THERE, From, client, level, named, paid, stand_in

import gateway

__all__ = ["client", "paid", "stand_in"]  # fixtures
Client = Callable[..., WsgiClient]
SECRET = "hunter2"


# -- Limits -------------------------------------------------------------------


def test_one_network_of_ipv6_leaves_something_of_a_number(client: From) -> None:
    """A home has a /56, so a person has 256 networks of 64 bits: these are one address here."""
    answers = [client.at(f"2001:db8:0:{n}::1").ask() for n in range(5)]
    assert [answer.status for answer in answers] == [200] * 3 + [429] * 2
    named(answers[-1], 115, "sends_per_number_from_address")
    assert client.at(THERE).ask().status == 200


def test_an_attempt_that_cannot_be_counted_gives_back_no_message_that_may_have_left(
    make_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first provider may have taken it; then the store fails while the next is counted."""

    def taken_or_not(handler: Any) -> None:
        handler.close_connection = True  # without an answer

    with Provider(taken_or_not) as first, Provider(taken_or_not) as second:
        providers = [first.nexmo(priority=2), second.nexmo(priority=1)]
        app = make_client(clock=Clock(), sms_providers=providers, **DEFAULTS).app
        client = From(app).at(HERE)
        limit, calls = app.gateway.storage.limit, []

        def fails_once(script: str, keys: list[bytes], *args: Any) -> Any:
            calls.append(script)
            if script is gateway.TAKE_SCRIPT and calls.count(script) == 2:
                raise gateway.Unavailable("the storage does not answer; try again")
            return limit(script, keys, *args)

        monkeypatch.setattr(app.gateway.storage, "limit", fails_once)
        assert client.ask().status == 200
        assert (len(first.received), len(second.received)) == (1, 0)
        time.sleep(0.5)  # what is owed is paid in another thread
        assert level(client, "n", NUMBER) == level(client, "h", "") == 1


# -- Webhooks -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["smsgate", "http"])
@pytest.mark.parametrize("sender", ["07700900ADD", "+44 7700 900ADD"])
def test_a_sender_in_letters_is_no_phone(make_client: Client, kind: str, sender: str) -> None:
    """Anybody can buy a sender of letters; libphonenumber reads these as keys of a phone."""
    entry = {"kind": kind, "country": "GB", "path_secret": SECRET}
    client = make_client(sms_inbound=[entry])
    client.register()
    assert client.credentials
    text = client.credentials.hawk_id
    body = (
        {"payload": {"sender": sender, "message": text}}
        if kind == "smsgate"
        else {"from": sender, "text": text}
    )
    path = f"/sms/momt/{SECRET}?provider={kind}"
    assert client.call(path, body, signed=False).status == 200
    assert client.outbox("+447700900233") == []


def test_parts_that_wait_are_no_session(make_client: Client) -> None:
    """Whoever sent a part can compute its name; it must not lead to a 503, which is repeated."""
    client = make_client()
    names = f"{NUMBER} 77 2"
    part = {"msisdn": NUMBER[1:], "text": "a", "concat-ref": "77", "concat-part": "1",
            "concat-total": "2"}  # fmt: skip
    path = "/sms/momt?provider=nexmo"
    assert client.call(path, part, signed=False).status == 200
    name = hashlib.sha256(names.encode()).hexdigest()
    whole = {"msisdn": NUMBER[1:], "text": name}
    assert client.call(path, whole, signed=False).status == 200
    key = gateway.HawkKey(bytes(32))
    client.credentials = gateway.Credentials(gateway.HawkId(name), key)
    assert client.call("/session", method="GET").errno == 110


# -- Numbers ------------------------------------------------------------------


def test_a_session_of_an_old_form_is_that_of_the_living_one(make_client: Client) -> None:
    """Until November 2026 a session could hold +52 1 …; its owner must be able to end it."""
    clock, old, living = Clock(), gateway.Msisdn("+5215555550123"), "+525555550123"
    client = make_client(clock=clock)
    client.register()
    assert client.credentials
    gate, hawk_id = client.gateway, client.credentials.hawk_id
    key = gate.secrets.id_for(hawk_id)
    user = gateway.User.unpack(gate.storage.get(key) or b"")
    sealed = gateway.seal_msisdn(gate.secrets.seal, hawk_id, old)
    verified = user._replace(sealed=sealed, verified_s=int(clock.now_s) - 9000)
    gate.storage.create(key, verified.pack(), 1000)
    assert client.call("/session", method="GET").json["msisdn"] == living
    assert client.call("/sms/resend_code").status == 200
    assert client.call("/sms/verify_code", {"code": client.code(living)}).status == 200
    clock.now_s += 1
    owner = client.another()
    owner.register()
    assert owner.ask(old).status == 200
    assert owner.call("/sms/verify_code", {"code": owner.code(living)}).json["msisdn"] == living
    assert owner.call("/unregister", {"everywhere": True}).status == 204
    public = gateway.public_key_json(gateway.generate_key("RS256").public_key())
    assert client.call("/certificate/sign", {"publicKey": public}).errno == 104


# -- Proofs -------------------------------------------------------------------


def test_a_replayed_everywhere_ends_nothing(make_client: Client) -> None:
    """It was refused when it came first, and its nonce was used up by that."""
    clock = Clock()
    client = make_client(clock=clock, code_ttl_s=5)
    client.verified()
    clock.now_s += 6
    spent: dict[str, Any] = {"ts": int(clock.now_s), "nonce": "spent"}
    assert client.call("/unregister", {"everywhere": True}, **spent).errno == 104
    assert client.ask().status == 200
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200
    other = client.another().verified()
    assert client.call("/unregister", {"everywhere": True}, **spent).errno == 109
    key = gateway.public_key_json(gateway.generate_key("RS256").public_key())
    for one in (client, other):
        assert one.call("/certificate/sign", {"publicKey": key}).status == 200
    assert client.call("/unregister", {"everywhere": True}).status == 204
    assert other.call("/certificate/sign", {"publicKey": key}).errno == 104
