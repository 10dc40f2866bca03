"""Inbound messages and delivery receipts: who may call, what is read, what is answered."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from provider import Provider, reply
from support import NUMBER, WsgiClient, receipts, shared

import gateway

MakeClient = Callable[..., WsgiClient]
FORM = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
ABROAD: dict[str, Any] = {
    "public_url": "https://id.example",
    "sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}],
    "trusted_proxies": [],
}


def test_twilio_signs_the_public_url(make_client: MakeClient) -> None:
    """Behind a proxy neither the Host header nor the port that we listen on is what it called."""
    entry = {"kind": "twilio", "signature_secret": "t"}
    client = make_client(**ABROAD, sms_inbound=[entry])
    body = {"MessageSid": "SM1", "From": NUMBER, "Body": "hello"}
    text = "https://id.example/v1/msisdn/sms/momt/?provider=twilio&a=%20b"
    text += "".join(name + value for name, value in sorted(body.items()))
    env = {**FORM, "HTTP_HOST": "evil.example:1234"}
    for message, expected in ((text, 200), (text.replace("id.", "evil."), 403)):
        digest = base64.b64encode(hmac.digest(b"t", message.encode(), "sha1")).decode()
        env["HTTP_X_TWILIO_SIGNATURE"] = digest
        path = "/v1/msisdn/sms/momt/?provider=twilio&a=%20b"
        assert client.raw("POST", path, urlencode(body).encode(), env).status == expected


@pytest.mark.parametrize(("age_s", "expected"), [(0, 200), (80_000, 200), (90_000, 403)])
def test_a_signature_does_not_last_for_ever(
    make_client: MakeClient, age_s: int, expected: int
) -> None:
    """Ids of messages are remembered for a day; an older call could be a replay."""
    client = make_client(sms_inbound=[{"kind": "nexmo", "signature_secret": "t"}])
    params = {"msisdn": NUMBER[1:], "text": "x", "timestamp": str(int(time.time()) - age_s)}
    text = "".join(f"&{name}={params[name]}" for name in sorted(params))
    params["sig"] = hmac.digest(b"t", text.encode(), "sha256").hex()
    assert client.get("/sms/momt/?provider=nexmo&" + urlencode(params)).status == expected


@pytest.mark.parametrize("name", ["messageId", "timestamp"])
def test_a_signed_call_cannot_be_cut_into_other_parameters(
    make_client: MakeClient, name: str
) -> None:
    """``&a=1&b=2`` is signed; "a=1&b" with the value 2 would give the same text."""
    client = make_client(sms_inbound=[{"kind": "nexmo", "signature_secret": "t"}])
    params = {"msisdn": NUMBER[1:], "text": "x", "messageId": "M1", "to": "447700900000"}
    params |= {"timestamp": str(int(time.time()))}
    text = "".join(f"&{key}={params[key]}" for key in sorted(params))
    sig = hmac.digest(b"t", text.encode(), "sha256").hex()
    order = sorted(params)
    after = order[order.index(name) + 1]
    cut = {key: value for key, value in params.items() if key not in (name, after)}
    cut[f"{name}={params[name]}&{after}"] = params[after]
    path = "/sms/momt/?provider=nexmo&"
    assert client.get(path + urlencode({**params, "sig": sig})).status == 200
    assert client.get(path + urlencode({**cut, "sig": sig})).status == 403


@pytest.mark.parametrize("field", ["provider", "secret"])
@pytest.mark.parametrize("value", ["of its own", None, 5])
def test_a_body_may_have_fields_of_our_names(
    make_client: MakeClient, field: str, value: object
) -> None:
    """What the URL says is ours; Vonage signs what the body says."""
    entry = {"kind": "nexmo", "signature_secret": "t", "path_secret": "p"}
    client = make_client(sms_inbound=[entry])
    body = {"msisdn": NUMBER[1:], "text": "x", field: value}
    text = "".join(f"&{name}={body[name]}" for name in sorted(body))
    body["sig"] = hmac.digest(b"t", text.encode(), "sha256").hex()
    for path, expected in (
        ("/sms/momt/?provider=nexmo&secret=p", 200), ("/sms/momt/p?provider=nexmo", 200),
        ("/sms/momt/q?provider=nexmo", 403), ("/sms/momt/?provider=nexmo", 403),
    ):  # fmt: skip
        assert client.raw("POST", path, json.dumps(body).encode()).status == expected, path


# -- Without a signature --------------------------------------------------------


OUTBOX: list[Any] = [{"kind": "outbox"}]
PAID: list[Any] = ABROAD["sms_providers"]


@pytest.mark.parametrize("kind", gateway.SMS_LISTS["sms_inbound"])
@pytest.mark.parametrize(
    ("place", "at_a_desk"),
    [
        ({}, True),
        ({"public_url": "http://localhost:5000"}, True),
        ({"host": "::1"}, True),
        ({"sms_providers": OUTBOX * 2}, True),
        # loopback is what every page in a browser here can reach, and now messages cost money
        ({"sms_providers": PAID}, False),
        ({"sms_providers": OUTBOX + PAID}, False),
        ({"sms_providers": PAID + OUTBOX}, False),
        ({"sms_providers": PAID, "public_url": "http://127.0.0.1:5000"}, False),
        (ABROAD, False),
        ({"host": "0.0.0.0", **ABROAD}, False),
        ({"host": "192.0.2.1", "public_url": "http://localhost", "sms_providers": PAID}, False),
    ],
    ids=str,
)
def test_without_a_secret_only_at_a_desk(kind: str, place: dict[str, Any], at_a_desk: bool) -> None:
    """Where nothing can be reached from elsewhere, and nothing costs money."""
    assert gateway.Settings(**place).at_a_desk == at_a_desk
    defaults = [entry["kind"] for entry in gateway.Settings(**place).inbound]
    assert defaults == (["nexmo", "beepsend"] if at_a_desk else [])
    if at_a_desk:
        assert gateway.Settings(**place, sms_inbound=[{"kind": kind}]).inbound
    else:
        with pytest.raises(gateway.SettingsError, match="sms_inbound"):
            gateway.Settings(**place, sms_inbound=[{"kind": kind}])
    entry = {"kind": kind, "path_secret": "x"}
    assert gateway.Settings(**place, sms_inbound=[entry]).inbound == [entry]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_paid_provider_closes_the_webhooks_that_were_open(
    make_client: MakeClient, method: str
) -> None:
    """An <img> on any page could have had messages sent, at our cost."""
    with Provider(reply({"messages": [{"status": "0"}]})) as provider:
        client = make_client(sms_providers=[provider.nexmo()])
        client.register()
        assert client.credentials
        query = urlencode({"msisdn": NUMBER[1:], "text": client.credentials.hawk_id})
        for kind in gateway.SMS_LISTS["sms_inbound"]:
            answer = client.raw(method, f"/sms/momt/?provider={kind}&{query}")
            assert (answer.status, answer.errno) == (400, 107)
        assert provider.received == []


# -- How much is read -----------------------------------------------------------


@pytest.mark.parametrize("where", ["query", "form"])
@pytest.mark.parametrize(
    ("fields", "status"), [(1, 200), (98, 200), (99, 400), (1000, 400), (15_000, 400)]
)
def test_a_webhook_has_at_most_100_parameters(
    client: WsgiClient, where: str, fields: int, status: int
) -> None:
    """Providers send thirty; 9,000 in one URL took 24 ms under the interpreter's lock."""
    more = "&".join(["a=1"] * fields)
    if where == "query":
        answer = client.get(f"/sms/momt/?provider=nexmo&text=x&{more}")
    else:
        body = f"text=x&text=y&{more}".encode()
        if len(body) > 10_240:
            return
        answer = client.raw("POST", "/sms/momt/?provider=nexmo", body, dict(FORM))
    assert answer.status == status
    if status == 400:
        assert answer.errno == 107
        assert "at most 100 parameters" in answer.json["message"]


