"""Inbound messages and delivery receipts: who may call, what is read, what is answered."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from provider import Provider, reply
from support import NUMBER, WsgiClient

import gateway

MakeClient = Callable[..., WsgiClient]
FORM = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
ABROAD: dict[str, Any] = {
    "public_url": "https://id.example",
    "sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}],
}


def test_twilio_signs_the_public_url(make_client: MakeClient) -> None:
    """Behind a proxy neither the Host header nor the port that we listen on is what it called."""
    entry = {"kind": "twilio", "signature_secret": "t"}
    client = make_client(**ABROAD, sms_inbound=[entry])
    body = {"MessageSid": "SM1", "From": NUMBER, "Body": "hello"}
    text = "https://id.example/v1/msisdn/sms/momt/?provider=twilio&a=%20b"
    text += "".join(name + value for name, value in sorted(body.items()))
    import base64
    import hmac

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
    import hmac

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
    import hmac

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
    import hmac

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


@pytest.mark.parametrize("kind", gateway.SMS_LISTS["sms_inbound"])
def test_without_a_secret_only_on_loopback(make_client: MakeClient, kind: str) -> None:
    assert gateway.Settings(sms_inbound=[{"kind": kind}]).inbound
    with pytest.raises(gateway.SettingsError, match="sms_inbound"):
        gateway.Settings(**ABROAD, sms_inbound=[{"kind": kind}])
    assert gateway.Settings(**ABROAD, sms_inbound=[{"kind": kind, "path_secret": "x"}]).inbound


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
    ["", "+", "12345", "80808", "Bank", "+49110", "49110", "+12345", "tel:+447700900123",
     "0612345678", "+" + "9" * 20, "٤٤٧٧٠٠٩٠٠١٢٣", "+44 7700 900123; DROP", "\x00"],
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
    ("entry", "answer", "receipts", "outcomes"),
    [
        (
            NEXMO,
            {"messages": [{"status": "0", "message-id": "M1"}]},
            [{"messageId": "M1", "status": status} for status in ("buffered", "delivered")],
            ["sent", "delivered"],
        ),
        (
            NEXMO,
            {"messages": [{"status": "0", "message-id": "M1"}]},
            [{"messageId": "M2", "status": "failed"}, {"messageId": "M1", "status": "expired"}],
            ["sent", "failed"],
        ),
        (
            TWILIO,
            {"sid": "SM1"},
            [{"MessageSid": "SM1", "MessageStatus": s} for s in ("sent", "undelivered")],
            ["sent", "failed"],
        ),
    ],
)
def test_a_receipt_becomes_the_outcome_of_its_message(
    make_client: MakeClient, entry: Any, answer: Any, receipts: list[Any], outcomes: list[str]
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
    storage, message_id = client.gateway.storage, "M1" if kind == "nexmo" else "SM1"
    for params, expected in zip(receipts, outcomes, strict=True):
        body = urlencode({**params, "text": "Your verification code is: 123456"}).encode()
        assert client.raw("POST", url[21:], body, dict(FORM)).status == 200
        assert storage.outcome(kind, message_id) == expected
    assert 86_000 < storage._run("TTL", gateway._receipt_key(kind, message_id)) <= 86_400


def test_a_receipt_that_is_faster_than_the_answer_counts(make_client: MakeClient) -> None:
    client = make_client()
    client.get("/sms/receipt?provider=nexmo&messageId=M1&status=delivered")
    client.gateway.storage.note_outcome("nexmo", "M1", "sent", sent=True)
    assert client.gateway.storage.outcome("nexmo", "M1") == "delivered"
    assert client.gateway.storage.outcome("twilio", "M1") == ""


@pytest.mark.parametrize("path", ["/sms/receipt", "/sms/receipt/", "/v1/msisdn/sms/receipt/p4tH"])
def test_a_receipt_needs_the_secret_too(make_client: MakeClient, path: str) -> None:
    client = make_client(sms_inbound=[{"kind": "kannel", "path_secret": "p4th"}])
    assert client.get(path + "?provider=kannel&id=1&status=1").status == 403
    assert client.get(path + "?provider=nexmo&id=1&status=1").errno == 107
    assert client.gateway.storage.outcome("kannel", "1") == ""


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
    for secret in ("135790", NUMBER[1:], "DELIVRD", "M1"):
        assert secret not in caplog.text
