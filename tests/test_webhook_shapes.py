"""What phones send, however a provider writes it: parts, alphabets, types, senders, signatures."""

from __future__ import annotations

import base64
import hmac
import itertools
import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_from_bytes, urlencode

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support import NUMBER, WsgiClient, receipts

import gateway

MakeClient = Callable[..., WsgiClient]
FORM = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
OTHER = "+447700900124"
CYRILLIC = "Мой код подтверждения: {}"
"""With a Hawk id 87 units of UCS-2, so two parts (FAULTS_A F02)."""
KINDS = list(gateway.SMS_LISTS["sms_inbound"])


def opened(make_client: MakeClient, *kinds: str, **more: Any) -> WsgiClient:
    """A client with a session, at a desk whose webhooks are open."""
    client = make_client(sms_inbound=[{"kind": kind, **more} for kind in kinds])
    client.register()
    return client


def hawk_id(client: WsgiClient) -> str:
    """What the phone sends."""
    assert client.credentials
    return client.credentials.hawk_id


def parts_of(text: str, n: int) -> list[str]:
    """A text in ``n`` parts."""
    size = -(-len(text) // n)
    return [text[at * size :][:size] for at in range(n)]


def vonage_parts(text: str, n: int, ref: str = "08B5", **more: str) -> list[dict[str, str]]:
    """As Vonage delivers them (developer.vonage.com, "Inbound SMS", "Concatenated")."""
    return [
        {"msisdn": NUMBER[1:], "to": "447700900999", "messageId": f"0A{ref}{at}", "text": part,
         "concat": "true", "concat-ref": ref, "concat-total": str(n), "concat-part": str(at + 1),
         **more}
        for at, part in enumerate(parts_of(text, n))
    ]  # fmt: skip


def deliver(client: WsgiClient, fields: dict[str, str], kind: str = "nexmo") -> None:
    """By GET."""
    assert client.get(f"/sms/momt/?provider={kind}&{urlencode(fields)}").status == 200


# -- Parts -----------------------------------------------------------------------


@pytest.mark.parametrize("words", ["{}", CYRILLIC, "x" * 160 + " {} " + "y" * 100])
@pytest.mark.parametrize("n", [2, 3])
def test_parts_are_put_together_in_any_order(make_client: MakeClient, words: str, n: int) -> None:
    for number, order in enumerate(itertools.permutations(range(n))):
        client = opened(make_client, "nexmo")
        parts = vonage_parts(words.format(hawk_id(client)), n, str(number))
        for sent, at in enumerate(order):
            assert client.outbox() == [], sent
            deliver(client, parts[at])
        [message] = client.outbox()
        assert client.call("/sms/verify_code", {"code": message["text"]}).status == 200
        for at in order:  # each of them again
            deliver(client, parts[at])
        assert len(client.outbox()) == 1
        assert client.call("/unregister").status == 204


def test_parts_of_others_are_others(make_client: MakeClient) -> None:
    """Another sender, reference or number of parts: another message."""
    client = opened(make_client, "nexmo")
    first, second = vonage_parts(hawk_id(client), 2)
    for change in ({"msisdn": OTHER[1:]}, {"concat-ref": "08B6"}, {"concat-total": "3"}):
        deliver(client, first)
        deliver(client, {**second, **change})
        assert client.outbox() == []
        assert client.outbox(OTHER) == []
    deliver(client, second)
    assert len(client.outbox()) == 1


@pytest.mark.parametrize(
    ("part", "parts"), [("3", "2"), ("0", "2"), ("1", "0"), ("1", "11"), ("x", "2"), ("", "2"),
                        ("-1", "2"), ("1" * 5000, "2"), ("²", "2")]
)  # fmt: skip
def test_part_fields_that_make_no_sense_are_left_out(
    make_client: MakeClient, part: str, parts: str
) -> None:
    client = opened(make_client, "nexmo")
    whole = {"msisdn": NUMBER[1:], "text": hawk_id(client), "concat-ref": "1"}
    body = json.dumps({**whole, "concat-part": part, "concat-total": parts}).encode()
    assert client.raw("POST", "/sms/momt/?provider=nexmo", body).status == 200
    assert len(client.outbox()) == 1


def test_parts_cost_little_and_tell_nothing(make_client: MakeClient) -> None:
    client = opened(make_client, "nexmo")
    store = client.gateway.storage
    before = set(store._run("KEYS", "*"))
    long = [{**part, "text": part["text"] + "z" * 5000} for part in vonage_parts("0123456789", 10)]
    for part in long[:9]:
        deliver(client, part)
    [key] = set(store._run("KEYS", "*")) - before
    assert 590 < store._run("TTL", key) <= gateway.PARTS_S
    assert store._run("MEMORY", "USAGE", key) < 8_000
    dump = b"".join(store._run("HVALS", key)) + key
    assert b"zzz" not in dump
    assert NUMBER[1:].encode() not in dump


def test_a_late_part_does_not_lengthen_the_wait(make_client: MakeClient) -> None:
    client = opened(make_client, "nexmo")
    store = client.gateway.storage
    before = set(store._run("KEYS", "*"))
    first, second, _ = vonage_parts(hawk_id(client), 3)
    deliver(client, first)
    [key] = set(store._run("KEYS", "*")) - before
    store._run("EXPIRE", key, 100)
    deliver(client, second)
    assert store._run("TTL", key) <= 100


@pytest.mark.parametrize("coding", ["", "2"])
@pytest.mark.parametrize("header", ["050003{:02x}{:02x}{:02x}", "060804{:04x}{:02x}{:02x}"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_kannel_without_mo_recode(
    make_client: MakeClient, coding: str, header: str, n: int
) -> None:
    """FAULTS_A F03. Without ``coding`` the zeros tell it: the id is in ASCII."""
    client = opened(make_client, "kannel")
    text = (CYRILLIC if coding else "{}").format(hawk_id(client))
    for at, part in reversed(list(enumerate(parts_of(text, n)))):
        octets = quote_from_bytes(part.encode("utf-16-be"))
        udh = quote_from_bytes(bytes.fromhex(header.format(0xE9, n, at + 1))) if n > 1 else ""
        query = f"from=%2B{NUMBER[1:]}&text={octets}&id={at}&coding={coding}&udh={udh}"
        assert client.get(f"/sms/momt/?provider=kannel&{query}").status == 200
    assert len(client.outbox()) == 1


def test_kannel_in_utf8_as_before(make_client: MakeClient) -> None:
    client = opened(make_client, "kannel")
    deliver(client, {"from": NUMBER, "text": CYRILLIC.format(hawk_id(client))}, "kannel")
    assert len(client.outbox()) == 1


# -- Types of bodies, names of fields ----------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "mark"),
    [("text/plain; charset=UTF-8", b""), ("application/json", b"\xef\xbb\xbf"), ("text/json", b""),
     ("application/vnd.api+json", b""), (None, b""), ("application/octet-stream", b"")],
)  # fmt: skip
def test_json_by_any_name(make_client: MakeClient, content_type: str, mark: bytes) -> None:
    """FAULTS_A F09."""
    client = opened(make_client, "http")
    body = mark + json.dumps({"from": NUMBER, "text": hawk_id(client)}).encode()
    answer = client.raw("POST", "/sms/momt/?provider=http", body, {"CONTENT_TYPE": content_type})
    assert (answer.status, answer.data, len(client.outbox())) == (200, b"", 1)


@pytest.mark.parametrize(
    ("fields", "document"),
    [
        ({"from": "0.phone", "text": "0.content"}, [{"phone": NUMBER, "content": "{}"}]),
        ({"from": "a.b.c", "text": "d.*.e"}, {"a": {"b": {"c": NUMBER}}, "d": [{"e": "{}"}]}),
        ({"from": "a.b"}, {"a.b": NUMBER, "text": "{}"}),
        ({"from": "a"}, {"a": int(NUMBER), "text": "{}"}),
        ({"from": "Ünï cöde"}, {"Ünï cöde": NUMBER, "text": "{}"}),
        ({"mcc": "op.mcc", "mnc": "op.mnc"}, {"from": NUMBER, "text": "{}", "op": {"mcc": "234"}}),
    ],
)
def test_a_field_map_finds_it(make_client: MakeClient, fields: Any, document: Any) -> None:
    client = opened(make_client, "http", fields=fields)
    body = json.dumps(document).replace("{}", hawk_id(client)).encode()
    assert client.raw("POST", "/sms/momt/?provider=http", body).status == 200
    assert len(client.outbox()) == 1


@pytest.mark.parametrize(
    "name",
    ["messageId", "message-id", "MessageSid", "message_id", "message_uuid", "MessageUUID", "id"],
)
def test_ids_under_any_of_the_usual_names(make_client: MakeClient, name: str) -> None:
    client = opened(make_client, "http")
    for message_id, sent in (("1", 1), ("1", 1), ("2", 2)):
        deliver(client, {"from": NUMBER, "text": hawk_id(client), name: message_id}, "http")
        assert len(client.outbox()) == sent


@pytest.mark.parametrize(
    ("sender", "country", "number"),
    [
        ("07700900123", "GB", NUMBER),
        ("07700 900123", "GB", NUMBER),
        ("(07700) 900-123", "GB", NUMBER),
        ("447700900123", "GB", NUMBER),
        ("+447700900123", "DE", NUMBER),
        ("00447700900123", "DE", NUMBER),
        ("07700900123", "", ""),
        ("tel:+447700900123", "", NUMBER),
        (" TEL:+44 7700 900123", "GB", NUMBER),
        ("tel:80808", "GB", ""),
        ("80808", "GB", ""),
        ("Bank", "GB", ""),
        ("1" * 9000, "GB", ""),
    ],
)
def test_a_sender_that_is_written_nationally(
    make_client: MakeClient, sender: str, country: str, number: str
) -> None:
    """FAULTS_A F04."""
    more = {"country": country} if country else {}
    client = opened(make_client, "http", **more)
    body = json.dumps({"from": sender, "text": hawk_id(client)}).encode()
    assert client.raw("POST", "/sms/momt/?provider=http", body).status == 200
    assert len(client.outbox()) == bool(number)


@pytest.mark.parametrize("country", ["XX", "gb", "GBR", "+44"])
def test_a_country_that_is_none_is_refused(country: str) -> None:
    with pytest.raises(gateway.SettingsError, match="region of ISO 3166"):
        gateway.Settings(sms_inbound=[{"kind": "http", "country": country}])


@pytest.mark.parametrize("more", [{"country": "GB"}, {"fields": {"from": "a"}}])
def test_a_country_or_a_field_map_is_no_secret(more: Any) -> None:
    """Webhooks that can be reached from elsewhere need one."""
    place: dict[str, Any] = {"public_url": "https://id.example", "trusted_proxies": []}
    place["sms_providers"] = [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]
    with pytest.raises(gateway.SettingsError, match="path_secret or signature_secret"):
        gateway.Settings(**place, sms_inbound=[{"kind": "http", **more}])
    entry = {"kind": "http", "path_secret": "x", **more}
    assert gateway.Settings(**place, sms_inbound=[entry]).inbound == [entry]


# -- Receipts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "outcome"),
    [
        ("http", {"id": "M1", "status": "Success"}, "delivered"),  # Africa's Talking
        ("http", {"MessageUUID": "M1", "Status": "delivered"}, "delivered"),  # Plivo
        ("http", {"message_id": "M1", "status_name": "UNDELIVERED"}, "failed"),
        ("http", {"id": "M1", "status": "delivery_failed"}, "failed"),  # MessageBird
        ("http", {"id": "M1", "status": "UNDELIV"}, "failed"),  # SMPP's words
        ("http", {"id": "M1", "status": "sent"}, ""),
        ("kannel", {"id": "M1", "status": "8"}, ""),
        ("kannel", {"id": "M1", "status": "16"}, "failed"),
    ],
)
def test_receipts_in_many_words(
    make_client: MakeClient, kind: str, fields: dict[str, str], outcome: str
) -> None:
    client = opened(make_client, kind)
    assert client.get(f"/sms/receipt/?provider={kind}&{urlencode(fields)}").status == 200
    assert receipts(client.gateway, kind) == ({outcome: 1} if outcome else {})


def test_a_receipt_by_a_field_map(make_client: MakeClient) -> None:
    fields = {"receipt_id": "data.id", "status": "data.to.0.status"}
    client = opened(make_client, "http", fields=fields)
    body = json.dumps({"data": {"id": "M1", "to": [{"status": "delivered"}]}}).encode()
    assert client.raw("POST", "/sms/receipt/?provider=http", body).status == 200
    assert receipts(client.gateway, "http") == {"delivered": 1}


# -- Signatures -------------------------------------------------------------------


@pytest.mark.parametrize(
    "public",
    [
        "https://id.example",
        "https://id.example:8443",
        "http://id.example:8080",
        "https://[2001:db8::1]:8443",
    ],
)
@pytest.mark.parametrize("signed", ["as it is", "without", "default", "other host", "other port"])
def test_twilio_signs_with_and_without_the_port(
    make_client: MakeClient, public: str, signed: str
) -> None:
    """FAULTS_A F06; twilio-python's validator tries both."""
    entry = {"kind": "twilio", "signature_secret": "t"}
    paid = [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]
    place = {"public_url": public, "trusted_proxies": []}
    client = make_client(**place, sms_inbound=[entry], sms_providers=paid)
    host = public if public.count(":") == 1 else public.rpartition(":")[0]
    port = ":443" if public.startswith("https:") else ":80"
    base = {"as it is": public, "without": host, "default": host + port,
            "other host": "https://evil.example", "other port": host + ":1"}[signed]  # fmt: skip
    body = {"MessageSid": "SM1", "From": NUMBER, "Body": "hello"}
    text = base + "/sms/momt/?provider=twilio&a=1:2"
    text += "".join(name + value for name, value in sorted(body.items()))
    digest = base64.b64encode(hmac.digest(b"t", text.encode(), "sha1")).decode()
    env = {**FORM, "HTTP_X_TWILIO_SIGNATURE": digest}
    path = "/sms/momt/?provider=twilio&a=1:2"
    answer = client.raw("POST", path, urlencode(body).encode(), env)
    assert answer.status == (403 if signed.startswith("other") else 200)


# -- Never silence ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"text": "{id}"}, "it has no sender, or one that cannot get SMS"),
        ({"from": "Bank", "text": "{id}"}, "it has no sender, or one that cannot get SMS"),
        ({"from": NUMBER}, "there is no Hawk id in its text"),
        ({"from": NUMBER, "text": "hunter2"}, "there is no Hawk id in its text"),
        ({"from": NUMBER, "text": "0" * 64}, "its session is unknown"),
        ({"from": OTHER, "text": "{id}"}, "errno 111: this session is verified in another way"),
    ],
)
def test_what_is_not_used_is_logged_without_its_text(
    make_client: MakeClient, fields: dict[str, str], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = opened(make_client, "http")
    deliver(client, {"from": NUMBER, "text": hawk_id(client)}, "http")
    caplog.set_level(logging.DEBUG)
    mine = hawk_id(client)
    deliver(client, {k: v.format(id=mine) for k, v in fields.items()}, "http")
    assert f"sms: a message that http delivered was not used: {why}" in caplog.text
    for secret in (NUMBER[1:], OTHER[1:], mine, "hunter2"):
        assert secret not in caplog.text
    assert len(client.outbox()) == 1


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"--x\r\nContent-Disposition: form-data\r\n\r\nhunter2", "multipart/form-data; boundary=x"),
     (b"hunter2", "text/plain"), (b'{"text": "hunter2"', "application/json"), (b'"hunter2"', ""),
     (b"\xff\xfe", "application/json"), (b"<sms>hunter2</sms>", "text/xml")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["momt", "receipt"])