@pytest.mark.parametrize("path", ["/sms/momt/", "/sms/momt", "/sms/receipt", "/v1/msisdn/sms/momt"])
@pytest.mark.parametrize("provider", ["nexmo", "twilio", ""])
def test_many_parameters_are_cheap(client: WsgiClient, path: str, provider: str) -> None:
    """60,000 bytes of them, to webhooks open and closed: they are counted, and not read."""
    query = f"provider={provider}&" + "&".join(["a=%41"] * 10_000)
    spent_s = []
    for _ in range(5):
        before_s = time.thread_time()
        answer = client.get(f"{path}?{query}")
        spent_s.append(time.thread_time() - before_s)
        assert (answer.status, answer.errno) == (400, 107)
    assert min(spent_s) < 0.006 * shared()  # 24 ms when they were read


# -- Once ------------------------------------------------------------------------

SIGNED = [{"kind": "nexmo", "signature_secret": "t"}, {"kind": "twilio", "signature_secret": "t"}]


def vonage_call(client: WsgiClient, **more: str) -> dict[str, str]:
    """What Vonage sends and signs when a phone has sent the client's Hawk id; no id of its own."""
    assert client.credentials
    params = {"msisdn": NUMBER[1:], "text": client.credentials.hawk_id, "to": "447700900999"}
    params |= {"timestamp": str(int(time.time())), **more}
    text = "".join(f"&{name}={params[name]}" for name in sorted(params))
    return {**params, "sig": hmac.digest(b"t", text.encode(), "sha256").hex()}


def twilio_call(client: WsgiClient, form: dict[str, str]) -> int:
    """Call the webhook as Twilio does, signed; gives the status."""
    text = "http://127.0.0.1:5000/sms/momt/?provider=twilio"
    text += "".join(name + value for name, value in sorted(form.items()))
    return twilio_replay(client, form, twilio_signature(text))


def twilio_signature(text: str) -> str:
    """Of a URL and the names and values behind it."""
    return base64.b64encode(hmac.digest(b"t", text.encode(), "sha1")).decode()


def twilio_replay(client: WsgiClient, form: dict[str, str], signature: str) -> int:
    """Call it with a signature that was seen."""
    env = {**FORM, "HTTP_X_TWILIO_SIGNATURE": signature}
    return client.raw("POST", "/sms/momt/?provider=twilio", urlencode(form).encode(), env).status


@pytest.mark.slow
@pytest.mark.parametrize("with_id", [True, False])
def test_a_signed_call_is_answered_once(make_client: MakeClient, with_id: bool) -> None:
    """Without an id of the message the signature is what is remembered, for a day."""
    client = make_client(sms_inbound=SIGNED)
    client.register()
    params = vonage_call(client, **({"messageId": "M1"} if with_id else {}))
    path = "/sms/momt/?provider=nexmo"
    calls: list[Callable[[], Any]] = [
        lambda: client.get(f"{path}&{urlencode(params)}"),
        lambda: client.raw("POST", path, urlencode(params).encode(), dict(FORM)),
        lambda: client.raw("POST", path, json.dumps(params).encode()),
        lambda: client.get(f"/v1/msisdn{path}&{urlencode(dict(reversed(params.items())))}"),
    ]
    for call in calls * 2:
        assert call().json == {}
    assert len(client.outbox()) == 1
    assert client.credentials
    storage_id = client.gateway.secrets.id_for(client.credentials.hawk_id)
    nonce = "sms " + ("M1" if with_id else params["sig"])
    key = gateway.nonce_key(storage_id, nonce)
    assert 86_000 < client.gateway.storage._run("TTL", key) <= 86_400
    time.sleep(1.1)  # the next call of the provider has another time
    again = vonage_call(client, **({"messageId": "M2"} if with_id else {}))
    assert client.get(f"{path}&{urlencode(again)}").json == {}
    assert len(client.outbox()) == 2


@pytest.mark.parametrize("spell", [str.upper, str.title])
def test_another_spelling_of_a_signature_is_no_other_call(
    make_client: MakeClient, spell: Callable[[str], str]
) -> None:
    """Hex digits may be capitals, and so one signature has millions of spellings."""
    client = make_client(sms_inbound=SIGNED)
    client.register()
    params = vonage_call(client)
    for sig in (params["sig"], spell(params["sig"])):
        query = urlencode({**params, "sig": sig})
        assert client.get(f"/sms/momt/?provider=nexmo&{query}").json == {}
    assert len(client.outbox()) == 1


def test_nobody_elses_header_makes_another_call_of_it(make_client: MakeClient) -> None:
    """Vonage does not sign headers, and Twilio's is none of its own."""
    client = make_client(sms_inbound=SIGNED)
    client.register()
    query = urlencode(vonage_call(client, messageId="M1"))
    for signature in ("", "x", "y"):
        env = {"HTTP_X_TWILIO_SIGNATURE": signature}
        assert client.get(f"/sms/momt/?provider=nexmo&{query}", **env).json == {}
    assert len(client.outbox()) == 1