def test_a_body_that_cannot_be_read_is_logged(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture, body: bytes, content_type: str,
    where: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    client = opened(make_client, "http")
    env = {"CONTENT_TYPE": content_type}
    assert client.raw("POST", f"/sms/{where}/?provider=http", body, env).status == 200
    assert "sms: the body of a webhook is neither a form nor JSON" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_refused_call_is_logged(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistyped signature_secret would be silent otherwise."""
    caplog.set_level(logging.DEBUG)
    client = make_client(sms_inbound=[{"kind": "nexmo", "signature_secret": "hunter2"}])
    assert client.get("/sms/momt/?provider=nexmo&text=x&sig=abc").status == 403
    assert "sms: a call of the webhook of nexmo: the signature" in caplog.text
    assert "hunter2" not in caplog.text


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70)
_NAMES = st.sampled_from(
    [*" ".join([*gateway.FIELDS.values(), *gateway.SMSGATE_FIELDS.values()]).split(),
     "payload", "mccmnc", "provider", "secret", "timestamp", "concat"]
) | st.text(max_size=8)  # fmt: skip
_DOCUMENTS = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=12,
)
_FORMS = st.dictionaries(_NAMES, st.text(max_size=70), max_size=8)
_BODIES = st.one_of(
    st.binary(max_size=300),
    _DOCUMENTS.map(lambda value: json.dumps(value).encode()),
    _FORMS.map(lambda fields: urlencode(fields, errors="replace").encode()),
    st.binary(max_size=60).map(lambda data: b"text=" + quote_from_bytes(data).encode()),
)
_TYPES = st.sampled_from(
    ["application/json", FORM["CONTENT_TYPE"], "text/plain", "multipart/form-data; boundary=x", ""]
)


@pytest.mark.slow
@given(
    kind=st.sampled_from(KINDS), where=st.sampled_from(["momt", "receipt"]), body=_BODIES,
    content_type=_TYPES, query=_FORMS, signature=st.text("0123456789abcdef é", max_size=64),
)  # fmt: skip
@examples(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_call_of_a_webhook_ends_in_5xx_or_silence(
    everything: tuple[WsgiClient, WsgiClient], caplog: pytest.LogCaptureFixture, kind: str,
    where: str, body: bytes, content_type: str, query: dict[str, str], signature: str,
) -> None:  # fmt: skip
    """Answered 200, 400 or 403, and unless it is used or a part, there is a line that says why."""
    caplog.set_level(logging.DEBUG, "gateway")
    query = {k: v for k, v in query.items() if k not in ("provider", "secret")}
    path = f"/sms/{where}/?provider={kind}&{urlencode(query, errors='replace')}"
    env = {"CONTENT_TYPE": content_type, "HTTP_X_SIGNATURE": signature.encode().decode("latin-1"),
           "HTTP_X_TIMESTAMP": signature[:9].encode().decode("latin-1")}  # fmt: skip
    for client in everything:
        caplog.clear()
        answer = client.raw("POST", path, body, env)
        assert answer.status in (200, 400, 403), (answer, caplog.text)
        assert "unforeseen" not in caplog.text
        assert caplog.text or where == "receipt" or answer.status == 400 or _is_part(client)


def _is_part(client: WsgiClient) -> bool:
    """Whether it was kept as a part, which is no reason for a line yet."""
    store = client.gateway.storage
    kept = [key for key in store._run("KEYS", "*") if store._run("TYPE", key) == b"hash"]
    for key in kept:
        store._run("DEL", key, key=key)
    return bool(kept)


@pytest.fixture
def everything(make_client: MakeClient) -> tuple[WsgiClient, WsgiClient]:
    """Two gateways with webhooks of all kinds: one open, one that wants signatures."""
    secret = {kind: {"signature_secret": "t"} for kind in gateway.SIGNATURES}
    signed = [{"kind": kind, **secret.get(kind, {})} for kind in KINDS]
    opened = [{"kind": kind} for kind in KINDS]
    return make_client(sms_inbound=opened), make_client(sms_inbound=signed)