@pytest.mark.parametrize(
    ("cut", "status"),
    [
        ({}, 200),
        ({"MessageSid": None, "MessageSi": "dSM1"}, 200),  # its id is hidden in a name,
        ({"MessageSid": None, "M": "essageSidSM1"}, 200),
        ({"MessageSid": "SM1To+447700900999", "To": None}, 200),  # or is another one
        ({"MessageSid": None, "MessageSidSM1": ""}, 200),
        ({"MessageSid": None, "From": NUMBER + "MessageSidSM1"}, 200),  # which is no number
        ({"Body": None, "Bod": "y{id}"}, 200),  # which says nothing
        # and what its signature does cover
        ({"MessageSid": "SM2"}, 403),
        ({"MessageSid": None}, 403),
        ({"From": "+447700900124"}, 403),
        ({"To": None, "T": "o+447700900999", "Mo": ""}, 403),
    ],
    ids=str,
)
def test_a_call_of_twilio_that_is_cut_anew_is_the_same_call(
    make_client: MakeClient, cut: dict[str, str | None], status: int
) -> None:
    """It signs names and values without anything between them: where one ends is not signed.

    So not the id in it is remembered, but the signature.
    """
    client = make_client(sms_inbound=SIGNED)
    client.register()
    assert client.credentials
    hawk_id = client.credentials.hawk_id
    form = {"Body": hawk_id, "From": NUMBER, "MessageSid": "SM1", "To": "+447700900999"}
    url = "http://127.0.0.1:5000/sms/momt/?provider=twilio"
    seen = twilio_signature(url + "".join(name + value for name, value in sorted(form.items())))
    anew = {**form, **{k: v and v.format(id=hawk_id) for k, v in cut.items()}}
    for parts in (form, {k: v for k, v in anew.items() if v is not None}, form):
        expected = status if parts != form else 200
        assert twilio_replay(client, parts, seen) == expected
        assert len(client.outbox()) == 1


def test_two_messages_by_twilio_are_two(make_client: MakeClient) -> None:
    client = make_client(sms_inbound=SIGNED)
    client.register()
    assert client.credentials
    form = {"Body": client.credentials.hawk_id, "From": NUMBER}
    for sid, sent in (("SM1", 1), ("SM1", 1), ("SM2", 2), ("SM1", 2), ("", 3)):
        assert twilio_call(client, {**form, "MessageSid": sid} if sid else form) == 200
        assert len(client.outbox()) == sent


@pytest.mark.parametrize("kind", gateway.SMS_LISTS["sms_inbound"])
def test_an_unsigned_call_without_an_id_is_never_taken_for_a_replay(
    make_client: MakeClient, kind: str
) -> None:
    """Two users' phones, or one phone twice: nothing tells them apart, so each is answered."""
    client = make_client(sms_inbound=[{"kind": kind}])
    client.register()
    assert client.credentials
    text = client.credentials.hawk_id
    body = {"msisdn": NUMBER, "text": text, "From": NUMBER, "Body": text, "from": NUMBER}
    body |= {"message": text}
    payload = {"sender": NUMBER, "message": text}
    for n in range(3):
        sent = json.dumps({**body, "payload": payload}).encode()
        assert client.raw("POST", f"/sms/momt/?provider={kind}", sent).status == 200
        assert len(client.outbox()) == n + 1
    assert client.gateway.storage._run("KEYS", "{*") == []


@pytest.mark.parametrize("kind", ["kannel", "beepsend", "http"])
def test_a_signature_secret_that_nobody_would_check_is_refused(kind: str) -> None:
    with pytest.raises(gateway.SettingsError, match="signature_secret") as caught:
        gateway.Settings(sms_inbound=[{"kind": kind, "signature_secret": "hunter2"}])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("kind", ["kannel", "http", "beepsend"])
@pytest.mark.parametrize("where", ["path", "query"])
def test_a_secret_in_path_or_query(make_client: MakeClient, kind: str, where: str) -> None:
    client = make_client(sms_inbound=[{"kind": kind, "path_secret": "p4th"}])
    client.register()
    assert client.credentials
    query = urlencode({"from": NUMBER, "text": client.credentials.hawk_id, "id": "1"})
    for secret, expected in (("", 403), ("p4tH", 403), ("é", 403), ("p4th", 200)):
        quoted = urlencode({"secret": secret})
        path = f"/sms/momt/{secret if where == 'path' else ''}?provider={kind}&{query}"
        path = path.encode().decode("latin-1") + f"&{quoted}" * (where == "query")
        answer = client.get(path)
        assert answer.status == expected
        assert len(client.outbox()) == (expected == 200)
    assert answer.data == (b"{}" if kind == "beepsend" else b"")  # Kannel would send it on


@pytest.mark.parametrize(
    "sender",
    ["", "+", "12345", "80808", "Bank", "+49110", "49110", "+12345", "tel:Bank",
     "0612345678", "+" + "9" * 20, "+44 7700 900123; DROP", "\x00"],
)  # fmt: skip
def test_odd_senders_do_no_harm(make_client: MakeClient, sender: str) -> None:
    client = make_client(sms_inbound=[{"kind": "http"}])
    client.register()
    assert client.credentials
    body = {"from": sender, "text": client.credentials.hawk_id, "id": "1"}
    answer = client.raw("POST", "/sms/momt/?provider=http", json.dumps(body).encode())
    assert (answer.status, answer.data) == (200, b"")
    assert list((client.gateway.sms.outbox.folder).glob("*")) == []  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    ["", "x" * 9000, "😀" * 500, "{}" * 40, "a" * 63, "a" * 65, "\ud800", "ａ" * 64, "\0" * 64],
)
def test_odd_texts_do_no_harm(make_client: MakeClient, text: str) -> None:
    client = make_client(sms_inbound=[{"kind": "http"}])
    body = json.dumps({"from": NUMBER, "text": text}).encode()
    answer = client.raw("POST", "/sms/momt/?provider=http", body)
    assert (answer.status, answer.data) in ((200, b""), (413, answer.data))
    assert client.outbox() == []


# -- Receipts -------------------------------------------------------------------

NEXMO = {"kind": "nexmo", "api_key": "k", "api_secret": "s", "receipts": True}
TWILIO = {"kind": "twilio", "account_sid": "AC1", "auth_token": "t", "receipts": True}


@pytest.mark.parametrize(
    ("entry", "answer", "reports", "outcomes"),
    [
        (
            NEXMO,
            {"messages": [{"status": "0", "message-id": "M1"}]},
            [{"messageId": "M1", "status": status} for status in ("buffered", "delivered")],
            ["", "delivered"],
        ),
        (
            NEXMO,
            {"messages": [{"status": "0", "message-id": "M1"}]},
            [{"messageId": "M2", "status": "failed"}, {"messageId": "M1", "status": "expired"}],
            ["failed", "failed"],
        ),
        (
            TWILIO,
            {"sid": "SM1"},
            [{"MessageSid": "SM1", "MessageStatus": s} for s in ("sent", "undelivered")],
            ["", "failed"],
        ),
    ],
)
def test_a_receipt_is_counted_once_it_is_final(
    make_client: MakeClient, entry: Any, answer: Any, reports: list[Any], outcomes: list[str]
) -> None:
    kind, inbound = entry["kind"], [{"kind": entry["kind"], "path_secret": "p4th"}]
    with Provider(reply(answer)) as provider:
        endpoint = {"endpoint": provider.url}
        client = make_client(sms_providers=[{**entry, **endpoint}], sms_inbound=inbound)
        client.register()
        assert client.ask().status == 200
        form = provider.received[0].form
    url = form.get("callback") or form["StatusCallback"]
    assert url == f"http://127.0.0.1:5000/sms/receipt/p4th?provider={kind}"
    for n, params in enumerate(reports):
        body = urlencode({**params, "text": "Your verification code is: 123456"}).encode()
        assert client.raw("POST", url[21:], body, dict(FORM)).status == 200
        assert receipts(client.gateway, kind) == Counter(filter(None, outcomes[: n + 1]))


@pytest.mark.parametrize("path", ["/sms/receipt", "/sms/receipt/", "/v1/msisdn/sms/receipt/p4tH"])
def test_a_receipt_needs_the_secret_too(make_client: MakeClient, path: str) -> None:
    client = make_client(sms_inbound=[{"kind": "kannel", "path_secret": "p4th"}])
    assert client.get(path + "?provider=kannel&id=1&status=1").status == 403
    assert client.get(path + "?provider=nexmo&id=1&status=1").errno == 107
    assert receipts(client.gateway, "kannel") == {}


@pytest.mark.parametrize("query", ["", "id=1", "status=1", "id=1&status=99", "id=1&status=é"])
def test_a_receipt_that_says_nothing_changes_nothing(client: WsgiClient, query: str) -> None:
    query = query.encode().decode("latin-1")
    assert client.get(f"/sms/receipt/?provider=nexmo&{query}").json == {}
    assert client.gateway.storage._run("KEYS", "receipt*") == []


def test_a_receipt_that_quotes_the_message_is_not_logged(
    client: WsgiClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    quote = "id:1 stat:DELIVRD text:Your verification code is: 135790"
    params = {"messageId": "M1", "status": "delivered", "msisdn": NUMBER[1:], "text": quote}
    assert client.get("/sms/receipt?provider=nexmo&" + urlencode(params)).json == {}
    assert "receipt: delivered" in caplog.text
    for secret in ("135790", NUMBER[1:], "DELIVRD"):
        assert secret not in caplog.text
